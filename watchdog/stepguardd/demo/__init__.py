"""`stepguard demo`: a real training run, a real fault, and what each of them came to."""
