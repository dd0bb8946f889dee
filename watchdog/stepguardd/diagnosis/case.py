"""
Everything that a run's folder holds about an incident, put together: evidence, ranked causes, what to do.

Reads and never writes. It takes what is there (recorded metrics, logs, kernel logs, checkpoints); a file in a
folder that is none of these is passed over, one that was named and cannot be read is an error. Bounded in
depth and files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepguardd.core.diagnosis import ADVICE, Cause, Evidence, Fact, Hypothesis, rank
from stepguardd.core.reward import RewardConfig
from stepguardd.diagnosis.logs import log_evidence
from stepguardd.diagnosis.story import Incident, Story
from stepguardd.history import History, HistoryError, read_history
from stepguardd.replay import Replayed, Trip, replay

__all__ = ["Case", "CaseError", "investigate"]

_DEPTH_MAX = 5
_FILES_MAX = 5000
_REPORTS_MAX = 20
_CHECKPOINTS = 2  # the newest; each is read whole
_WARNING_BEFORE = 40  # steps that a warning may lie before the step that was asked about
_STREAMS = {".csv", ".tsv", ".jsonl", ".ndjson", ".wandb"}
_LOGS = {".log", ".out", ".err", ".txt"}
_KERNEL = re.compile(r"^(dmesg|kern\.log|kmsg|messages|syslog)", re.IGNORECASE)


class CaseError(Exception):
    """A named path cannot be investigated; the message names it and the remedy."""


@dataclass(slots=True, kw_only=True)
class Case:
    """What was found, and what it comes to."""

    replayed: Replayed | None = None
    """The recorded run that the incident was found in."""
    trip: Trip | None = None
    """The decision that would have held it."""
    onset_step: int | None = None
    garbage_steps: int = 0
    summary: str = "Nothing was found that is wrong."
    evidence: list[Evidence] = field(default_factory=list)
    hypotheses: tuple[Hypothesis, ...] = ()
    actions: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    """What was read, for a person."""


def investigate(
    paths: Sequence[Path],
    config: RewardConfig,
    *,
    metric: str | None = None,
    at: int | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Case:
    """
    Look at everything under the paths and rank what may have happened.

    Args:
        paths: files and folders.
        config: how the reward is judged.
        metric: the reward's name; None: found.
        at: explain what was going on at this step; None: the first incident.
        progress: is told what is being read.

    Raises:
        CaseError: a path is not there, or a named file cannot be read as what it is.

    """
    streams, logs = _sorted_out(paths)
    replays = []
    for history in _histories(streams, metric, set(paths)):
        progress(history.source)
        replays.append(replay(config, history))
    case = Case()
    case.read += [f"{r.history.source}: {len(r.history.steps)} steps of {r.history.metric}" for r in replays]
    if metric is not None and streams and not replays:
        raise CaseError(
            f"no metric {metric!r} in {', '.join(map(str, streams[:3]))}; see: stepguard stream FILE"
        )
    chosen = max(replays, key=_telling, default=None)
    if chosen is not None:
        case.replayed = chosen
        _tell_reward(case, chosen, at)
    try:
        case.evidence += log_evidence(logs)
    except OSError as wrong:
        raise CaseError(f"{wrong.filename}: {wrong.strerror}") from None
    case.read += [f"{path}: log" for path in logs]
    for folder in (path for path in paths if path.is_dir()):
        case.evidence += _checkpoint_evidence(folder, case.read, progress)
    case.actions += _reports(paths)
    if not case.read:
        raise CaseError(
            f"{', '.join(map(str, paths))}: no recorded metrics, no logs and no checkpoints there"
        )
    case.hypotheses = rank(case.evidence) if _is_wrong(case) else ()
    if case.onset_step is None and case.hypotheses:
        case.summary = _without_incident(case, at)
    case.actions = case.actions or _actions(case)
    case.advice = _advice(case.hypotheses)
    return case


def _without_incident(case: Case, at: int | None) -> str:
    """What the others say where the reward has no incident."""
    where = "" if at is None else f" at step {at}"
    reward = (
        "No reward was found to go by"
        if case.replayed is None
        else f"The reward of {len(case.replayed.history.steps)} steps shows no incident{where}"
    )
    first = case.hypotheses[0]
    return f"{reward}, but something else speaks of trouble: {first.supporting[0]}"


def _reports(paths: Sequence[Path]) -> list[str]:
    """What Stepguard itself reported on incidents of this run."""
    told = []
    found = sorted(
        report
        for path in paths
        if path.is_dir()
        for pattern in ("incidents/*/report.json", "*/incidents/*/report.json")
        for report in path.glob(pattern)
    )
    for report in found[:_REPORTS_MAX]:
        try:
            fields = json.loads(report.read_bytes())
            summary = str(fields["summary"]).rstrip(".")
            number = int(fields["incident"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        told.append(f"incident {number}: {summary}; see {report.with_name('report.md')}")
    return told


def _telling(result: Replayed) -> tuple[bool, bool, int]:
    return bool(result.trips), bool(result.warnings), len(result.history.steps)


def _is_wrong(case: Case) -> bool:
    """Whether there is anything to explain: an incident in the reward, or a log that speaks of a failure."""
    harmless = {Fact.NO_OOM_LINES, Fact.TRAINING_WENT_ON}
    return case.onset_step is not None or any(piece.fact not in harmless for piece in case.evidence)


# --- Which files


def _sorted_out(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Metric streams and logs; what is neither is left out."""
    streams: list[Path] = []
    logs: list[Path] = []
    for path in paths:
        if not path.exists():
            raise CaseError(f"{path}: there is no such file or folder")
        named = not path.is_dir()
        for file in [path] if named else _walk(path):
            if _KERNEL.match(file.name) or file.suffix in _LOGS:
                logs.append(file)
            elif file.suffix in _STREAMS or "tfevents" in file.name or named:
                streams.append(file)
    return streams, logs


