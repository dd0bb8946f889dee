"""
The same number again and again: a collapse to a floor or another constant, or a value that is stuck.

The evidence against a run is a likelihood, not a count: the chance that healthy rollouts give exactly this run. It is
the smaller of two answers (the Beta-binomial at the cautious end of the baseline; the baseline's own uncertainty,
which matters where successes are rare), and a legitimate switch to a lower level, once in `switch_every_steps`, is
part of "healthy". So an all-zero step after 0.7 with 32 rollouts speaks at once, and at a success rate of 2 % it
takes some thirty of them.
"""

from __future__ import annotations

from math import exp, log, log1p

from stepguardd.core.reward.baseline import Model, log_any_tie, log_constant
from stepguardd.core.reward.model import Baseline, Fall, RewardConfig, Run

__all__ = ["constant_run", "is_sparse", "stuck_nats"]

_NO_RUN = Run()


def constant_run(
    config: RewardConfig,
    model: Model | None,
    baseline: Baseline,
    fall: Fall,
    run: Run,
    step: int,
    value: float,
    ok: int,
) -> Run:
    """
    The run of equal values that `value` continues or begins, and the evidence that it is a collapse.

    Args:
        config: the settings.
        model: the healthy hypothesis; None while too little is known: the run is only counted.
        baseline: what the model was made from.
        fall: a fall that is going on; its level is then one of the healthy explanations.
        run: the run so far.
        step: of this observation.
        value: finite.
        ok: rollouts behind the value, 1 when unknown.

    """
    again = run.length > 0 and value == run.value
    length, first = (run.length + 1, run.first_step) if again else (1, step)
    if model is None or value > model.level:
        return Run(value, length, first)
    z = (value - model.level) / model.sigma if model.sigma > 0 else 0.0
    floor = value in {0.0, -1.0} or (model.shares and value == 0.0)
    if not floor and z > -3.0:
        return Run(value, length, first)
    before = run if again and run.switched else None
    gained = -_log_healthy(model, baseline, value, floor)
    if not floor and not again:
        # A constant that nobody could name beforehand proves nothing by being exact: only its distance counts.
        gained = max(
            0.0, gained + log(model.resolution / max(baseline.high - baseline.low, model.resolution))
        )
    plain = gained + (before.plain if before else 0.0)
    rollouts = ok + (before.rollouts if before else 0)
    if plain < 4.0:
        return Run(value, length, first, plain, before.switched if before else (0.0,) * 4, rollouts, plain)
    evidence = plain
    if model.shares and value == 0.0:
        # Beta-binomial with the baseline's own uncertainty: how often does a rate known this badly give no success?
        trials = baseline.weight * model.effective
        evidence = min(
            evidence, baseline.level * trials * log1p(rollouts / max(model.rollouts * baseline.weight, 1.0))
        )
    switched = _switched(config, model, baseline, value, floor, before, length)
    evidence = _together(config, evidence, switched)
    if fall.active:
        evidence = min(evidence, _within_fall(model, fall, value, length))
    return Run(value, length, first, plain, switched, rollouts, max(evidence, 0.0))


def _log_healthy(model: Model, baseline: Baseline, value: float, floor: bool) -> float:
    exact = log_constant(model, model.level, value)
    if not floor or value != 0.0:
        return exact
    # Where zeros are nothing unheard of, how often they really came is the better estimate.
    z = (value - model.level) / model.sigma if model.sigma > 0 else 0.0
    if exact > -7.0 if model.shares else z > -4.0:
        return max(exact, log(max(baseline.zero_rate, 1e-12)))
    return exact


def _switched(
    config: RewardConfig,
    model: Model,
    baseline: Baseline,
    value: float,
    floor: bool,
    before: Run | None,
    length: int,
) -> tuple[float, ...]:
    """Log-likelihoods of the whole run after a switch to three lower levels, and to the constant's own level."""
    height = model.level - model.floor
    least = config.legitimate_fall
    times = 1 if before else length  # a run that starts to be watched late is taken as a whole
    levels = [model.floor + height * share for share in (least, 0.5 * (1 + least), 0.75 + 0.25 * least)]
    logs = [times * log_constant(model, level, value) for level in levels]
    logs.append(-1e9 if floor else times * min(log_any_tie(model, baseline, model.level), -0.7))
    return tuple(a + b for a, b in zip(before.switched, logs, strict=True)) if before else tuple(logs)


def _together(config: RewardConfig, evidence: float, switched: tuple[float, ...]) -> float:
    """Nats against the whole healthy hypothesis: the baseline, or a legitimate switch away from it."""
    top = max(switched)
    share = log(sum(exp(x - top) for x in switched) / len(switched)) + top - log(config.switch_every_steps)
    high, low = max(-evidence, share), min(-evidence, share)
    return -(high + log1p(exp(low - high)))


def _within_fall(model: Model, fall: Fall, value: float, length: int) -> float:
    """Nats against the run when the level to which the reward has just fallen is healthy (even odds)."""
    others = [v for _, v in fall.tail if v != value]
    if not others:
        return float("inf")
    return 0.7 - length * log_constant(model, sum(others) / len(others), value)


def stuck_nats(config: RewardConfig, model: Model, baseline: Baseline, run: Run) -> float:
    """Evidence that the value is stuck: nats against so many equal values in a row. 0 where ties are natural."""
    repeats = run.length - 1
    if repeats < 3:
        return 0.0
    saturated = run.value >= baseline.high and (model.shares or model.level > baseline.high - 3 * model.sigma)
    if run.value == 0.0 or (model.shares and run.value == 1.0) or (saturated and not model.shares):
        return 0.0
    tie = repeats * log_any_tie(model, baseline, run.value)
    # A healthy stretch in which every second value ties, for whatever reason, is part of the null.
    stretch = repeats * log(0.5) - log(config.switch_every_steps)
    return -max(tie, stretch)


def is_sparse(model: Model | None, baseline: Baseline) -> bool:
    """Whether an all-zero step is an everyday event of this baseline."""
    if model is None:
        return baseline.high <= 0.0 or baseline.zero_rate > 0.05
    return max(log_constant(model, model.level, 0.0), log(max(baseline.zero_rate, 1e-12))) > log(0.05)
