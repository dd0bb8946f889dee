"""Figures, as ratios within one run: `make bench`, or one of them by `python -m benchmarks.<name>`."""
