"""
Runs the judgement over curves and counts: false holds, false warning episodes, delays, misses, wrong onsets.

The judgement sees what `replay` would give it: step, reward and the columns under their canonical names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from benchmarks.eval.families import SWITCH_GRACE, Curve, Family
from stepguardd.core.reward import Level, Observation, RewardConfig, observe, start

_CANONICAL = {"rollout/aborted_ratio": "aborted_ratio"}


@dataclass(slots=True, kw_only=True)
class Healthy:
    """What the judgement did on healthy curves."""

    steps: int = 0
    holds: int = 0
    warnings: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Faulty:
    """What it did on faulty ones. A delay is in observations from the onset; None is a miss."""

    alarms: list[int | None] = field(default_factory=list)
    holds: list[int | None] = field(default_factory=list)
    early: int = 0
    """Curves with an alarm before the onset; they count as false, not as quick."""
    onset_errors: list[int] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)


def alarms(config: RewardConfig, curve: Curve) -> list[tuple[int, Level, str, int | None]]:
    """The first observation of every hold and of every warning episode: index, level, reason, onset."""
    state = start(config)
    found = []
    warned = False
    names = {name: _CANONICAL.get(name, name) for name in curve.columns}
    holding = False
    for i, (step, value) in enumerate(zip(curve.steps, curve.values, strict=True)):
        metrics = {names[name]: column[i] for name, column in curve.columns.items()}
        state, verdict = observe(config, state, Observation(0, step, value, metrics=metrics))
        newly_held = verdict.level is Level.HOLD and not holding
        newly_warned = verdict.level is Level.WARN and not verdict.tripped and not warned
        if newly_held or newly_warned:
            found.append((i, verdict.level, str(verdict.reason), verdict.onset_step))
        holding = verdict.tripped
        warned = state.episode is not None
    return found


def healthy(config: RewardConfig, family: Family, curves: int, seed: int) -> Healthy:
    """False alarms over so many curves of a healthy family."""
    result = Healthy()
    for i in range(curves):
        curve = family.make(np.random.default_rng([seed, i]))
        result.steps += len(curve.values)
        for at, level, reason, _ in alarms(config, curve):
            if level is Level.HOLD:
                result.holds += 1
            elif any(0 <= at - switch < SWITCH_GRACE for switch in curve.switches):
                continue  # rightly warned about
            else:
                result.warnings += 1
            key = f"{level.name} {reason}"
            result.reasons[key] = result.reasons.get(key, 0) + 1
    return result


def faulty(config: RewardConfig, family: Family, curves: int, seed: int) -> Faulty:
    """Delays over so many curves of a faulty family."""
    result = Faulty()
    for i in range(curves):
        curve = family.make(np.random.default_rng([seed, i]))
        assert curve.onset is not None
        found = alarms(config, curve)
        early = [a for a in found if a[0] < curve.onset]
        result.early += bool(early)
        after = [a for a in found if a[0] >= curve.onset]
        holds = [a for a in after if a[1] is Level.HOLD]
        result.alarms.append(after[0][0] - curve.onset if after else None)
        result.holds.append(holds[0][0] - curve.onset if holds else None)
        first = (holds or after or [None])[0]
        if first is not None:
            key = f"{first[1].name} {first[2]}"
            result.reasons[key] = result.reasons.get(key, 0) + 1
            if first[3] is not None:
                result.onset_errors.append(first[3] - curve.steps[curve.onset])
    return result


def quantile(delays: list[int | None], share: float) -> float:
    """A quantile of delays in which a miss is infinite."""
    ordered = sorted(float("inf") if d is None else d for d in delays)
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
