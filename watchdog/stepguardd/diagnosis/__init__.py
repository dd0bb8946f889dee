"""After the fact: evidence out of a run's folder, its causes ranked, and the report."""
