"""Alerts on their way out: outbox, channels, picture. What is said and when is in `core.alerts`."""
