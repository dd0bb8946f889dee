"""The Stepguard daemon, its command line and its web page."""
