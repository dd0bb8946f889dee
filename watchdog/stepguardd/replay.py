"""
What Stepguard would have decided in a recorded run: the live judgement, over history, on a virtual clock.

Pure but for its arguments: reading files is `history`'s, printing is the command's. A trip is a decision that
would hold the trainer; after one the breaker stays open until the stream is back at the baseline from before
it, or until the run restarts from an older checkpoint. A warning is listed once per episode, at its first
step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from stepguardd.core.reasons import Reason
from stepguardd.core.reward import Kind, Level, Observation, RewardConfig, Verdict, observe, silence, start
from stepguardd.history import History

__all__ = ["Replayed", "Trip", "Warned", "as_json", "replay"]

_ACTIONS = {Kind.INFRA: "hold_and_repair", Kind.POLICY: "hold_and_call", Kind.UNKNOWN: "hold"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trip:
    """A decision that would hold the trainer."""

    step: int
    onset_step: int
    reason: Reason
    kind: Kind
    evidence: Mapping[str, float]
    index: int
    """Of the row in the history."""
    until: int
    """Index of the first row after the incident; the number of rows when it never ended."""

    @property
    def action(self) -> str:
        """What would be done about it, as a stable word."""
        return _ACTIONS[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """The first step of a warning."""

    step: int
    reason: Reason
    index: int
    until: int


@dataclass(slots=True, kw_only=True)
class Replayed:
    """What came of it. Lists in order of steps."""

    history: History
    trips: list[Trip] = field(default_factory=list)
    warnings: list[Warned] = field(default_factory=list)
    garbage_steps_avoided: int = 0
    """
    Rows from each trip on until the stream had recovered: their optimizer steps would not have been taken.
    """


@dataclass(slots=True)
class _Open:
    """An incident or a warning that is going on."""

    index: int
    verdict: Verdict
    step: int


def replay(config: RewardConfig, history: History) -> Replayed:
    """Run the judgement over a recorded run."""
    result = Replayed(history=history)
    state = start(config)
    trip: _Open | None = None
    warned: _Open | None = None
    for i, seen in enumerate(observations(history)):
        state, verdict = observe(config, state, seen)
        if verdict.level is Level.OK and trip is warned is None:
            continue
        if trip is not None and not verdict.tripped:
            result.trips.append(_trip(trip, i))
            trip = None
        if verdict.tripped and trip is None:
            trip = _Open(i, verdict, seen.step)
        if warned is not None and (state.episode is None or state.episode.first_step != warned.step):
            result.warnings.append(_warned(warned, i))
            warned = None
        if (
            warned is None
            and state.episode is not None
            and verdict.level is Level.WARN
            and not verdict.tripped
        ):
            warned = _Open(i, verdict, state.episode.first_step)
    size = len(history.steps)
    if trip is not None:
        result.trips.append(_trip(trip, size))
    if warned is not None:
        result.warnings.append(_warned(warned, size))
    result.warnings.extend(_silences(config, history))
    result.warnings.sort(key=lambda warning: warning.index)
    result.garbage_steps_avoided = sum(found.until - found.index for found in result.trips)
    return result


def observations(history: History) -> Iterator[Observation]:
    """The rows as the judgement sees them."""
    if not history.columns:
        yield from map(Observation, history.attempts, history.steps, history.values)
        return
    names = list(history.columns)
    columns = zip(*history.columns.values(), strict=True)
    for attempt, step, value, row in zip(
        history.attempts, history.steps, history.values, columns, strict=True
    ):
        metrics = {name: cell for name, cell in zip(names, row, strict=True) if cell is not None}
        yield Observation(attempt, step, value, metrics=metrics)


def as_json(result: Replayed) -> dict[str, object]:
    """The result in the shape of `stepguard replay --json`."""
    history = result.history
    return {
        "source": history.source,
        "metric": history.metric,
        "steps": len(history.steps),
        "first_step": history.steps[0],
        "last_step": history.steps[-1],
        "unknown": history.unknown,
        "trips": [
            {
                "step": trip.step,
                "onset_step": trip.onset_step,
                "reason": trip.reason.value,
                "kind": trip.kind.value,
                "action": trip.action,
                "evidence": dict(trip.evidence),
            }
            for trip in result.trips
        ],
        "warnings": [{"step": warning.step, "reason": warning.reason.value} for warning in result.warnings],
        "garbage_steps_avoided": result.garbage_steps_avoided,
    }


def _trip(opened: _Open, until: int) -> Trip:
    verdict = opened.verdict
    return Trip(
        step=opened.step,
        onset_step=opened.step if verdict.onset_step is None else verdict.onset_step,
        reason=verdict.reason,
        kind=verdict.kind,
        evidence=dict(verdict.evidence),
        index=opened.index,
        until=until,
    )


def _warned(opened: _Open, until: int) -> Warned:
    return Warned(step=opened.step, reason=opened.verdict.reason, index=opened.index, until=until)


def _silences(config: RewardConfig, history: History) -> Iterator[Warned]:
    """Where the clock of the rows stood still for too long: a warning at each silence's end."""
    if config.no_step_for_s is None:
        return
    before: float | None = None
    for i, now in enumerate(history.times):
        if now is None:
            continue
        verdict = silence(config, now - before) if before is not None else None
        if verdict is not None:
            yield Warned(step=history.steps[i], reason=verdict.reason, index=i, until=i + 1)
        before = now
