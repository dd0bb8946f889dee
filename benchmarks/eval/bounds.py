"""
What no detector can beat: the delay of Page's CUSUM that knows the true distributions before and after the
change.

The threshold is the smallest for which the expected time between false alarms reaches the budget, by the
Markov-chain method of Brook and Evans (the statistic on a grid); so is the distribution of the delay. CUSUM
minimises the worst-case expected delay among all tests with that budget (Moustakides, 1986).
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small matrices: threads only wait for each other

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_STATES = 160
_STEPS_MAX = 400


def delay_quantile(before: Floats, after: Floats, budget: float, share: float = 0.5) -> float:
    """
    A quantile of the optimal delay in steps, 0 for an alarm on the first changed step.

    Args:
        before: probability of each outcome of a healthy step.
        after: of a changed one, over the same outcomes.
        budget: healthy steps between false alarms.
        share: which quantile; 0.5 is the median.

    """
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = np.where((before <= 0) & (after <= 0), 0.0, np.log(after) - np.log(before))
    threshold = _threshold(gains, before, budget)
    survival = _survival(gains, after, threshold)
    alarm = np.flatnonzero(survival <= 1 - share)
    return float(alarm[0]) if len(alarm) else float("inf")


def _threshold(gains: Floats, before: Floats, budget: float) -> float:
    finite = gains[np.isfinite(gains) & (before > 0)]
    low, high = 0.0, float(np.log(budget)) + max(0.0, float(finite.max(initial=0.0)))
    for _ in range(30):
        middle = 0.5 * (low + high)
        if _time_between(gains, before, middle) >= budget:
            high = middle
        else:
            low = middle
    return high


def _transitions(gains: Floats, chances: Floats, threshold: float) -> Floats:
    """Among the grid's states below the threshold; what is missing from a row's sum is the alarm."""
    width = max(threshold, 1e-9) / (_STATES - 0.5)
    levels = np.arange(_STATES) * width
    matrix = np.zeros((_STATES, _STATES))
    for gain, chance in zip(gains, chances, strict=True):
        if chance <= 0 or gain == np.inf:
            continue
        moved = np.zeros(_STATES) if gain == -np.inf else np.maximum(levels + gain, 0.0)
        inside = moved < threshold
        to = np.minimum(np.rint(moved / width).astype(int), _STATES - 1)
        np.add.at(matrix, (np.flatnonzero(inside), to[inside]), chance)
    return matrix


def _time_between(gains: Floats, before: Floats, threshold: float) -> float:
    matrix = _transitions(gains, before, threshold)
    try:
        times = np.linalg.solve(np.eye(_STATES) - matrix, np.ones(_STATES))
    except np.linalg.LinAlgError:
        return float("inf")
    return float(times[0]) if times[0] > 0 else float("inf")


def _survival(gains: Floats, after: Floats, threshold: float) -> Floats:
    """The chance of no alarm after 1, 2, … changed steps."""
    matrix = _transitions(gains, after, threshold)
    row = np.zeros(_STATES)
    row[0] = 1.0
    survival = []
    for _ in range(_STEPS_MAX):
        row = row @ matrix
        survival.append(row.sum())
        if survival[-1] < 1e-6:
            break
    return np.array(survival)
