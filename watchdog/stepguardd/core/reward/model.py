"""
The words of the judgement: its settings, what it sees, what it says, and what it remembers.

Everything here is a value: frozen, of bounded size, and made of numbers, strings, enums and tuples alone, so
that the journal can write a state down as JSON and read the same state back. The state is made of named
tuples, not of dataclasses, because it is built anew on every step and replay judges 100,000 steps a second.
No number in a state is NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from math import log
from types import MappingProxyType
from typing import NamedTuple

from stepguardd.core.reasons import Reason

__all__ = [
    "Baseline",
    "Dips",
    "Episode",
    "Fall",
    "Kind",
    "Learned",
    "Level",
    "Observation",
    "Pending",
    "RewardConfig",
    "RewardState",
    "Run",
    "Spread",
    "Switched",
    "Track",
    "Trip",
    "Verdict",
    "Witness",
    "Witnesses",
]

# How the two budgets of false alarms are shared out among the tests: a test with the share s gets the
# threshold log(budget / s), so that all of them together keep the budget.
_HOLD_SHARE_RUN = 0.5
_HOLD_SHARE_OTHER = 0.125  # near the floor, starting level, decay and witnessed loss have one of these each
_WARN_SHARE_FALL = 0.5
_WARN_SHARE_STUCK = 0.25


class Level(IntEnum):
    """How bad it is. HOLD means: no optimizer step on this batch."""

    OK = 0
    WARN = 1
    HOLD = 2


class Kind(StrEnum):
    """Whose fault it is: the machinery's, the policy's, or not decidable from what was seen."""

    INFRA = "infra"
    POLICY = "policy"
    UNKNOWN = "unknown"


class Witness(StrEnum):
    """What the other plane (servers, weights) says at the moment of an observation."""

    SERVER_UNHEALTHY = "server_unhealthy"
    """A server is dead, hanging, restarting or failing requests."""
    SERVERS_HEALTHY = "servers_healthy"
    """Every server is watched and proven healthy. Not the opposite of the above: unknown is neither."""
    WEIGHTS_SUSPECT = "weights_suspect"
    """A server's weights are not proven current."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """
    The settings of the judgement. The defaults are meant to be left alone.

    Raises:
        ValueError: a value is out of its range; the message names the key.

    """

    false_alarm_steps: float = 1_000_000.0
    """Budget for holds: at most one false hold in so many healthy steps, over all tests together."""
    warning_alarm_steps: float = 20_000.0
    """The same for warnings."""
    rollouts_per_step: int | None = None
    """Rollouts behind one reward value. None: the guard's counts, else the granularity of the values."""
    zero_streak_warn: int | None = 5
    """Plain rule: warn after so many exact zeros in a row (off while the baseline itself is sparse)."""
    zero_streak_hold: int | None = 10
    """Plain rule: hold after so many exact zeros in a row (off while the baseline itself is sparse)."""
    min_reward: float | None = None
    """Plain rule: hold below this reward. None: off."""
    no_step_for_s: float | None = None
    """
    Plain rule: a warning after so many seconds without a row. None: off (the stall detector learns its own).
    """
    unknown_streak_warn: int = 50
    """Warn after so many rows in a row without a value."""
    memory_steps: float = 50.0
    """How many steps the baseline remembers. Longer: surer and slower to follow a healthy change."""
    warmup_steps: int = 5
    """Steps before the first likelihood test. NaN and the plain rules need none."""
    start_steps: int = 10
    """How many first steps make up the run's starting level."""
    curriculum_grace_steps: int = 30
    """
    After a fall to a new level: steps in which a hold needs a second witness; then the level is accepted.
    """
    legitimate_fall: float = 0.4
    """The smallest share of its level that a legitimate switch (curriculum, data) leaves of the reward."""
    switch_every_steps: float = 1000.0
    """How often a legitimate switch is to be expected. Its likelihood is part of what 'healthy' means."""

    run_nats: float = field(init=False)
    """Threshold of the constant-run test, in nats."""
    hold_nats: float = field(init=False)
    """Threshold of each other test that may hold, in nats."""
    warn_nats: float = field(init=False)
    """Threshold of the warning for a fall, in nats."""
    stuck_nats: float = field(init=False)
    """Threshold of the warning for a stuck value, in nats."""

    def __post_init__(self) -> None:
        positive = ("false_alarm_steps", "warning_alarm_steps", "memory_steps", "switch_every_steps")
        for name in positive:
            if not getattr(self, name) > 1:
                raise ValueError(f"{name} must be more than 1, not {getattr(self, name)!r}")
        for name in ("rollouts_per_step", "zero_streak_warn", "zero_streak_hold"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value!r}")
        for name in ("unknown_streak_warn", "warmup_steps", "start_steps", "curriculum_grace_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        if not 0 < self.legitimate_fall < 1:
            raise ValueError(f"legitimate_fall must lie between 0 and 1, not {self.legitimate_fall!r}")
        if self.no_step_for_s is not None and not self.no_step_for_s > 0:
            raise ValueError(f"no_step_for_s must be more than 0, not {self.no_step_for_s!r}")
        put = object.__setattr__
        put(self, "run_nats", log(self.false_alarm_steps / _HOLD_SHARE_RUN))
        put(self, "hold_nats", log(self.false_alarm_steps / _HOLD_SHARE_OTHER))
        put(self, "warn_nats", log(self.warning_alarm_steps / _WARN_SHARE_FALL))
        put(self, "stuck_nats", log(self.warning_alarm_steps / _WARN_SHARE_STUCK))


_NO_METRICS: Mapping[str, float] = MappingProxyType({})


class Spread(NamedTuple):
    """The spread of the rollouts' rewards within one step."""

    std: float
    low: float
    high: float


class Observation(NamedTuple):
    """One step's batch as the judgement sees it; a refused batch that is rolled out again is a new one."""

    attempt: int
    """Grows with every rollback and relaunch; steps may then start lower."""
    step: int
    value: float | None
    """The mean reward. None is unknown; NaN and infinities are themselves."""
    ok: int | None = None
    """Live rollouts behind the value, as the guard counted them. None: no guard."""
    failed: int | None = None
    """Failed rollouts of the batch, as the guard counted them. None: no guard."""
    spread: Spread | None = None
    metrics: Mapping[str, float] = _NO_METRICS
    """Other metrics of the step under their canonical names: loss, grad_norm, entropy, kl, response_length,
    clip_ratio, aborted_ratio, logprob_diff, reward_std. Others are ignored."""
    witnesses: frozenset[Witness] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the judgement says about one observation."""

    level: Level = Level.OK
    reason: Reason = Reason.OK
    kind: Kind = Kind.UNKNOWN
    onset_step: int | None = None
    """The maximum-likelihood first bad step. None when there is nothing bad, or no estimate."""
    evidence: tuple[tuple[str, float], ...] = ()
    """The figures behind it, by name."""
    tripped: bool = False
    """An incident that this judgement held for has not ended yet: the stream is not back at its baseline."""
    recovered: bool = False
    """With this observation the stream is back at the baseline from before the incident."""


class Pending(NamedTuple):
    """Values held back because a test is suspicious of them; they get in together once it no longer is."""

    size: int
    total: float
    zeros: int
    squares: float
    """Their squared innovations, in the unit of the noise."""


class Baseline(NamedTuple):
    """What a healthy step looks like, learned from healthy steps only."""

    seen: int = 0
    """Values seen so far."""
    weight: float = 0.0
    """How many steps the level rests on; at most the memory."""
    level: float = 0.0
    fast: float = 0.0
    """The level with a short memory, for the noise and for following a climb."""
    noise: float = 0.0
    """Shares: the over-dispersion (variance over binomial variance). Else: the variance of a value."""
    noise_weight: float = 0.0
    """How many steps the noise rests on, its prior included."""
    rollouts: int = 0
    """
    Rollouts behind a value when values are shares of them; 0: values are not shares, or it is not known yet.
    """
    low: float = 0.0
    high: float = 0.0
    last: float | None = None
    tie_rate: float = 0.5
    """How often a value equals the one before."""
    zero_rate: float = 0.5
    """How often a value is exactly zero, with the memory of the level."""
    ties: int = 0
    """Ties of the run that is going on; they count towards `tie_rate` when it ends."""
    pending: Pending | None = None


class Dips(NamedTuple):
    """Falls that the run came back from by itself, without a hold: what it is used to."""

    number: int
    steps: int
    """That all of them lasted together."""
    total: float
    """The sum of the values in them."""
    lowest: float
    """The mean of the deepest."""
    longest: int
    """Steps of the longest."""
    last_step: int


class Learned(NamedTuple):
    """What changes rarely: the grid of the values, the run's start, and the level at past steps."""

    samples: tuple[float, ...] = ()
    """Distinct values seen, while the grid is not decided (at most 24)."""
    decimals: int = 0
    """The most decimals that a value came with, at most 12."""
    tried: int = 1
    """The smallest grid not yet contradicted."""
    decided: bool = False
    looked: int = 0
    start_n: int = 0
    start_sum: float = 0.0
    switches: int = 0
    """Falls to new levels that were accepted: such a run falls for legitimate reasons."""
    dips: Dips | None = None
    history: tuple[tuple[int, float], ...] = ()
    """The level at past steps, thinned out (at most 32)."""
    stride: int = 8
    due: int = -1
    """
    The step from which the history wants its next entry; below 0 while the start is still being learned.
    """


Switched = tuple[float, float, float]


class Run(NamedTuple):
    """The same number again and again, far below the baseline or simply stuck."""

    value: float
    length: int
    first_step: int
    plain: float = 0.0
    """Nats against: the healthy baseline gives this run."""
    switched: Switched | None = None
    """Log-likelihoods of the run after legitimate switches to lower levels."""
    rollouts: int = 0
    evidence: float = 0.0
    """Nats in all."""


class Fall(NamedTuple):
    """The cumulative sums against four ways to fall, and the values since they left zero."""

    half: float = 0.0
    quarter: float = 0.0
    start: float = 0.0
    near: float = 0.0
    """Near the floor, with every legitimate switch as the healthy hypothesis."""
    tail: tuple[tuple[int, float], ...] = ()
    """(step, value) since the suspicion began (at most 64)."""
    active: bool = False
    """The warning has been given."""
    onset: int = 0
    age: int = 0
    """Values since the warning."""


class Track(NamedTuple):
    """One other metric: its location, its scale and what it did lately."""

    name: str
    known: int = 0
    """Observations that the mean rests on; at most its memory counts."""
    mean: float = 0.0
    scale: float = 0.0
    z: float = 0.0
    """The last innovation in scales."""
    high_for: int = 0
    """Observations in a row far from the mean, negative when below it."""
    moved_ago: int = -1
    """Observations since it last moved far; -1: never."""


class Witnesses(NamedTuple):
    """The second witnesses, in nats; they fade over a few steps."""

    infra: float = 0.0
    weights: float = 0.0
    complete: bool = False
    """The last counts said that all rollouts completed."""


class Episode(NamedTuple):
    """A warning that is still going on."""

    reason: Reason
    first_step: int
    quiet: int = 0
    """Steps since it was last warranted."""


class Trip(NamedTuple):
    """An incident that was held for and has not ended."""

    reason: Reason
    kind: Kind
    step: int
    onset_step: int
    level: float | None
    """The level during the incident; None when the value was not a number."""
    back_nats: float = 0.0
    """Evidence that the stream is back at the baseline."""
    accepted: int | None = None
    """
    Values since a person let it go, which say what was meant: mended, or right as it is. None: nobody did.
    """


class RewardState(NamedTuple):
    """
    All that the judgement remembers. While nothing is going on, the fields after `learned` are at their
    defaults.
    """

    attempt: int = 0
    step: int | None = None
    baseline: Baseline = Baseline()
    learned: Learned = Learned()
    run: Run | None = None
    fall: Fall | None = None
    tracks: tuple[Track, ...] = ()
    witnesses: Witnesses | None = None
    unknown_streak: int = 0
    same_spread: int = 0
    """Steps in a row whose rollouts all scored the same."""
    episode: Episode | None = None
    trip: Trip | None = None
