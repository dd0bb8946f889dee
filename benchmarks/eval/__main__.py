"""
`python -m benchmarks.eval`: false alarms, delays and misses per family of curves, beside the bound.

Prints one table for healthy and one for faulty families, then the goals; the exit code is 1 when one is
missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.eval.bounds import delay_quantile
from benchmarks.eval.families import FAULTY, HEALTHY, Family
from benchmarks.eval.measure import faulty, healthy, quantile
from benchmarks.eval.plot import Bar, svg
from stepguardd.core.reward import RewardConfig

_HOLDS_GOAL, _WARNINGS_GOAL = 0.1, 5.0  # per 10,000 healthy steps
_BOUND_CURVES = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthyRow:
    """False alarms of one healthy family."""

    family: str
    held_out: bool
    steps: int
    holds: int
    warnings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultyRow:
    """Delays of one faulty family, in steps; infinite is a miss, or no bound or goal."""

    family: str
    held_out: bool
    alarm: float
    alarm_p95: float
    hold: float
    hold_p95: float
    bound_alarm: float
    bound_hold: float
    alarm_goal: float
    hold_goal: float
    missed: int
    not_held: int
    early: int
    curves: int
    onset_error: float

    @property
    def good(self) -> bool:
        """Whether the goals of this family are met, and no curve missed."""
        return self.missed == 0 and not self.alarm > self.alarm_goal and not self.hold > self.hold_goal


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and tell by the exit code whether the goals are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eval", description=__doc__)
    parser.add_argument("--curves", type=int, default=60, help="curves per family (default 60)")
    parser.add_argument("--seed", type=int, default=2026, help="of the generator (default 2026)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--svg", type=Path, help="draw the delays beside the bound here")
    options = parser.parse_args(arguments)
    config = RewardConfig()
    calm = [_healthy(config, family, options.curves, options.seed) for family in HEALTHY]
    bad = [_faulty(config, family, options.curves, options.seed) for family in FAULTY]
    good = _print(calm, bad)
    if options.json is not None:
        figures = {"healthy": [asdict(row) for row in calm], "faulty": [_finite(asdict(row)) for row in bad]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.svg is not None:
        options.svg.write_text(svg([_bar(row) for row in bad]))
    return 0 if good else 1


def _healthy(config: RewardConfig, family: Family, curves: int, seed: int) -> HealthyRow:
    print(f"  {family.name} …", file=sys.stderr)
    found = healthy(config, family, curves, seed)
    return HealthyRow(
        family=family.name,
        held_out=family.held_out,
        steps=found.steps,
        holds=found.holds,
        warnings=found.warnings,
    )


def _faulty(config: RewardConfig, family: Family, curves: int, seed: int) -> FaultyRow:
    print(f"  {family.name} …", file=sys.stderr)
    found = faulty(config, family, curves, seed)
    return FaultyRow(
        family=family.name,
        held_out=family.held_out,
        alarm=quantile(found.alarms, 0.5),
        alarm_p95=quantile(found.alarms, 0.95),
        hold=quantile(found.holds, 0.5),
        hold_p95=quantile(found.holds, 0.95),
        bound_alarm=_bound(family, seed, config.warning_alarm_steps),
        bound_hold=_bound(family, seed, config.false_alarm_steps),
        alarm_goal=inf if family.alarm_goal is None else family.alarm_goal,
        hold_goal=inf if family.hold_goal is None else family.hold_goal,
        missed=sum(delay is None for delay in found.alarms),
        not_held=sum(delay is None for delay in found.holds),
        early=found.early,
        curves=curves,
        onset_error=median(found.onset_errors) if found.onset_errors else inf,
    )


def _bound(family: Family, seed: int, budget: float) -> float:
    """The optimal median delay over some curves of the family; infinite where the change is no jump."""
    curves = [family.make(np.random.default_rng([seed, i])) for i in range(_BOUND_CURVES)]
    known = [(curve.before, curve.after) for curve in curves]
    delays = [delay_quantile(b, a, budget) for b, a in known if b is not None and a is not None]
    return float(median(delays)) if delays and family.name not in {"decay", "policy_collapse"} else inf


def _print(calm: Sequence[HealthyRow], bad: Sequence[FaultyRow]) -> bool:
    print("Healthy: false alarms per 10,000 steps (* held out)\n")
    print(f"{'family':22}{'steps':>9}{'holds':>9}{'warnings':>10}")
    for row in calm:
        name = row.family + ("*" if row.held_out else "")
        print(
            f"{name:22}{row.steps:9}{_rate(row.holds, row.steps):9.2f}{_rate(row.warnings, row.steps):10.2f}"
        )
    steps = sum(row.steps for row in calm)
    holds = _rate(sum(row.holds for row in calm), steps)
    warnings = _rate(sum(row.warnings for row in calm), steps)
    print(f"{'all':22}{steps:9}{holds:9.2f}{warnings:10.2f}\n")
    print("Faulty: delay in steps, median/95 %; the optimum knows the true parameters (* held out)\n")
    print(
        f"{'family':22}{'alarm':>8}{'optimum':>9}{'goal':>6}{'hold':>9}{'optimum':>9}{'goal':>6}{'missed':>8}"
    )
    for one in bad:
        name = one.family + ("*" if one.held_out else "")
        alarm, hold = _pair(one.alarm, one.alarm_p95), _pair(one.hold, one.hold_p95)
        told = f"{name:22}{alarm:>8}{_cell(one.bound_alarm):>9}{_cell(one.alarm_goal):>6}{hold:>9}"
        told += f"{_cell(one.bound_hold):>9}{_cell(one.hold_goal):>6}{one.missed:8}"
        print(told + ("" if one.good or one.held_out else "  <- misses its goal"))
    good = (
        holds <= _HOLDS_GOAL
        and warnings <= _WARNINGS_GOAL
        and all(one.good for one in bad if not one.held_out)
    )
    good = good and not any(one.missed for one in bad)
    print(
        f"\nGoals: at most {_HOLDS_GOAL} holds, {_WARNINGS_GOAL} warnings; no curve missed; delays as above."
    )
    print("All goals are met." if good else "Not all goals are met.")
    return good


def _rate(count: int, steps: int) -> float:
    return 1e4 * count / steps


def _cell(value: float) -> str:
    return f"{value:g}" if isfinite(value) else "–"


def _pair(middle: float, late: float) -> str:
    return f"{_cell(middle)}/{_cell(late)}" if isfinite(middle) else "–"


def _finite(figures: dict[str, object]) -> dict[str, object]:
    return {key: None if value == inf else value for key, value in figures.items()}


def _bar(row: FaultyRow) -> Bar:
    return Bar(
        name=row.family.replace("_", " "),
        alarm=row.alarm,
        hold=row.hold,
        hold_late=row.hold_p95,
        bound=row.bound_hold if isfinite(row.hold) else row.bound_alarm,
        goal=row.hold_goal if isfinite(row.hold_goal) else row.alarm_goal,
    )


if __name__ == "__main__":
    raise SystemExit(main())
