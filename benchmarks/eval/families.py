"""
Reward curves made by rule: healthy and faulty families, with every constant drawn anew for every curve.

A curve is a list of steps with the truth beside it: where the fault begins, and which steps may rightly be
warned about (the 40 after a curriculum switch). Families marked `held_out` were not looked at while the
detectors' constants were chosen. Nothing here imports the judgement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import comb, exp, lgamma

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rng = np.random.Generator

SWITCH_GRACE = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One run: what the judgement sees, and the truth."""

    steps: list[int]
    values: list[float | None]
    onset: int | None = None
    """Index of the first bad value; None: the curve is healthy."""
    switches: tuple[int, ...] = ()
    """Indices of legitimate switches."""
    columns: Mapping[str, list[float]] = field(default_factory=dict)
    before: Floats | None = None
    """The true distribution of a value's count just before the onset, where it is a count."""
    after: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A way to make curves. Goals are median delays in steps; None: no goal stands in the table."""

    name: str
    make: Callable[[Rng], Curve]
    healthy: bool
    held_out: bool = False
    alarm_goal: float | None = None
    hold_goal: float | None = None


# --- Rollouts


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of prompts x group rollouts; `spread` is the intra-prompt correlation of success."""

    prompts: int
    group: int
    spread: float

    @property
    def rollouts(self) -> int:
        return self.prompts * self.group

    def draw(self, rng: Rng, level: Floats, lost: Floats | float = 0.0) -> Floats:
        """
        The mean reward of each step at the given success rates; a share `lost` of the rollouts scores 0.
        """
        level = np.clip(level, 0.0, 1.0)
        if self.spread > 0:
            total = 1 / self.spread - 1
            p = np.clip(level, 1e-6, 1 - 1e-6)[:, None]
            rates = rng.beta(p * total, (1 - p) * total, size=(len(level), self.prompts))
            rates = np.where((level <= 0)[:, None], 0.0, np.where((level >= 1)[:, None], 1.0, rates))
        else:
            rates = np.repeat(level[:, None], self.prompts, axis=1)
        live = rng.binomial(
            self.group, 1 - np.broadcast_to(np.asarray(lost, float), level.shape)[:, None], rates.shape
        )
        return rng.binomial(live, rates).sum(axis=1) / self.rollouts

    def distribution(self, level: float, lost: float = 0.0) -> Floats:
        """The probability of each count of successes; a share `lost` of the rollouts scores 0."""
        one = np.array([_beta_binomial(k, self.group, level, self.spread) for k in range(self.group + 1)])
        if lost > 0:
            thinned = np.zeros_like(one)
            for k, mass in enumerate(one):
                thinned[: k + 1] += mass * np.array([_binomial(j, k, 1 - lost) for j in range(k + 1)])
            one = thinned
        result = np.ones(1)
        for _ in range(self.prompts):
            result = np.convolve(result, one)
        return result / result.sum()


def _binomial(k: int, n: int, p: float) -> float:
    return comb(n, k) * p**k * (1 - p) ** (n - k)


def _beta_binomial(k: int, n: int, p: float, spread: float) -> float:
    if spread <= 0 or p <= 0 or p >= 1:
        return _binomial(k, n, p)
    total = 1 / spread - 1
    a, b = p * total, (1 - p) * total
    log_beta = lgamma(k + a) + lgamma(n - k + b) - lgamma(n + total) - lgamma(a) - lgamma(b) + lgamma(total)
    return comb(n, k) * exp(log_beta)


