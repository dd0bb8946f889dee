"""What the reward was like over some steps: a mean, and how far single steps lie from it."""

import math
from collections.abc import Sequence

from .state import Level, Taken

LOOKED_BACK_STEPS = 20
STEPS_MIN = 5
HUGE = 1e100  # no reward; nor is NaN


def level(recent: Sequence[Taken], *, before_step: int | None = None) -> Level | None:
    """The level of the last steps, of those before a step where one is given; None of fewer than five."""
    values = [
        one.reward
        for one in recent
        if one.reward is not None
        and abs(one.reward) < HUGE
        and (before_step is None or one.step < before_step)
    ][-LOOKED_BACK_STEPS:]
    if len(values) < STEPS_MIN:
        return None
    mean = sum(values) / len(values)
    off = [value - mean for value in values]
    return Level(mean=mean, deviation=math.hypot(*off) / math.sqrt(len(values) - 1))
