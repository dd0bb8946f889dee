"""
The reward falls: how much, since when, to what, and is it still falling?

Four cumulative sums of log-likelihood ratios (Page's CUSUM) against named alternatives: half of the reward
gone, a quarter gone, back at the run's starting level, and next to nothing left. For each, the expected time
between false alarms on a healthy stream is at least the exponential of its threshold (Lorden). Their healthy
hypothesis is the cautious end of the baseline, so a lag of the baseline costs delay, not false alarms, and a
wobble of less than about an eighth never adds up. The fourth takes every legitimate switch as healthy and
therefore may hold on its own.

The onset is the maximum-likelihood change point over the values since the suspicion began.
"""

# ruff: noqa: FURB136 - min() and max() cost ten comparisons each, and this runs on every step

from __future__ import annotations

from math import log, log1p, sqrt
from typing import NamedTuple

from stepguardd.core.reward.baseline import Model
from stepguardd.core.reward.model import Fall, RewardConfig

__all__ = ["Segment", "after", "dip_in", "nats", "onset_of", "segment", "start_odds", "student_nats"]

_NO_FALL = Fall()
_new = tuple.__new__
_TAIL = 64
_HALF, _QUARTER = 0.5, 0.75
_GONE, _LEAST = 0.05, 0.3  # near the floor: a twentieth of the level against three tenths
_DIP_NATS = 5.0  # against chance, for a fall that is over to be remembered
_SHAPE = 4.5  # (degrees of freedom + 1) / 2 of Student's t with 8
_DEGREES = 8.0


def after(
    config: RewardConfig, model: Model, start: float | None, fall: Fall | None, step: int, value: float
) -> Fall | None:
    """
    The sums after one more finite value; None when all of them are at zero.

    Args:
        config: the settings.
        model: the healthy hypothesis.
        start: the run's starting level, None when it is not known or not clearly below the baseline.
        fall: the sums so far.
        step: of this observation.
        value: finite.

    """
    half, quarter, back, near, tail, active, onset, age = fall or _NO_FALL
    if model.shares:
        n, p = model.effective, model.level
        # log((1 - fp) / (1 - p)) for each share f of p that is left
        rest = log1p(-p)
        lost = n * (1.0 - value)
        kept = n * value
        half += lost * (log1p(-_HALF * p) - rest) - 0.6931471805599453 * kept
        quarter += lost * (log1p(-_QUARTER * p) - rest) - 0.2876820724517809 * kept
        near += lost * (log1p(-_GONE * p) - log1p(-_LEAST * p)) - 1.791759469228055 * kept
        if start is not None:
            back += kept * log(start / p) + lost * (log1p(-start) - rest)
    else:
        sigma = model.sigma
        height = (model.level - model.floor) / sigma
        z = (value - model.level) / sigma
        half += student_nats(z, max(_HALF * height, 2.0))
        quarter += student_nats(z, max((1 - _QUARTER) * height, 1.5))
        if height > 8.0 and model.floor == 0.0:  # a floor that is only the lowest value so far proves nothing
            near += student_nats(z + (1 - _LEAST) * height, (_LEAST - _GONE) * height)
        if start is not None:
            back += student_nats(z, (model.level - start) / sigma)
    half = half if half > 0.0 else 0.0
    quarter = quarter if quarter > 0.0 else 0.0
    near = near if near > 0.0 else 0.0
    back = back if back > 0.0 and start is not None else 0.0
    if half == quarter == near == back == 0.0:
        return None
    top = config.hold_nats * 1.5  # no higher, or the end of a fall would be noticed late
    if half > top or quarter > top or near > top or back > top:
        half, quarter, near, back = min(half, top), min(quarter, top), min(near, top), min(back, top)
    if len(tail) >= _TAIL:
        tail = tail[1:]
    return _new(Fall, (half, quarter, back, near, (*tail, (step, value)), active, onset, age + active))


def nats(fall: Fall) -> float:
    """The strongest of the sums that may warn."""
    return max(fall.half, fall.quarter, fall.start)