def some_batch(rng: Rng, rollouts: int | None = None) -> Batch:
    """A batch as trainers make them: groups of 1 to 16, the prompts more or less alike."""
    n = rollouts or int(rng.choice([16, 32, 48, 64, 96, 128, 256]))
    group = int(rng.choice([g for g in (1, 4, 8, 16) if n % g == 0 and g <= n // 2] or [1]))
    spread = float(rng.choice([0.0, 0.0, rng.uniform(0.02, 0.3)])) if group > 1 else 0.0
    return Batch(n // group, group, spread)


def climb(rng: Rng, steps: int, low: float, high: float) -> Floats:
    """A learning curve from low to high: some way up an S, then a plateau."""
    middle, width = rng.uniform(0.1, 0.5) * steps, rng.uniform(0.04, 0.15) * steps
    curve = 1 / (1 + np.exp(-(np.arange(steps) - middle) / width))
    curve = (curve - curve[0]) / (curve[-1] - curve[0])
    return low + (high - low) * curve


def rounded(rng: Rng, values: Floats) -> list[float | None]:
    """As logged: all digits, six decimals, or four."""
    decimals = int(rng.choice([17, 6, 4]))
    return [float(v) if decimals == 17 else round(float(v), decimals) for v in values]


def _length(rng: Rng) -> int:
    return int(rng.integers(300, 1500))


# --- Healthy


def dense(rng: Rng) -> Curve:
    n = _length(rng)
    level = climb(rng, n, rng.uniform(0.05, 0.5), rng.uniform(0.55, 0.95))
    return Curve(steps=list(range(n)), values=rounded(rng, some_batch(rng).draw(rng, level)))


def sparse(rng: Rng) -> Curve:
    """Next to no success for hundreds of steps; then, sometimes, a breakthrough."""
    n = _length(rng)
    rate = rng.choice([0.0, 0.002, 0.01, 0.02, 0.05])
    start = int(rng.integers(100, n))
    level = np.full(n, rate)
    if rng.random() < 0.6:
        level[start:] = climb(rng, n, rate, rng.uniform(0.1, 0.9))[: n - start]
    return Curve(
        steps=list(range(n)),
        values=rounded(rng, some_batch(rng, int(rng.choice([8, 16, 32, 64]))).draw(rng, level)),
    )


def shaped(rng: Rng) -> Curve:
    n = _length(rng)
    scale, offset = 10 ** rng.uniform(-1, 2), rng.uniform(-1, 1)
    level = climb(rng, n, rng.uniform(-0.8, 0.0), rng.uniform(0.2, 0.9))
    noise = rng.normal(0, rng.uniform(0.03, 0.2), n)
    return Curve(steps=list(range(n)), values=rounded(rng, scale * (offset + level + noise)))


def curriculum(rng: Rng) -> Curve:
    """Harder tasks every few hundred steps: a fall to a level of its own, and up again."""
    level, switches = _switching(rng)
    values = some_batch(rng).draw(rng, level)
    return Curve(steps=list(range(len(values))), values=rounded(rng, values), switches=switches)


def _switching(rng: Rng) -> tuple[Floats, tuple[int, ...]]:
    parts, switches, level = [], [], rng.uniform(0.1, 0.3)
    total, target = _length(rng), rng.uniform(0.6, 0.9)
    while sum(map(len, parts)) < total:
        length = int(rng.integers(150, 500))
        parts.append(climb(rng, length, level, target))
        switches.append(sum(map(len, parts)))
        level = target * rng.uniform(0.45, 0.8)
        target = rng.uniform(level + 0.05, 0.92)
    return np.concatenate(parts), tuple(switches[:-1])


def saturated(rng: Rng) -> Curve:
    n = _length(rng)
    level = climb(rng, n, rng.uniform(0.3, 0.7), rng.choice([0.97, 0.99, 0.999, 1.0]))
    return Curve(steps=list(range(n)), values=rounded(rng, some_batch(rng).draw(rng, level)))


def tiny_batch(rng: Rng) -> Curve:
    n = _length(rng)
    level = climb(rng, n, rng.uniform(0.1, 0.5), rng.uniform(0.5, 0.95))
    batch = Batch(4, 1, 0.0) if rng.random() < 0.5 else Batch(1, 4, rng.uniform(0.0, 0.3))
    return Curve(steps=list(range(n)), values=rounded(rng, batch.draw(rng, level)))


def gaps(rng: Rng) -> Curve:
    """A dense run of which rows are missing, and others carry no value."""
    whole = dense(rng)
    kept = np.sort(rng.choice(len(whole.steps), int(0.8 * len(whole.steps)), replace=False))
    values: list[float | None] = [whole.values[i] for i in kept]
    for _ in range(int(rng.integers(1, 6))):
        at, length = int(rng.integers(0, len(values) - 20)), int(rng.integers(1, 20))
        values[at : at + length] = [None] * length
    return Curve(steps=[int(i) for i in kept], values=values)


def restarts(rng: Rng) -> Curve:
    """A run that was started again from an older checkpoint, once or twice."""
    n = _length(rng)
    level = climb(rng, n, rng.uniform(0.05, 0.5), rng.uniform(0.55, 0.95))
    order: list[int] = []
    at = 0
    cuts = sorted(int(x) for x in rng.integers(50, n, size=int(rng.integers(1, 3))))
    for cut in cuts:
        order += range(at, cut)
        at = max(0, cut - int(rng.integers(5, 120)))
    order += range(at, n)
    return Curve(steps=order, values=rounded(rng, some_batch(rng).draw(rng, level[order])))


# --- Healthy, held out


def wobble(rng: Rng) -> Curve:
    """Batches of changing difficulty: the level wanders by a few hundredths."""
    n = _length(rng)
    level = climb(rng, n, rng.uniform(0.2, 0.5), rng.uniform(0.6, 0.9))
    stay = rng.uniform(0.5, 0.95)
    walk = np.zeros(n)
    for i in range(1, n):
        walk[i] = stay * walk[i - 1] + rng.normal(0, np.sqrt(1 - stay**2))
    level = level + rng.uniform(0.01, 0.04) * walk
    return Curve(steps=list(range(n)), values=rounded(rng, some_batch(rng).draw(rng, level)))


def heavy_tails(rng: Rng) -> Curve:
    n = _length(rng)
    scale, offset = 10 ** rng.uniform(-1, 2), rng.uniform(-1, 1)
    level = climb(rng, n, rng.uniform(-0.8, 0.0), rng.uniform(0.2, 0.9))
    noise = rng.standard_t(5, n) * rng.uniform(0.03, 0.12)
    return Curve(steps=list(range(n)), values=rounded(rng, scale * (offset + level + noise)))


def partial_credit(rng: Rng) -> Curve:
    """Rewards between 0 and 1 that are no shares, cut off at both ends."""
    n = _length(rng)
    level = climb(rng, n, rng.uniform(0.05, 0.4), rng.uniform(0.5, 1.0))
    return Curve(
        steps=list(range(n)),
        values=rounded(rng, np.clip(level + rng.normal(0, rng.uniform(0.02, 0.12), n), 0, 1)),
    )


def seasons(rng: Rng) -> Curve:
    """The same prompts in the same order every epoch: a period in the level."""
    n = _length(rng)
    level = climb(rng, n, rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.9))
    period = int(rng.integers(10, 120))
    level = level + rng.uniform(0.01, 0.05) * np.sin(2 * np.pi * np.arange(n) / period)
    return Curve(steps=list(range(n)), values=rounded(rng, some_batch(rng).draw(rng, level)))


def sparse_groups(rng: Rng) -> Curve:
    """Few successes, and those in bunches: a prompt is solved by its whole group or not at all."""
    n = _length(rng)
    rate = rng.uniform(0.01, 0.15)
    return Curve(steps=list(range(n)), values=rounded(rng, Batch(4, 8, 0.6).draw(rng, np.full(n, rate))))


def slow_decline(rng: Rng) -> Curve:
    """A policy that loses a tenth over hundreds of steps."""
    n = _length(rng)
    level = np.linspace(rng.uniform(0.7, 0.9), rng.uniform(0.55, 0.65), n)
    return Curve(steps=list(range(n)), values=rounded(rng, some_batch(rng).draw(rng, level)))


def curriculum_shaped(rng: Rng) -> Curve:
    """The same with a shaped reward in a range of its own."""
    level, switches = _switching(rng)
    scale, offset = 10 ** rng.uniform(-1, 2), rng.uniform(-1, 1)
    values = scale * (offset + 1.5 * level + rng.normal(0, rng.uniform(0.03, 0.15), len(level)))
    return Curve(steps=list(range(len(values))), values=rounded(rng, values), switches=switches)


def curriculum_small(rng: Rng) -> Curve:
    """The same with 8 or 16 rollouts."""
    level, switches = _switching(rng)
    values = Batch(int(rng.choice([8, 16])), 1, 0.0).draw(rng, level)
    return Curve(steps=list(range(len(values))), values=rounded(rng, values), switches=switches)


# --- Faulty


def _run_up(rng: Rng, low: float, high: float) -> tuple[int, Floats]:
    onset = int(rng.integers(80, 400))
    return onset, climb(rng, onset, low, high)


def _faulty(
    rng: Rng, batch: Batch, good: Floats, bad: Floats, *, lost: float = 0.0, witness: bool = False
) -> Curve:
    onset = len(good)
    level = np.concatenate([good, bad])
    gone = np.concatenate([np.zeros(onset), np.full(len(bad), lost)])
    values = batch.draw(rng, level, gone)
    columns = {}
    if witness:
        usual = rng.uniform(0.0, 0.02)
        aborted = rng.binomial(batch.rollouts, np.clip(gone + usual, 0, 1)) / batch.rollouts
        columns["rollout/aborted_ratio"] = [float(v) for v in aborted]
    return Curve(
        steps=list(range(len(values))),
        values=rounded(rng, values),
        onset=onset,
        columns=columns,
        before=batch.distribution(float(good[-1])),
        after=batch.distribution(float(bad[0]), lost),
    )


def crash(rng: Rng) -> Curve:
    onset, good = _run_up(rng, rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.9))
    del onset
    return _faulty(rng, some_batch(rng, int(rng.choice([32, 64, 128]))), good, np.zeros(120))


def crash_sparse(rng: Rng) -> Curve:
    """A crash at a success rate of about 8 %, 32 rollouts."""
    good = np.full(int(rng.integers(120, 400)), rng.uniform(0.07, 0.09))
    return _faulty(rng, Batch(32, 1, 0.0), good, np.zeros(120))


def nan(rng: Rng) -> Curve:
    whole = crash(rng)
    assert whole.onset is not None
    values: list[float | None] = [*whole.values[: whole.onset], *[float("nan")] * 60]
    return Curve(steps=list(range(len(values))), values=values, onset=whole.onset)


def floor_shaped(rng: Rng) -> Curve:
    onset, good = _run_up(rng, rng.uniform(-0.7, 0.0), rng.uniform(0.3, 0.8))
    noise = rng.normal(0, rng.uniform(0.05, 0.15), onset)
    values = np.concatenate([np.maximum(good + noise, -1), np.full(100, -1.0)])
    return Curve(steps=list(range(len(values))), values=rounded(rng, values), onset=onset)


def _half(rng: Rng, witness: bool) -> Curve:
    _, good = _run_up(rng, rng.uniform(0.1, 0.4), rng.uniform(0.65, 0.9))
    group = int(rng.choice([1, 4]))
    batch = Batch(32 // group, group, 0.0)
    return _faulty(rng, batch, good, np.full(120, good[-1]), lost=rng.uniform(0.47, 0.55), witness=witness)


def half_lost(rng: Rng) -> Curve:
    return _half(rng, witness=False)


def half_lost_witness(rng: Rng) -> Curve:
    return _half(rng, witness=True)


def _quarter(rng: Rng, witness: bool) -> Curve:
    _, good = _run_up(rng, rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.9))
    batch = Batch(32, 8, float(rng.choice([0.0, 0.1, 0.2])))
    return _faulty(rng, batch, good, np.full(120, good[-1]), lost=rng.uniform(0.23, 0.28), witness=witness)


def quarter_lost(rng: Rng) -> Curve:
    return _quarter(rng, witness=False)


def quarter_lost_witness(rng: Rng) -> Curve:
    return _quarter(rng, witness=True)


def stale(rng: Rng) -> Curve:
    """A restarted server with the base weights: the level of the run's first steps."""
    base = rng.uniform(0.2, 0.45)
    onset = int(rng.integers(120, 400))
    good = np.concatenate([np.full(12, base), climb(rng, onset, base, rng.uniform(0.7, 0.9))])
    return _faulty(rng, Batch(32, 1, 0.0), good, np.full(120, base))


def stuck(rng: Rng) -> Curve:
    whole = crash(rng)
    assert whole.onset is not None
    # Stuck at a perfect 1 is what saturation looks like too: no curve could tell.
    last = next(value for value in reversed(whole.values[: whole.onset]) if value != 1.0)
    values = [*whole.values[: whole.onset], *[last] * 80]
    return Curve(steps=list(range(len(values))), values=values, onset=whole.onset)


def decay(rng: Rng) -> Curve:
    _, good = _run_up(rng, rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.9))
    bad = np.concatenate([good[-1] * (1 - np.arange(1, 41) / 40), np.zeros(60)])
    return _faulty(rng, Batch(32, 1, 0.0), good, bad)


# --- Faulty, held out


def crash_bunched(rng: Rng) -> Curve:
    """A crash of a run whose prompts succeed or fail together."""
    _, good = _run_up(rng, rng.uniform(0.2, 0.4), rng.uniform(0.6, 0.85))
    return _faulty(rng, Batch(4, 8, 0.2), good, np.zeros(100))


def crash_tiny(rng: Rng) -> Curve:
    _, good = _run_up(rng, rng.uniform(0.2, 0.5), rng.uniform(0.65, 0.9))
    return _faulty(rng, Batch(4, 1, 0.0), good, np.zeros(100))


def crash_partial_credit(rng: Rng) -> Curve:
    onset, good = _run_up(rng, rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.9))
    values = np.concatenate(
        [np.clip(good + rng.normal(0, rng.uniform(0.03, 0.1), onset), 0, 1), np.zeros(100)]
    )
    return Curve(steps=list(range(len(values))), values=rounded(rng, values), onset=onset)


