"""
Settings for the reward tests out of runs that a person calls healthy, and what false alarms to expect of
them.

The defaults are kept where they prove themselves: a proposal only moves a budget up, and only as far as it
takes to leave these runs alone. What is expected is the larger of two figures: the budget's own, and what was
counted here, with its 95 % bound (Poisson), which is honest about how little a short run proves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import inf

from stepguardd.core.reasons import Reason
from stepguardd.core.reward import RewardConfig, observe, start
from stepguardd.history import History
from stepguardd.replay import Replayed, observations
from stepguardd.replay import replay as run

__all__ = ["Proposal", "propose"]

_HOLD_BUDGETS = (1.0, 10.0, 100.0, 1000.0)
_WARN_BUDGETS = (1.0, 5.0, 25.0, 125.0)
# Upper 95 % bounds of a Poisson mean after 0, 1, 2, … counts; beyond, a normal approximation is close.
_BOUNDS = (3.0, 4.75, 6.3, 7.76, 9.16, 10.52)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What to set, and what to expect of it."""

    config: RewardConfig
    steps: int
    rollouts: int | None
    """What the granularity of the values says about the rollouts behind one; None: they are no shares."""
    holds: int
    """False holds on these runs under the proposal."""
    warnings: int
    holds_per_million: float
    """Expected: the budget's own figure or, where larger, what was counted."""
    holds_bound: float
    """95 % bound on it from these runs alone."""
    warnings_per_million: float
    warnings_bound: float
    still: tuple[tuple[str, int, Reason], ...]
    """
    (file, step, reason) of holds that no budget avoids: such a run is not healthy, or needs `min_reward` off.
    """


def propose(config: RewardConfig, histories: Sequence[History]) -> Proposal:
    """
    Propose settings.

    Args:
        config: where to start from.
        histories: runs that a person calls healthy; at least one.

    """
    steps = sum(len(history.steps) for history in histories)
    rollouts = config.rollouts_per_step or _common([_rollouts(config, history) for history in histories])
    warn, hold = _streaks(config, histories)
    base = replace(config, zero_streak_warn=warn, zero_streak_hold=hold)
    results: list[Replayed] = []
    for factor in _HOLD_BUDGETS:
        chosen = replace(base, false_alarm_steps=config.false_alarm_steps * factor)
        results = [run(chosen, history) for history in histories]
        if not any(result.trips for result in results):
            break
    base = chosen
    for factor in _WARN_BUDGETS:
        chosen = replace(base, warning_alarm_steps=config.warning_alarm_steps * factor)
        results = [run(chosen, history) for history in histories]
        if sum(len(result.warnings) for result in results) <= steps / config.warning_alarm_steps:
            break
    holds = sum(len(result.trips) for result in results)
    warnings = sum(len(result.warnings) for result in results)
    return Proposal(
        config=chosen,
        steps=steps,
        rollouts=rollouts,
        holds=holds,
        warnings=warnings,
        holds_per_million=1e6 * max(1 / chosen.false_alarm_steps, holds / steps),
        holds_bound=1e6 * _bound(holds) / steps,
        warnings_per_million=1e6 * max(1 / chosen.warning_alarm_steps, warnings / steps),
        warnings_bound=1e6 * _bound(warnings) / steps,
        still=tuple(
            (result.history.source, trip.step, trip.reason) for result in results for trip in result.trips
        ),
    )


def _bound(count: int) -> float:
    return _BOUNDS[count] if count < len(_BOUNDS) else count + 1.65 * (count + 1) ** 0.5 + 1.4


def _rollouts(config: RewardConfig, history: History) -> int | None:
    state = start(config)
    for seen in observations(history):
        state, _ = observe(config, state, seen)
        if state.learned.decided:
            break
    return state.baseline.rollouts or None


def _common(found: Sequence[int | None]) -> int | None:
    """What all runs agree on."""
    return found[0] if len(set(found)) == 1 else None


def _streaks(config: RewardConfig, histories: Sequence[History]) -> tuple[int | None, int | None]:
    """The plain rules about zeros, moved beyond what these runs show once they have had a success."""
    warn, hold = config.zero_streak_warn, config.zero_streak_hold
    results = [run(config, history) for history in histories]
    reasons = {one.reason for result in results for one in result.trips}
    reasons |= {one.reason for result in results for one in result.warnings}
    if Reason.ZERO_STREAK not in reasons:
        return warn, hold
    longest = max(map(_longest_streak, histories))
    return (
        None if warn is None else max(warn, longest + 1),
        None if hold is None else max(hold, 2 * longest + 2),
    )


def _longest_streak(history: History) -> int:
    first = next((i for i, value in enumerate(history.values) if value not in {None, 0.0}), inf)
    values = [value for i, value in enumerate(history.values) if i > first and value is not None]
    return max(
        (len(list(group)) for zero, group in groupby(values, key=lambda v: v == 0.0) if zero), default=0
    )
