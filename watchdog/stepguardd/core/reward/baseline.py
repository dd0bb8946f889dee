"""
What a healthy step looks like: its level, its noise, and how likely a value is.

Two models. Rewards that are shares of n rollouts (0/1 rewards) are Beta-binomial: the over-dispersion is
estimated, because 32 rollouts may be 4 prompts that succeed or fail together. All others have a location and
a robust scale and Student's t with 8 degrees of freedom. Which one holds is learned from the granularity of
the values.

Promises: only values that no test suspects get in; a climb is followed within a few steps and a fall slowly,
so that a lag makes the tests blinder, never trigger-happy. It does not promise a model for rewards that jump
between several healthy levels.
"""

# ruff: noqa: FURB136, PLR1730 - min() and max() cost ten comparisons each, and this runs on every step

from __future__ import annotations

from math import erfc, exp, lgamma, log, log1p, sqrt
from typing import NamedTuple

from stepguardd.core.reward.model import Baseline, Learned, Pending, RewardConfig

__all__ = [
    "LEAST_TIE",
    "Model",
    "absorb",
    "absorb_any",
    "adopt",
    "grid_size",
    "is_calm",
    "is_mature",
    "learn",
    "level_at",
    "log_any_tie",
    "log_constant",
    "model_of",
    "release",
]

_new = tuple.__new__  # without the detour through Python that a named tuple's own constructor takes

_FAST_GAIN = 0.15
_FAST_CORRECTION = (2 - _FAST_GAIN) / 2  # from the variance of an innovation to that of a value
_NOISE_MEMORY = 60.0
_SAMPLES = 24
_SETTLED = 300  # values after which a grid that explains them all is believed
_LARGEST_GRID = 4096
_DEGREES = 8.0  # of Student's t
_LOG_T_PEAK = log(0.3867)
_IMPOSSIBLE = -60.0  # nats, for what a share cannot be
_SATURATED = 0.97  # allow for three failures in a hundred even where none was seen
LEAST_TIE = 0.08
"""Ties are never rarer: a log with few decimals, or few possible rewards, ties more than modelled."""
_EXACT = 1e-6  # resolution ascribed to values that come with all their digits


class Model(NamedTuple):
    """The healthy hypothesis for one observation."""

    shares: bool
    rollouts: float
    """Shares: rollouts behind the value. Else 0."""
    effective: float
    """Shares: rollouts after the over-dispersion, the exponent of the quasi-likelihood."""
    level: float
    """The lowest level that still counts as the baseline: one standard error below the estimate."""
    near: float
    """Half a standard error below the estimate."""
    sigma: float
    """Standard deviation of one healthy value."""
    floor: float
    """What a total loss is measured from."""
    resolution: float
    """The step between neighbouring values that can be told apart."""


def model_of(config: RewardConfig, baseline: Baseline, learned: Learned, ok: int | None) -> Model | None:
    """The healthy hypothesis for the next value, or None while too little is known."""
    if baseline.seen < config.warmup_steps:
        return None
    weight = baseline.weight
    if baseline.rollouts:
        n = float(ok or baseline.rollouts)
        least = 0.5 / (n * weight)
        p = baseline.level
        if not least <= p <= 1 - least:
            p = least if p < least else 1 - least
        sigma = sqrt(p * (1 - p) / n * baseline.noise)
        # One standard error below, on the scale of the logarithm: where successes are rare the error is
        # relative.
        error = sigma / (sqrt(weight) * p)
        low = p / (1 + error + 0.5 * error * error)
        near = p / (1 + 0.5 * error)
        if near > _SATURATED:
            low, near = min(low, _SATURATED), _SATURATED
        return _new(Model, (True, n, n / baseline.noise, low, near, sigma, 0.0, 1.0 / n))
    if baseline.noise_weight < config.warmup_steps:
        return None
    resolution = max(10.0**-learned.decimals, _EXACT)
    sigma = sqrt(baseline.noise) + 0.3 * resolution
    floor = 0.0 if 0.0 <= baseline.low <= 0.5 * baseline.level else baseline.low
    error = sigma / sqrt(weight)
    level = baseline.level - error
    return _new(Model, (False, 0.0, 0.0, level, level + 0.5 * error, sigma, floor, resolution))