def constant_low(rng: Rng) -> Curve:
    """A grader that answers the same low score for everything."""
    whole = crash(rng)
    assert whole.onset is not None
    values = [*whole.values[: whole.onset], *[0.125] * 80]
    return Curve(steps=list(range(len(values))), values=values, onset=whole.onset)


def policy_collapse(rng: Rng) -> Curve:
    """An exponential fall to a few hundredths within a few dozen steps."""
    _, good = _run_up(rng, rng.uniform(0.1, 0.4), rng.uniform(0.7, 0.95))
    bad = np.maximum(good[-1] * np.exp(-np.arange(1, 101) / rng.uniform(4, 12)), rng.uniform(0.0, 0.03))
    return _faulty(rng, some_batch(rng, 64), good, bad)


def half_lost_shaped(rng: Rng) -> Curve:
    onset, good = _run_up(rng, rng.uniform(-0.5, 0.0), rng.uniform(0.4, 0.8))
    sigma = rng.uniform(0.05, 0.12)
    mixed = 0.5 * good[-1] - 0.5
    values = np.concatenate([good + rng.normal(0, sigma, onset), mixed + rng.normal(0, sigma, 100)])
    return Curve(steps=list(range(len(values))), values=rounded(rng, values), onset=onset)


def floor_scaled(rng: Rng) -> Curve:
    """A shaped reward in an odd range that drops to one constant."""
    onset, good = _run_up(rng, rng.uniform(-0.7, 0.0), rng.uniform(0.3, 0.8))
    scale, offset = 10 ** rng.uniform(0, 2), rng.uniform(-2, 2)
    values = np.concatenate([good + rng.normal(0, rng.uniform(0.05, 0.12), onset), np.full(100, -1.2)])
    return Curve(steps=list(range(len(values))), values=rounded(rng, scale * (offset + values)), onset=onset)


