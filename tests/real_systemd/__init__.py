"""Tests on a real systemd. A package, so that its machine ends with its last test."""
