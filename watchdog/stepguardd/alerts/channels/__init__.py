"""One file for each channel, and `contract`, which all of them keep."""