HEALTHY = tuple(
    Family(name=make.__name__, make=make, healthy=True, held_out=held_out)
    for held_out, makes in (
        (False, (dense, sparse, shaped, curriculum, saturated, tiny_batch, gaps, restarts)),
        (
            True,
            (
                wobble,
                heavy_tails,
                partial_credit,
                seasons,
                sparse_groups,
                slow_decline,
                curriculum_shaped,
                curriculum_small,
            ),
        ),
    )
    for make in makes
)

FAULTY = (
    Family(name="crash", make=crash, healthy=False, alarm_goal=0, hold_goal=0),
    Family(name="nan", make=nan, healthy=False, alarm_goal=0, hold_goal=0),
    Family(name="floor_shaped", make=floor_shaped, healthy=False, alarm_goal=0, hold_goal=0),
    Family(name="crash_sparse", make=crash_sparse, healthy=False, alarm_goal=6, hold_goal=6),
    Family(name="half_lost", make=half_lost, healthy=False, alarm_goal=1),
    Family(name="half_lost_witness", make=half_lost_witness, healthy=False, alarm_goal=1, hold_goal=1),
    Family(name="quarter_lost", make=quarter_lost, healthy=False, alarm_goal=4),
    Family(name="quarter_lost_witness", make=quarter_lost_witness, healthy=False, alarm_goal=4, hold_goal=2),
    Family(name="stale", make=stale, healthy=False, alarm_goal=1, hold_goal=5),
    Family(name="stuck", make=stuck, healthy=False, alarm_goal=9),
    Family(name="decay", make=decay, healthy=False, alarm_goal=15, hold_goal=35),
    *(
        Family(name=make.__name__, make=make, healthy=False, held_out=True)
        for make in (
            crash_bunched,
            crash_tiny,
            crash_partial_credit,
            constant_low,
            policy_collapse,
            half_lost_shaped,
            floor_scaled,
        )
    ),
)
