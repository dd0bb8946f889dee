"""A curve as one line of text."""

from collections.abc import Sequence
from math import isfinite

SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None]) -> str:
    """One character a value, from least to greatest; unknown is a dot, NaN and infinities are crosses."""
    known = [value for value in values if value is not None and isfinite(value)]
    low, span = (min(known), max(known) - min(known)) if known else (0.0, 0.0)
    return "".join(_mark(value, low, span) for value in values)


def _mark(value: float | None, low: float, span: float) -> str:
    if value is None:
        return "·"
    if not isfinite(value):
        return "×"
    if not span:
        return SPARKS[len(SPARKS) // 2]
    return SPARKS[min(int((value - low) / span * len(SPARKS)), len(SPARKS) - 1)]
