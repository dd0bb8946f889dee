"""One incident as a folder that a person can act on: collected while it goes on, written up when it ends."""
