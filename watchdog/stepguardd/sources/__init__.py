"""What turns the world into readings: one file per thing watched. A sense reports; it decides nothing."""