def is_calm(baseline: Baseline, learned: Learned, value: float) -> bool:
    """
    Whether no test can have anything against a value: near its level or above it, each one's evidence
    shrinks.

    A shortcut, not a decision: for a calm value every sum falls, and no run begins. A quarter of the reward
    gone is the nearest alternative, or the run's starting level where that is nearer; values this near speak
    against both.
    """
    level = baseline.level
    if value >= level:
        return True
    near = learned.start_sum > 0.75 * level * learned.start_n
    if baseline.rollouts:
        return value >= (0.93 if near else 0.888) * level
    return (value - level) ** 2 < 0.49 * baseline.noise


def log_constant(model: Model, level: float, value: float) -> float:
    """The log-probability that a batch at `level` scores exactly `value`, which is not far above it."""
    if model.shares:
        return _log_beta_binomial(model, min(max(level, 1e-9), 1 - 1e-9), value)
    z = (value - level) / model.sigma
    density = exp(_LOG_T_PEAK - (_DEGREES + 1) / 2 * log1p(z * z / _DEGREES)) * model.resolution / model.sigma
    clipped = _normal_tail(z)  # rewards cut off at a floor pile up there
    return log(min(1.0, density + clipped) + 1e-300)


def log_any_tie(model: Model, baseline: Baseline, value: float) -> float:
    """The log-probability that a healthy value equals the one before, when that was `value`."""
    z = (value - model.level) / model.sigma if model.sigma > 0 else 0.0
    modelled = 0.4 * exp(-0.5 * min(z * z, 50.0)) * model.resolution / max(model.sigma, model.resolution)
    return log(min(0.98, max(modelled, 1.3 * baseline.tie_rate, LEAST_TIE)))


def absorb(config: RewardConfig, baseline: Baseline, value: float, suspicious: bool) -> Baseline:
    """The baseline after one more value. Suspicious values wait until they turn out to be healthy."""
    if value and not suspicious and value != baseline.last and is_mature(baseline, config.memory_steps):
        return _absorb_mature(baseline, value, config.memory_steps)
    return absorb_any(config, baseline, value, suspicious)


def is_mature(baseline: Baseline, memory: float) -> bool:
    """Whether level and noise have their full memory, nothing is held back, and no run is going on."""
    return (
        baseline.weight == memory
        and baseline.noise_weight == _NOISE_MEMORY
        and not baseline.ties
        and baseline.pending is None
    )


def _absorb_mature(baseline: Baseline, value: float, memory: float) -> Baseline:
    """What `absorb` does to most values: the same arithmetic without its special cases."""
    seen, weight, level, fast, noise, noise_weight, n, low, high, _, tie_rate, zero_rate, _, _ = baseline
    innovation = value - fast
    square = innovation * innovation * _FAST_CORRECTION
    if n:
        edge = max(0.5 / n, 1e-12)  # 1 - edge must not round to 1
        p = fast if edge <= fast <= 1 - edge else edge
        square *= n / (p * (1 - p))
    if square > 16.0 * noise:
        square = 16.0 * noise
    fast += _FAST_GAIN * innovation
    noise += (square - noise) / noise_weight
    if noise < 0.25 and n:
        noise = 0.25
    level += (value - level) / weight
    above = fast - level
    if above > 0.0 and above * above > 0.5 * (noise * (level * (1 - level) + 0.5 / n) / n if n else noise):
        level += 0.2 * above
    keep = 1.0 - 1.0 / memory
    return _new(
        Baseline,
        (
            seen + 1,
            weight,
            level,
            fast,
            noise,
            noise_weight,
            n,
            value if value < low else low,
            value if value > high else high,
            value,
            tie_rate * keep,
            zero_rate * keep,
            0,
            None,
        ),
    )


