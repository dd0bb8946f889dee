"""Readers of the metric stream of a run, one module per format, all of them behind `rows.Reader`."""
