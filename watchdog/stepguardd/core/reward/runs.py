"""
The same number again and again: a collapse to a floor or another constant, or a value that is stuck.

The evidence against a run is a likelihood, not a count: the chance that healthy rollouts give exactly this
run. It is the smaller of two answers (the Beta-binomial at the cautious end of the baseline; the baseline's
own uncertainty, which matters where successes are rare), and a legitimate switch to a lower level, once in
`switch_every_steps`, is part of "healthy". So an all-zero step after 0.7 with 32 rollouts speaks at once, and
at a success rate of 2 % it takes some thirty of them.
"""

from __future__ import annotations

from math import exp, log, log1p

from stepguardd.core.reward.baseline import LEAST_TIE, Model, log_any_tie, log_constant
from stepguardd.core.reward.model import Baseline, Dips, Fall, RewardConfig, RewardState, Run, Switched

__all__ = ["constant_run", "is_natural", "is_sparse", "stuck_nats"]

_GRID = 0.15  # of the height, between the two lower levels that the likelihood is computed for
_NEVER = -1e6
_KNOWN_DIPS = 3  # before such a dip is one of the healthy explanations of a constant


def constant_run(
    config: RewardConfig,
    model: Model | None,
    state: RewardState,
    fall: Fall | None,
    step: int,
    value: float,
    ok: int,
) -> Run | None:
    """
    The run of equal values that `value` continues or begins, and the evidence that it is a collapse.

    None for a value that is neither a repetition nor suspect by itself.

    Args:
        config: the settings.
        model: the healthy hypothesis; None while too little is known: the run is only counted.
        state: with the baseline that the model was made from, and the run so far.
        fall: a fall that is going on; its level is then one of the healthy explanations.
        step: of this observation.
        value: finite.
        ok: rollouts behind the value, 1 when unknown.

    """
    baseline, run = state.baseline, state.run
    again, length, first = value == baseline.last, 1, step
    if again:
        length, first = (
            (run.length + 1, run.first_step) if run else (2, step if state.step is None else state.step)
        )
    elif model is None:
        return Run(value, 1, step) if value == 0.0 else None
    if model is None or value > model.level:
        return Run(value, length, first) if again else None
    z = (value - model.level) / model.sigma if model.sigma > 0 else 0.0
    floor = value in {0.0, -1.0}
    if not floor and z > -3.0:
        return Run(value, length, first) if again else None
    gained = -_log_healthy(model, baseline, value, floor)
    if not floor and not again:
        # A constant that nobody could name beforehand proves nothing by being exact: only its distance
        # counts.
        gained = max(
            0.0, gained + log(model.resolution / max(baseline.high - baseline.low, model.resolution))
        )
    plain, rollouts, switched = gained, ok * length, None
    if again and run and run.rollouts:
        plain, rollouts, switched = plain + run.plain, ok + run.rollouts, run.switched
    if plain < 4.0:
        return Run(value, length, first, plain, None, rollouts, plain)
    evidence = plain
    if model.shares and value == 0.0:
        # Beta-binomial with the baseline's own uncertainty: how often does a rate known this badly give no
        # success?
        trials = baseline.weight * model.effective
        evidence = min(
            evidence, baseline.level * trials * log1p(rollouts / max(model.rollouts * baseline.weight, 1.0))
        )
    switched = _switched(config, model, baseline, value, floor, switched, length)
    evidence = _together(config, evidence, switched)
    if (dips := state.learned.dips) is not None and dips.number >= _KNOWN_DIPS and evidence > 0.0:
        evidence = -_log_add(-evidence, _log_dip(model, baseline, dips, value, length))
    if fall and fall.active and fall.age > length:
        evidence = min(evidence, _within_fall(model, fall, value, length))
    return Run(value, length, first, plain, switched, rollouts, max(evidence, 0.0))


def _log_healthy(model: Model, baseline: Baseline, value: float, floor: bool) -> float:
    exact = log_constant(model, model.near, value)
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
    before: Switched | None,
    length: int,
) -> Switched:
    """Log-likelihoods after a switch to two lower levels, and to the constant's own level."""
    height = model.near - model.floor
    least = model.floor + height * config.legitimate_fall
    times = 1 if before else length  # a run that starts to be watched late is taken as a whole
    logs = (
        times * log_constant(model, least, value),
        times * log_constant(model, least + _GRID * height, value),
        _NEVER if floor else times * min(log_any_tie(model, baseline, model.level), -0.7),
    )
    return (before[0] + logs[0], before[1] + logs[1], max(_NEVER, before[2] + logs[2])) if before else logs


def _together(config: RewardConfig, evidence: float, switched: Switched) -> float:
    """Nats against the whole healthy hypothesis: the baseline, or a legitimate switch away from it."""
    least, next_up, own = switched
    # Every level between the least and the baseline is equally likely after a switch; the likelihood falls
    # off exponentially from the least one up.
    rate = max(0.0, least - next_up) / _GRID * (1 - config.legitimate_fall)
    average = least - log(rate / (1 - exp(-rate))) if rate > 1e-6 else least
    legitimate = _log_add(average, own) - log(config.switch_every_steps)
    return -_log_add(-evidence, legitimate)


def _log_dip(model: Model, baseline: Baseline, dips: Dips, value: float, length: int) -> float:
    """The log-likelihood of the run as so many dips, by chance, like those that came back by themselves."""
    least = 0.5 / max(model.rollouts, 1.0)
    deepest = log_constant(model, max(dips.lowest, least), value) - log(baseline.seen)
    usual = log_constant(model, min(dips.total / dips.steps, model.level), value)
    return length * max(deepest, usual + log(dips.steps / baseline.seen))


def _log_add(a: float, b: float) -> float:
    return a + log1p(exp(b - a)) if a > b else b + log1p(exp(a - b))


def _within_fall(model: Model, fall: Fall, value: float, length: int) -> float:
    """Nats against the run when the level to which the reward has just fallen is healthy (even odds)."""
    others = [v for _, v in fall.tail if v != value]
    if not others:
        return float("inf")
    return 0.7 - length * log_constant(model, sum(others) / len(others), value)


def stuck_nats(config: RewardConfig, model: Model, baseline: Baseline, run: Run) -> float:
    """Evidence that the value is stuck: nats against so many ties. 0 where ties are natural."""
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


def is_natural(config: RewardConfig, baseline: Baseline, run: Run) -> bool:
    """Whether so short a run cannot be stuck by the likelihood, whatever the model (a cheap bound)."""
    if run.length < 5 or run.value == 0.0 or (run.value == 1.0 and baseline.rollouts):
        return True
    return (1 - run.length) * log(max(1.3 * baseline.tie_rate, LEAST_TIE)) < config.stuck_nats


def is_sparse(model: Model | None, baseline: Baseline, zeros: int) -> bool:
    """Whether an all-zero step is an everyday event of this baseline; `zeros` in a row do not count."""
    if model is None:
        if baseline.high <= 0.0:
            return True
        others = baseline.zero_rate * (baseline.seen + 1) - zeros  # the rate began as one zero in two
        return others > 0.05 * baseline.seen + 0.5
    return max(log_constant(model, model.level, 0.0), log(max(baseline.zero_rate, 1e-12))) > log(0.05)