def student_nats(z: float, shift: float) -> float:
    """Log-likelihood ratio of a level `shift` scales lower, under Student's t."""
    moved = z + shift
    return _SHAPE * (log1p(z * z / _DEGREES) - log1p(moved * moved / _DEGREES))


class Segment(NamedTuple):
    """The values since the onset."""

    onset: int
    steps: int
    level: float
    """Their mean."""
    end: float
    """What a straight line through them says about the last one."""
    slope: float
    """Per observation."""
    trend_nats: float
    """Evidence for the line over a constant level, in nats."""
    leaves_at: int
    """The step at which that line, extended backwards, leaves the baseline."""


def onset_of(model: Model, tail: tuple[tuple[int, float], ...]) -> int:
    """The index in the tail at which the change most likely happened, whatever the level after it."""
    best, begin, total = -1.0, len(tail) - 1, 0.0
    for size, (_, value) in enumerate(reversed(tail), start=1):
        total += value
        gain = size * _divergence(model, total / size)
        if gain > best:
            best, begin = gain, len(tail) - size
    return begin


def dip_in(model: Model, tail: tuple[tuple[int, float], ...]) -> tuple[int, float, int] | None:
    """
    Steps, mean and last step of the deepest stretch of a fall that is over; None where there was none.

    The stretch is the one that lies furthest below seven eighths of the height in all: what a wobble reaches.
    """
    line = model.level - 0.125 * (model.level - model.floor)
    best, begin, size = 0.0, 0, 0
    depth, start = 0.0, 0
    for i, (_, value) in enumerate(tail):
        depth += line - value
        if depth <= 0.0:
            depth, start = 0.0, i + 1
        elif depth > best:
            best, begin, size = depth, start, i + 1 - start
    if size == 0:
        return None
    mean = sum(value for _, value in tail[begin : begin + size]) / size
    return (size, mean, tail[-1][0]) if size * _divergence(model, mean) >= _DIP_NATS else None


def _divergence(model: Model, level: float) -> float:
    """Nats per observation by which a lower level explains its own mean better than the baseline does."""
    if level >= model.level:
        return 0.0
    if not model.shares:
        z = (level - model.level) / model.sigma
        return 0.5 * z * z
    p, q = model.level, min(max(level, 1e-9), 1 - 1e-9)
    return model.effective * (q * log(q / p) + (1 - q) * log((1 - q) / (1 - p)))


def segment(model: Model, tail: tuple[tuple[int, float], ...]) -> Segment:
    """The values since the most likely onset: level, trend, where it began. The tail is not empty."""
    values = tail[onset_of(model, tail) :]
    count = len(values)
    mean = sum(v for _, v in values) / count
    middle = (count - 1) / 2
    sxx = count * (count * count - 1) / 12.0
    slope = sum((i - middle) * v for i, (_, v) in enumerate(values)) / sxx if count > 2 else 0.0
    sigma2 = _variance(model, mean)
    trend = 0.5 * slope * slope * sxx / sigma2 if slope < 0 else 0.0
    end = mean + slope * (count - 1 - middle)
    leaves = values[0][0]
    if trend > 5.0:  # the line starts before the point from which the mean explains the rest best
        back = int((model.level - (mean - slope * middle)) / -slope)
        steps_each = max(1, (values[-1][0] - values[0][0]) // max(1, count - 1))
        leaves = values[0][0] - min(max(0, back), _TAIL) * steps_each
    return Segment(values[0][0], count, mean, end, slope, trend, leaves)


def _variance(model: Model, level: float) -> float:
    if not model.shares:
        return model.sigma * model.sigma
    edge = max(0.5 / model.rollouts, 1e-12)  # 1 - edge must not round to 1
    p = min(max(level, edge), 1 - edge)
    return p * (1 - p) / model.effective


def start_odds(model: Model, part: Segment, start: float, start_n: int) -> float:
    """
    How much better "exactly the starting level" explains the segment than "some level on the way down" (a
    Bayes factor, with every level between floor and baseline equally likely under the latter).
    """
    error = sqrt(_variance(model, start) * (1 / part.steps + 1 / start_n))
    z = (part.level - start) / error
    width = model.level - model.floor
    return float(width / error * 0.3989 * 2.718281828459045 ** (-0.5 * z * z))