def absorb_any(config: RewardConfig, baseline: Baseline, value: float, suspicious: bool) -> Baseline:
    """`absorb` with all its special cases: the start, ties, zeros, and values that wait or have waited."""
    seen, weight, level, fast, noise, noise_weight, n, low, high, last, tie_rate, zero_rate, ties, held = (
        baseline
    )
    if seen == 0:
        return Baseline(1, 1.0, value, value, noise, noise_weight, n, value, value, value)
    memory = config.memory_steps
    gain = 1.0 / memory if seen >= memory else 1.0 / (seen + 2.0)
    if value == last:
        ties += 1
    else:
        if ties:
            tie_rate = 1.0 - (1.0 - tie_rate) * (1.0 - gain) ** ties
            ties = 0
        tie_rate -= gain * tie_rate
    innovation = value - fast
    square = innovation * innovation * _FAST_CORRECTION
    if n:
        edge = max(0.5 / n, 1e-12)  # 1 - edge must not round to 1
        p = fast if edge <= fast <= 1 - edge else edge
        square *= n / (p * (1 - p))
    if square > 16.0 * noise and noise_weight >= 8.0:
        square = 16.0 * noise  # an outlier counts as four sigmas
    fast += _FAST_GAIN * innovation if seen > 6 else innovation / (seen + 1)
    if suspicious:
        zero = 1 if value == 0.0 else 0
        held = (
            Pending(held.size + 1, held.total + value, held.zeros + zero, held.squares + square)
            if held
            else Pending(1, value, zero, square)
        )
    else:
        if held is not None:
            weight, level, noise, noise_weight, zero_rate = _let_in(memory, baseline, held)
            held = None
        zero_rate += gain * ((1.0 if value == 0.0 else 0.0) - zero_rate)
        if noise_weight >= 1.0 or value != last:  # a constant start says nothing about the noise
            if noise_weight < _NOISE_MEMORY:
                noise_weight += 1.0
            noise += (square - noise) / noise_weight
            if noise < 0.25 and n:
                noise = 0.25
        if weight < memory:
            weight += 1.0
        level += (value - level) / weight
        # Far above its slow self the level is climbing: follow the fast one (a third of sigma is its error).
        above = fast - level
        if above > 0.0 and above * above > 0.5 * (
            noise * (level * (1 - level) + 0.5 / n) / n if n else noise
        ):
            level += 0.2 * above
    if value < low:
        low = value
    elif value > high:
        high = value
    return _new(
        Baseline,
        (
            seen + 1,
            weight,
            level,
            fast,
            noise,
            noise_weight,
            n,
            low,
            high,
            value,
            tie_rate,
            zero_rate,
            ties,
            held,
        ),
    )


def _let_in(memory: float, baseline: Baseline, held: Pending) -> tuple[float, float, float, float, float]:
    """Weight, level, noise, its weight and the rate of zeros with the values that had been held back."""
    size = held.size
    keep = (1 - 1 / memory) ** size
    zero_rate = baseline.zero_rate + (1 - keep) * (held.zeros / size - baseline.zero_rate)
    weight = baseline.weight
    if weight < memory:
        keep = weight / (weight + size)
        weight = min(memory, weight + size)
    level = baseline.level + (1 - keep) * (held.total / size - baseline.level)
    noise_weight = min(_NOISE_MEMORY, baseline.noise_weight + size)
    noise = baseline.noise + size / (noise_weight + size) * (held.squares / size - baseline.noise)
    return weight, level, noise, noise_weight, zero_rate


def release(baseline: Baseline) -> Baseline:
    """The baseline without the values that were held back: they turned out to be bad."""
    return baseline if baseline.pending is None else baseline._replace(pending=None)


def adopt(baseline: Baseline, level: float, weight: float) -> Baseline:
    """The baseline at a new level that was accepted as healthy."""
    return baseline._replace(level=level, fast=level, weight=max(1.0, weight), pending=None)


def learn(
    config: RewardConfig, baseline: Baseline, learned: Learned, step: int, value: float, ok: int | None
) -> tuple[Baseline, Learned]:
    """The baseline and the rarely changing knowledge after a healthy value: grid, start and history."""
    if not learned.decided and (value not in learned.samples or baseline.seen == _SETTLED):
        baseline, learned = _learn_grid(config, baseline, learned, value, ok)
    if learned.due < 0:
        learned = learned._replace(start_n=learned.start_n + 1, start_sum=learned.start_sum + value)
        if learned.start_n >= config.start_steps:
            learned = learned._replace(due=step)
    elif step >= learned.due:
        history, stride = (*learned.history, (step, baseline.fast)), learned.stride
        if len(history) > 32:
            history, stride = history[1::2], stride * 2
        learned = learned._replace(history=history, stride=stride, due=step + stride)
    return baseline, learned