def _walk(folder: Path) -> Iterator[Path]:
    """The files below, in order; not into hidden folders or links, nor deeper than is sensible."""
    waiting, seen = [(folder, 0)], 0
    while waiting:
        here, depth = waiting.pop(0)
        try:
            entries = sorted(here.iterdir())
        except OSError:
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.is_symlink():
                continue
            if entry.is_dir():
                if depth < _DEPTH_MAX:
                    waiting.append((entry, depth + 1))
                continue
            seen += 1
            if seen > _FILES_MAX:
                return
            yield entry


def _histories(streams: Iterable[Path], metric: str | None, named: set[Path]) -> Iterator[History]:
    for path in streams:
        try:
            yield read_history(path, metric=metric)
        except HistoryError as wrong:
            if path in named:
                raise CaseError(str(wrong)) from None


def _checkpoint_evidence(
    folder: Path, read: list[str], progress: Callable[[str], None]
) -> Iterator[Evidence]:
    """Whether the newest checkpoints are finite and whole."""
    from stepguardd.checkpoints.layouts import LayoutError, find_checkpoints, open_folder  # noqa: PLC0415
    from stepguardd.checkpoints.vetting import vet_all  # noqa: PLC0415 - numpy, where there are checkpoints
    from stepguardd.core.verdict import Verdict  # noqa: PLC0415

    try:
        opened = open_folder(folder)
        newest = find_checkpoints(opened)[-_CHECKPOINTS:]
    except LayoutError:
        return
    if newest:
        progress(f"{opened.root}: {len(newest)} checkpoints")
    for checkpoint, vetting in zip(newest, vet_all(opened, newest), strict=True):
        read.append(f"{checkpoint.path}: {vetting.verdict.value}")
        if vetting.verdict is Verdict.BAD and re.search(
            r"\bnan\b|\binf|finite", vetting.reason, re.IGNORECASE
        ):
            yield Evidence(
                fact=Fact.CHECKPOINT_NOT_FINITE,
                time=f"step {checkpoint.step}" if checkpoint.step is not None else "step unknown",
                source=checkpoint.path.name,
                text=vetting.reason,
            )


# --- The reward, what was done, what to do


def _tell_reward(case: Case, result: Replayed, at: int | None) -> None:
    history = result.history
    incident = _incident(case, result, at)
    if incident is None:
        return
    story = Story(history, incident)
    case.onset_step = history.steps[incident.first]
    case.garbage_steps = story.garbage_steps if case.trip is not None else 0
    case.summary = story.summary()
    case.evidence += story.evidence()


def _incident(case: Case, result: Replayed, at: int | None) -> Incident | None:
    """The rows to explain: of the trip (or the warning) at the step asked for, else of the first one."""
    steps, attempts = result.history.steps, result.history.attempts
    last = len(steps) - 1
    for trip in result.trips:
        if at is None or trip.onset_step <= at <= steps[min(trip.until, last)]:
            case.trip = trip
            first = trip.index
            while first and steps[first - 1] >= trip.onset_step and attempts[first - 1] == attempts[first]:
                first -= 1
            return Incident(reason=trip.reason, first=first, seen=trip.index, until=trip.until)
    for warning in result.warnings:
        if at is None or warning.step - _WARNING_BEFORE <= at <= steps[min(warning.until, last)]:
            return Incident(
                reason=warning.reason, first=warning.index, seen=warning.index, until=warning.until
            )
    return None


def _actions(case: Case) -> list[str]:
    """What was done, or would have been done by this judgement."""
    if case.trip is None:
        return ["nothing was held, and nothing would have been"]
    avoided = case.trip.until - case.trip.index
    return [
        f"nothing held this run; Stepguard would have held it before the optimizer step of {case.trip.step}",
        f"{avoided} steps on garbage would not have been taken",
    ]


def _advice(hypotheses: Sequence[Hypothesis]) -> list[str]:
    """What to do next, for the causes that are more likely than not, and for the first in any case."""
    likely: list[Cause] = [h.cause for h in hypotheses if h.confidence >= 0.5] or [
        h.cause for h in hypotheses[:1]
    ]
    return [sentence for cause in likely[:3] for sentence in ADVICE[cause]]
