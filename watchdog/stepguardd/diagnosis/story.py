"""
What a recorded run says about one incident: how the reward fell, what it did then, and what else moved.

Pure: rows in, evidence out. Every line carries its step, its column and its figures. Nothing is said about a
column that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from statistics import fmean, median, pstdev

from stepguardd.core.diagnosis import Evidence, Fact
from stepguardd.core.reasons import Reason
from stepguardd.history import History

__all__ = ["Incident", "Story"]

_BEFORE = 20  # rows that make up "before"
_AFTER = 20
_START = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Which rows of a history an incident covers."""

    reason: Reason
    first: int
    """Index of the onset."""
    seen: int
    """Index of the row at which it was held or warned about."""
    until: int
    """Index of the first row after it."""


class Story:
    """One incident in one history."""

    def __init__(self, history: History, incident: Incident) -> None:
        self._history, self._incident = history, incident
        values = history.values
        first = incident.first
        self._source = history.source.rpartition("/")[2]
        before = [v for v in values[max(0, first - _BEFORE) : first] if v is not None and isfinite(v)]
        start = [v for v in values[: max(1, first)] if v is not None and isfinite(v)][:_START]
        self._baseline = fmean(before) if before else None
        self._start = fmean(start) if start else None
        self._constant, self._constant_for = self._run_of_constants()

    @property
    def garbage_steps(self) -> int:
        """Steps that were trained on nothing: the constant or not finite stretch, else the whole incident."""
        incident = self._incident
        if self._constant_for:
            return self._constant_for
        return incident.until - incident.first

    def evidence(self) -> Iterator[Evidence]:
        """Everything that this history says."""
        yield from self._fall()
        yield from self._return()
        yield from self._metrics()
        yield from self._going_on()
        yield from self._pace()

    def summary(self) -> str:
        """What happened, in one sentence for a person."""
        incident, history = self._incident, self._history
        step = history.steps[incident.first]
        level = "" if self._baseline is None else f" from {self._baseline:.3g}"
        if self._constant_for and self._constant is not None:
            last = history.steps[incident.first + self._constant_for - 1]
            told = (
                f"At step {step} the reward went{level} to exactly {self._constant:.3g} and stayed there "
                f"until step {last}: {self._constant_for} steps trained on nothing."
            )
            for back in self._return():
                told += f" From {back.time} on {back.text}: stale base weights."
            return told
        if self._constant_for:
            size = self._constant_for
            return f"From step {step} on the reward was no number: {size} steps trained on nothing."
        end = self._mean(incident.first, incident.first + _AFTER)
        to = "" if end is None else f" to about {end:.3g}"
        return f"From step {step} on the reward fell{level}{to} ({incident.reason.value})."

    # --- The reward

    def _run_of_constants(self) -> tuple[float | None, int]:
        """The number at which the reward stood from the onset on (None: no number), and for how many rows."""
        values, first = self._history.values, self._incident.first
        value = values[first]
        if value is None:
            return None, 0
        if not isfinite(value):
            return None, _length(lambda v: v is not None and not isfinite(v), values[first:])
        size = _length(lambda v: v == value, values[first:])
        return (value, size) if size >= 3 or self._incident.reason is Reason.REWARD_COLLAPSE else (None, 0)

    def _fall(self) -> Iterator[Evidence]:
        incident = self._incident
        at = incident.first
        baseline = "" if self._baseline is None else f"{self._baseline:.3g} → "
        if self._constant_for and self._constant is None:
            text = f"the reward is not a number for {self._constant_for} rows"
            yield self._piece(Fact.NOT_FINITE, at, text)
            return
        if self._constant_for and self._constant is not None:
            fell = self._baseline is not None and self._constant < 0.5 * self._baseline
            if fell and incident.reason not in {Reason.REWARD_STUCK, Reason.REWARD_DECAY}:
                text = f"the reward fell {baseline}exactly {self._constant:.3g} within one step"
                yield self._piece(Fact.FELL_TO_CONSTANT, at, text)
                if self._constant_for >= 5:
                    text = f"it stayed at exactly {self._constant:.3g} for {self._constant_for} steps"
                    yield self._piece(Fact.STAYED_CONSTANT, at, text)
                return
            text = f"the same number {self._constant:.6g} for {self._constant_for} steps"
            yield self._piece(Fact.STUCK, at, text)
            return
        after = self._mean(at, at + _AFTER)
        figures = (
            "" if after is None else f"{baseline}{after:.3g} over {min(_AFTER, incident.until - at)} steps"
        )
        match incident.reason:
            case Reason.REWARD_START_LEVEL | Reason.REWARD_LEVEL_FALL if self._is_at_start(after):
                start = f", and the run started at {self._start:.3g}" if self._start is not None else ""
                yield self._piece(Fact.FELL_TO_START, at, f"the reward fell {figures}{start}")
            case Reason.REWARD_DECAY | Reason.REWARD_COLLAPSE:
                yield self._piece(Fact.DECAYED, at, f"the reward faded {figures}")
            case Reason.REWARD_VARIANCE_COLLAPSE:
                yield self._piece(Fact.SAME_SCORES, at, "all rollouts of a step scored the same")
            case Reason.REWARD_MISSING:
                yield self._piece(Fact.MISSING, at, f"no reward for {incident.until - at} rows")
            case Reason.LOSS_NOT_FINITE | Reason.GRAD_NOT_FINITE | Reason.REWARD_NOT_FINITE:
                pass  # the metrics say it
            case Reason.ABORTED_RATIO | Reason.LOGPROB_MISMATCH | Reason.ENTROPY_SHIFT | Reason.KL_SHIFT:
                pass
            case _:
                yield self._piece(Fact.LEVEL_FELL, at, f"the reward fell {figures}")

    def _is_at_start(self, level: float | None) -> bool:
        """Whether a level is the one of the run's first steps, and the run had come far from there."""
        base, start = self._baseline, self._start
        if level is None or base is None or start is None or base - start < 0.15 * abs(base):
            return False
        return abs(level - start) <= 0.2 * (base - start)

    def _return(self) -> Iterator[Evidence]:
        """Did the reward come back, but only to about where the run had started?"""
        incident, base, start = self._incident, self._baseline, self._start
        if not self._constant_for or self._constant is None or base is None or start is None:
            return
        begin = incident.first + self._constant_for
        floor = self._constant + 0.15 * (base - self._constant)
        back = [
            (i, v)
            for i, v in enumerate(self._history.values[begin:], start=begin)
            if v is not None and isfinite(v) and v > floor
        ]
        if not back:
            return
        level = median(v for _, v in back)
        # About the level of the first steps, and clearly below the one from before the fall.
        if level <= start + 0.4 * (base - start) and level <= 0.8 * base:
            lowest, highest = min(v for _, v in back), max(v for _, v in back)
            text = (
                f"the reward came back {len(back)} times to {lowest:.2f}–{highest:.2f}, about the base "
                f"model's level (the run started at {start:.2f}), not to the {base:.2f} from before"
            )
            yield self._piece(Fact.BACK_AT_START, back[0][0], text)

    # --- What else was logged

    def _metrics(self) -> Iterator[Evidence]:
        at = self._incident.first
        for name, label in (("loss", "the loss"), ("grad_norm", "the gradient norm")):
            column = self._history.columns.get(name, [])
            bad = next(
                (i for i, v in enumerate(column) if i >= at - 1 and v is not None and not isfinite(v)), None
            )
            if bad is not None:
                yield self._piece(Fact.LOSS_NOT_FINITE, bad, f"{label} is {column[bad]}", name)
        yield from self._moved("entropy", Fact.POLICY_MOVED, 0.4)
        yield from self._moved("kl", Fact.POLICY_MOVED, 2.0)
        yield from self._moved("logprob_diff", Fact.LOGPROB_UP, 1.0, upwards=True)
        yield from self._lengths()
        yield from self._failures()
        yield from self._gpu_memory()

    def _moved(self, name: str, fact: Fact, share: float, *, upwards: bool = False) -> Iterator[Evidence]:
        """A metric whose level changed by more than a share of itself and five of its spreads."""
        before, after = self._around(name)
        if len(before) < 5 or not after:
            return
        level, now = fmean(before), fmean(after)
        spread = max(pstdev(before), 0.02 * abs(level), 1e-6)
        change = now - level
        if abs(change) > share * abs(level) and abs(change) > 5 * spread and (change > 0 or not upwards):
            text = f"{name} went {level:.3g} → {now:.3g}"
            yield self._piece(fact, self._incident.first, text, name)

    def _lengths(self) -> Iterator[Evidence]:
        before, after = self._around("response_length")
        if len(before) < 5 or not after:
            return
        level, now = fmean(before), fmean(after)
        at = self._incident.first
        if now < 0.1 * level:
            yield self._piece(
                Fact.LENGTH_GONE, at, f"response length went {level:.4g} → {now:.4g}", "response_length"
            )
        elif abs(now - level) < 0.15 * abs(level) and self._incident.reason in {
            Reason.REWARD_COLLAPSE,
            Reason.REWARD_STUCK,
            Reason.REWARD_VARIANCE_COLLAPSE,
        }:
            text = f"response length stayed: {level:.4g} before, {now:.4g} after"
            yield self._piece(Fact.LENGTH_STEADY, at, text, "response_length")

    def _failures(self) -> Iterator[Evidence]:
        before, after = self._around("aborted_ratio")
        if not after:
            return
        usual, now = (fmean(before) if before else 0.0), fmean(after)
        at = self._incident.first
        if now > usual + 0.05:
            text = f"the share of aborted rollouts went {usual:.3g} → {now:.3g}"
            yield self._piece(Fact.ABORTED_UP, at, text, "aborted_ratio")
        elif now <= 0.02:
            yield self._piece(
                Fact.COMPLETE, at, f"all rollouts completed (aborted {now:.3g})", "aborted_ratio"
            )

    def _gpu_memory(self) -> Iterator[Evidence]:
        column = [v for v in self._history.columns.get("gpu_memory", []) if v is not None and isfinite(v)]
        if len(column) >= 20 and max(column) - min(column) <= 0.05 * max(column):
            text = f"GPU memory flat at {min(column):.3g}–{max(column):.3g}"
            yield self._piece(Fact.GPU_MEMORY_FLAT, self._incident.first, text, "gpu_memory")

    def _going_on(self) -> Iterator[Evidence]:
        """Whether the trainer went on stepping through the incident."""
        incident = self._incident
        rows = incident.until - incident.first
        broken = any(
            v is not None and not isfinite(v)
            for name in ("loss", "grad_norm")
            for v in self._history.columns.get(name, [])[incident.first : incident.until]
        )
        if rows >= 10 and not broken:
            text = f"the trainer took {rows} more steps without an error"
            yield self._piece(Fact.TRAINING_WENT_ON, incident.first, text)

    def _pace(self) -> Iterator[Evidence]:
        times = self._history.times
        first = self._incident.first
        if not times:
            return
        before, after = _gaps(times[max(0, first - 50) : first]), _gaps(times[first + 1 : first + 51])
        if len(before) < 10 or len(after) < 5:
            return
        usual, now = median(before), median(after)
        if usual > 0 and now < 0.5 * usual:
            yield self._piece(
                Fact.STEPS_FASTER, first, f"a step took {usual:.3g} s before and {now:.3g} s after"
            )
        elif usual > 0 and now > 2.0 * usual:
            yield self._piece(
                Fact.STEPS_SLOWER, first, f"a step took {usual:.3g} s before and {now:.3g} s after"
            )

    # --- Small things

    def _piece(self, fact: Fact, at: int, text: str, column: str | None = None) -> Evidence:
        source = f"{self._source} ({column or self._history.metric})"
        return Evidence(fact=fact, time=f"step {self._history.steps[at]}", source=source, text=text)

    def _mean(self, begin: int, end: int) -> float | None:
        end = min(end, max(self._incident.until, begin + 1))
        values = [v for v in self._history.values[begin:end] if v is not None and isfinite(v)]
        return fmean(values) if values else None

    def _around(self, name: str) -> tuple[list[float], list[float]]:
        """A column's finite values in the rows before the onset, and in the first rows of the incident."""
        column = self._history.columns.get(name, [])
        first, until = self._incident.first, self._incident.until
        before = [v for v in column[max(0, first - _BEFORE) : first] if v is not None and isfinite(v)]
        after = [v for v in column[first : min(until, first + _AFTER)] if v is not None and isfinite(v)]
        return before, after


def _length(holds: Callable[[float | None], bool], values: Sequence[float | None]) -> int:
    return next((i for i, value in enumerate(values) if not holds(value)), len(values))


def _gaps(times: list[float | None]) -> list[float]:
    known = [t for t in times if t is not None]
    return [b - a for a, b in pairwise(known)]