def level_at(learned: Learned, step: int) -> float | None:
    """The level that the run had at a step, as far as it is remembered."""
    before = [level for past, level in learned.history if past <= step]
    return before[-1] if before else None


def _learn_grid(
    config: RewardConfig, baseline: Baseline, learned: Learned, value: float, ok: int | None
) -> tuple[Baseline, Learned]:
    named = ok or config.rollouts_per_step
    if named is not None:
        return _check_named(baseline, learned, value, named)
    samples = learned.samples if value in learned.samples else (*learned.samples, value)
    decimals = max(learned.decimals, _decimals(value))
    n = grid_size(samples, decimals, learned.tried, baseline.zero_rate)
    enough = len(samples) >= _SAMPLES or (n > 0 and baseline.seen >= _SETTLED)
    decided = enough or (n < 0 and len(samples) >= 8)
    learned = learned._replace(
        samples=() if decided else samples, decimals=decimals, tried=max(learned.tried, n), decided=decided
    )
    return _with_rollouts(baseline, max(n, 0)), learned


def _check_named(baseline: Baseline, learned: Learned, value: float, named: int) -> tuple[Baseline, Learned]:
    """The number of rollouts is told (and may change): are the values shares of it at all?"""
    decimals = max(learned.decimals, _decimals(value))
    slack = max(named * 0.51 * 10.0**-decimals, named * 2e-7, 0.01)
    off_grid = not 0.0 <= value <= 1.0 or abs(value * named - round(value * named)) > slack
    samples = (*learned.samples, value) if off_grid else learned.samples
    looked = learned.looked + 1
    shares = len(samples) <= 0.2 * looked
    learned = learned._replace(samples=samples, decimals=decimals, looked=looked, decided=looked >= _SAMPLES)
    return _with_rollouts(baseline, (baseline.rollouts or named) if shares else 0), learned


def _with_rollouts(baseline: Baseline, rollouts: int) -> Baseline:
    """The baseline under another model of its noise, which is learned anew from a prior."""
    if rollouts == baseline.rollouts:
        return baseline
    if rollouts:
        return baseline._replace(rollouts=rollouts, noise=1.5, noise_weight=8.0)
    return baseline._replace(rollouts=0, noise=0.0, noise_weight=0.0)


def grid_size(samples: tuple[float, ...], decimals: int, tried: int, zero_rate: float) -> int:
    """
    The n of which all samples are shares k/n; 0 when that cannot be told yet, -1 when there is none.

    Args:
        samples: distinct values.
        decimals: the most decimals that any came with; the rounding is allowed for.
        tried: the smallest n that is not yet contradicted.
        zero_rate: how often the values are exactly zero; only shares are that often.

    """
    if any(v < 0.0 or v > 1.0 for v in samples):
        return -1
    inner = [v for v in samples if v not in {0.0, 1.0}]
    if not inner:
        return 0
    slack = max(0.51 * 10.0**-decimals, 2e-7)
    for n in range(tried, min(_LARGEST_GRID, int(0.25 / slack)) + 1):
        if all(abs(v * n - round(v * n)) <= n * slack for v in inner):
            # So coarse a log, or so few values, that chance alone would explain the grid: not told yet.
            return n if zero_rate > 0.6 or n * (2 * n * slack) ** len(inner) < 0.01 else 0
    return -1


def _decimals(value: float) -> int:
    text = repr(value)
    if "e" in text:
        return 12
    return min(12, len(text.rpartition(".")[2].rstrip("0")))


def _log_beta_binomial(model: Model, p: float, value: float) -> float:
    if value < 0.0 or value > 1.0:
        return _IMPOSSIBLE
    n = model.rollouts
    k = round(value * n)
    excess = n / model.effective - 1.0  # the over-dispersion above a binomial's
    if n < 2 or excess < 0.02:
        if k == 0:
            return n * log1p(-p)
        return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) + k * log(p) + (n - k) * log1p(-p)
    rho = min(excess / (n - 1), 0.95)
    total = 1 / rho - 1
    a, b = p * total, (1 - p) * total
    result = lgamma(n - k + b) + lgamma(total) - lgamma(b) - lgamma(n + total)
    if k:
        result += lgamma(k + a) - lgamma(a) + lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
    return result


def _normal_tail(z: float) -> float:
    return 0.5 * erfc(-z * 0.7071067811865476)
