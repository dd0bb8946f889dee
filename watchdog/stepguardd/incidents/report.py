"""
The report on one incident: everything that a person on call needs, put together once for every form of it.

Reads the journal and the incident's folder, and changes nothing.
"""

import re
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

from .. import clock
from ..checkpoints.rollback import undo_command
from ..core.breaker import Phase
from ..core.commands import Notify
from ..core.diagnosis import NAMES, Cause, Evidence, Fact, Hypothesis, rank
from ..core.events import (
    BatchReported,
    CheckpointSaved,
    ProcessExited,
    RewardLogged,
    StepCommitted,
    TrainerExited,
)
from ..core.reasons import Reason
from ..core.reward import Kind
from ..core.rungs import ADVICE
from ..core.signs import Sign
from ..core.state import GateOrder, Incident, Mode, State
from ..diagnosis.logs import line_evidence
from ..diagnosis.story import Incident as Rows
from ..diagnosis.story import Story
from ..history import History
from ..journal import JournalError
from ..sources.nvml import GpuError, GpuLook, NvmlDriver
from . import crash_dumps, slices
from .collected import Collected
from .evidence import clock_time, journal_evidence, reward_history
from .folders import DECISIONS
from .passage import Passage, read_passage
from .slices import Figure, LogSlice
from .timeline import ACTS, BAD_SIGNS, STATES_TELL, Moment, Plane, merged, quoted, timeline
from .words import AFTERWARDS, REASONS, plain, seconds, times

_KERNEL_TAIL_S: Final = 5.0
_MADE_IT_CRASH: Final = {Cause.HOST_OOM, Cause.GPU_OOM, Cause.GPU_FAULT, Cause.DISK_FULL}
_KILL_TO_EXIT_S: Final = 2.0
_VICTIM: Final = re.compile(r"(?:[Kk]illed process |oom-kill:.*\bpid=)(\d{1,9})")
_BEFORE_A_KILL: Final = re.compile(r"invoked oom-killer|oom-kill:")
_GPU_TIMEOUT_S: Final = 5.0
_WOULD_SHOWN: Final = 8
_STACK_CHARS_MAX: Final = 200_000


class ReportError(Exception):
    """There is no report to make; the message says why and what would help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """
    What the incident cost; None is unknown.

    `steps_again` is how many steps a rollback or a relaunch had taken anew; `steps_lost` is these and the
    time held, in steps of the run's own pace; `gpus` is how many this machine has.
    """

    held_s: float
    refused_batches: int
    garbage_steps: int
    steps_again: int
    step_s: float | None
    steps_lost: float | None
    gpus: int | None
    gpu_hours: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing that Stepguard did; times in seconds, the beginning counted from the opening."""

    name: str
    after_s: float
    took_s: float | None
    ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The reward and what happened along it, by step. Bands are (first step, last step)."""

    steps: tuple[int, ...]
    values: tuple[float | None, ...]
    attempts: tuple[int, ...]
    refused: tuple[tuple[int, float | None, str], ...]
    saved: tuple[int, ...]
    held: tuple[int, int] | None
    onset: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything; the forms only choose."""

    run: str
    mode: str
    incident: Incident
    stage: str
    title: str
    summary: tuple[str, ...]
    opened_wall: float
    written_wall: float
    cost: Cost
    moments: tuple[Moment, ...]
    hypotheses: tuple[Hypothesis, ...]
    actions: tuple[Action, ...]
    would: tuple[str, ...]
    steps: tuple[str, ...]
    advice: tuple[str, ...]
    commands: tuple[tuple[str, str], ...]
    curve: Curve
    logs: tuple[LogSlice, ...]
    figures: tuple[Figure, ...]
    scraped: str
    stacks: tuple[tuple[str, str], ...]
    config: tuple[tuple[str, str, bool], ...]
    gpus: tuple[Mapping[str, object], ...] | None
    notes: tuple[str, ...]
    decisions: int
    passage: Passage


def build(collected: Collected, folder: Path | None) -> Report:
    """
    Put a report together.

    Args:
        collected: what the daemon handed over.
        folder: the incident's, with scrapes and stacks in it.

    Raises:
        ReportError: the journal has nothing of that incident, or cannot be read.

    """
    try:
        passage = read_passage(Path(collected.journal), collected.incident)
    except JournalError as error:
        raise ReportError(str(error)) from None
    if passage is None:
        raise ReportError(
            f"{collected.journal}: tells of no incident {collected.incident} any more; its report may be kept"
        )
    last, incident = _incident(passage)
    notes = list(collected.notes)
    logs, kernel = _logs(passage, collected, notes)
    history = reward_history(passage, collected.run)
    moments = merged(timeline(passage), _log_moments(passage, [*logs, *kernel]))
    evidence = _evidence(passage, history, [*logs, *kernel], last)
    hypotheses = rank(evidence)
    gpus = _gpus(notes)
    cost = _cost(passage, incident, last, history, gpus)
    stage = _stage(incident, last)
    return Report(
        run=collected.run,
        mode=last.mode.value,
        incident=incident,
        stage=stage,
        title=_title(incident, hypotheses),
        summary=(*_summary(passage, incident, last, cost, moments), *_in_flight(passage, collected)),
        opened_wall=passage.opened.wall,
        written_wall=clock.wall(),
        cost=cost,
        moments=tuple(moments),
        hypotheses=hypotheses,
        actions=tuple(_actions(passage)),
        would=tuple(_would(passage)),
        steps=tuple(_next_steps(incident, last, hypotheses, stage, _crash_words([*logs, *kernel], notes))),
        advice=tuple(_advice(passage)),
        commands=tuple(_commands(collected, incident, stage, folder)),
        curve=_curve(passage, history, incident, last),
        logs=(*logs, *kernel),
        figures=tuple([] if folder is None else slices.read_metrics_files(folder, _servers(last))),
        scraped=_scraped(collected, passage.opened.wall),
        stacks=tuple([] if folder is None else _stacks(folder)),
        config=collected.config,
        gpus=gpus,
        notes=tuple(notes),
        decisions=len(passage.rows),
        passage=passage,
    )


def _incident(passage: Passage) -> tuple[State, Incident]:
    """The last state of the passage, and the incident as it then stood."""
    last, found = passage.start, None
    for _, _, after in passage.walk():
        last = after
        for known in (after.incident, after.last_incident):
            if known is not None and known.number == passage.number:
                found = known
    if found is None:
        raise ReportError(f"the journal's rows do not decide to incident {passage.number} any more")
    return last, found


def _stage(incident: Incident, last: State) -> str:
    if incident.closed_at is not None:
        return "closed"
    if last.phase is Phase.LOCKED_OUT:
        return "locked out"
    if last.mode is Mode.SHADOW:
        return "watched"
    return "held" if incident.resumed_at is None else "probation"


def _in_flight(passage: Passage, collected: Collected) -> list[str]:
    """The prompts that a server died under, where SGLang was told to leave them."""
    died = any(isinstance(row.event, ProcessExited) for row in passage.rows)
    if not died:
        return []
    return crash_dumps.told(collected.crash_dumps, passage.opened.wall, passage.rows[-1].wall)


def _servers(state: State) -> list[str]:
    return [server.name for server in state.servers]


# --- What is read


def _scraped(collected: Collected, opened: float) -> str:
    """How long before and after the opening the metrics are from."""
    ages = {
        when: wall - opened
        for name, wall in collected.metrics_walls.items()
        for when in ("before", "after")
        if name.endswith(f"-{when}.txt")
    }
    told = [
        f"{when}: {seconds(abs(age))} {when if age < 0 else 'after'} the hold" for when, age in ages.items()
    ]
    return "; ".join(told)


def _logs(passage: Passage, collected: Collected, notes: list[str]) -> tuple[list[LogSlice], list[LogSlice]]:
    logs = []
    for name, span in collected.logs.items():
        found = slices.cut_out(name, span, bytes_max=collected.log_bytes_max)
        if isinstance(found, str):
            notes.append(found)
        elif found.lines:
            logs.append(found)
    opened = passage.opened
    kernel = slices.kernel_slice(
        since=opened.at - slices.KERNEL_LEAD_S,
        until=passage.rows[-1].at + _KERNEL_TAIL_S,
        since_wall=opened.wall - slices.KERNEL_LEAD_S,
        opened=opened.at,
    )
    if isinstance(kernel, str):
        notes.append(kernel)
        return logs, []
    return logs, [without_strangers(kernel, passage)]


def _log_moments(passage: Passage, logs: Sequence[LogSlice]) -> list[Moment]:
    """Lines with a known meaning, at the time that they say; those of the kernel by the monotonic clock."""
    opened, ended = passage.opened, passage.rows[-1]
    moments = []
    for log in logs:
        kernel = log.name == "kernel"
        plane = Plane.KERNEL if kernel else (Plane.TRAINER if log.name == "trainer" else Plane.SERVER)
        for index, line, sign, told in _marked(log, passage):
            after_s = None if told is None else told - (opened.at if kernel else opened.wall)
            if (
                after_s is None
                or not -slices.KERNEL_LEAD_S <= after_s <= ended.at - opened.at + _KERNEL_TAIL_S
            ):
                continue
            if not kernel:  # a stamp of whole seconds: the place in the log knows better
                after_s = max(after_s, 0.001) if index >= log.before else min(after_s, -0.001)
            moments.append(
                Moment(
                    after_s=after_s,
                    wall=opened.wall + after_s,
                    plane=plane,
                    text=quoted(line),
                    kind=f"log {line if sign is None else sign.value}",
                    bad=kernel or sign in BAD_SIGNS,
                )
            )
    return moments


def _marked(log: LogSlice, passage: Passage) -> Iterator[tuple[int, str, Sign | None, float | None]]:
    """The lines of a log that a timeline tells: index, line, meaning and time."""
    if log.name != "kernel":
        for index, sign, wall in log.signs:
            if Sign(sign) not in STATES_TELL:
                yield index, log.lines[index], Sign(sign), wall
        return
    for index, line in enumerate(log.lines):
        # Of the lines about one kill the one that names what was killed, and how large it was.
        if not _BEFORE_A_KILL.search(line):
            yield index, line, None, _kernel_time(line)


def _kernel_time(line: str) -> float | None:
    try:
        return float(line[1 : line.index("]")])
    except ValueError:
        return None


def _gpus(notes: list[str]) -> tuple[Mapping[str, object], ...] | None:
    """The GPUs as they are now; a driver that does not answer is not waited for."""
    answers: list[GpuLook | str] = []

    def ask() -> None:
        try:
            answers.append(NvmlDriver().look())
        except GpuError as error:
            answers.append(str(error))

    asking = threading.Thread(target=ask, name="gpu-driver", daemon=True)
    asking.start()
    asking.join(_GPU_TIMEOUT_S)
    look = answers[0] if answers else f"the GPU driver has not answered for {_GPU_TIMEOUT_S:g} s"
    if isinstance(look, str):
        notes.append(look)
        return None
    return tuple(
        {
            "index": gpu.index,
            "busy_percent": gpu.busy_percent,
            "temperature_c": gpu.temperature_c,
            "used_bytes": gpu.used_bytes,
            "total_bytes": gpu.total_bytes,
        }
        for gpu in look.gpus
    )


def _stacks(folder: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted((folder / "stacks").glob("*.txt")):
        try:
            found.append((path.stem, path.read_text(encoding="utf-8", errors="replace")[:_STACK_CHARS_MAX]))
        except OSError:
            continue
    return found


# --- Why


def _evidence(
    passage: Passage, history: History | None, logs: Sequence[LogSlice], last: State
) -> list[Evidence]:
    evidence = journal_evidence(passage)
    for log in logs:
        lines = log.lines if log.name == "kernel" else _recent(log, passage)
        evidence += line_evidence(log.name, lines)
    if logs and not any(piece.fact in {Fact.HOST_OOM, Fact.GPU_OOM} for piece in evidence):
        count = sum(len(log.lines) for log in logs)
        evidence.append(
            Evidence(
                fact=Fact.NO_OOM_LINES,
                time=clock_time(passage.opened.wall),
                source="logs",
                text=f"no out-of-memory line in {count} lines of {', '.join(log.name for log in logs)}",
            )
        )
    trip = _trip(passage)
    if trip is not None and history is not None:
        evidence += _story(history, trip.onset_step, trip.step, last)
    return evidence


def _recent(log: LogSlice, passage: Passage) -> list[str]:
    """The lines of these minutes: an older crash in the same log is another incident's."""
    since = passage.opened.wall - slices.KERNEL_LEAD_S
    recent, lines = True, []
    for line in log.lines:
        told = slices.stamp(line)
        if told is not None:
            recent = told >= since
        lines.append(line if recent else "")
    return lines


def without_strangers(log: LogSlice, passage: Passage) -> LogSlice:
    """
    The kernel's lines without the kills of strangers.

    Ours is a victim by its pid; or, where pids are counted otherwise (a container), one that was killed when
    a process of ours ended. The line that announces a kill names nobody: it goes with the one that does.
    """
    pids, ends = set[int](), list[float]()
    for row, _, after in passage.walk():
        pids |= {known.pid for server in after.servers for known in server.procs}
        pids |= set() if after.trainer.pid is None else {after.trainer.pid}
        if isinstance(row.event, ProcessExited | TrainerExited):
            ends.append(row.at)
    kept: list[int] = []
    ours = True
    for index, line in reversed([*enumerate(log.lines)]):
        victim, told = _VICTIM.search(line), _kernel_time(line)
        if victim is not None:
            near = told is not None and any(abs(end - told) <= _KILL_TO_EXIT_S for end in ends)
            ours = int(victim[1]) in pids or near
        if ours or (victim is None and "invoked oom-killer" not in line):
            kept.append(index)
    kept.reverse()
    places = {index: place for place, index in enumerate(kept)}
    return replace(
        log,
        lines=tuple(log.lines[index] for index in kept),
        before=sum(index < log.before for index in kept),
        signs=tuple((places[index], sign, wall) for index, sign, wall in log.signs if index in places),
    )


def _trip(passage: Passage) -> Any:
    for row, _, after in passage.walk():
        if row.seq >= passage.opened.seq and after.trip is not None and after.trip.kind != Kind.INFRA.value:
            return after.trip
    return None


def _story(history: History, onset: int, seen: int, last: State) -> list[Evidence]:
    """What the curve itself says, where the trip came from the reward."""
    steps = history.steps
    first = next((i for i, step in enumerate(steps) if step >= onset), None)
    if first is None:
        return []  # the bad batch was refused: no row of it was ever committed
    at = next((i for i, step in enumerate(steps) if step >= seen), len(steps) - 1)
    incident = last.incident or last.last_incident
    reason = Reason(incident.reason) if incident is not None else Reason.REWARD_COLLAPSE
    rows = Rows(reason=reason, first=first, seen=at, until=len(steps))
    return list(Story(history, rows).evidence())


def _title(incident: Incident, hypotheses: Sequence[Hypothesis]) -> str:
    if not hypotheses or hypotheses[0].confidence < 0.5:
        return REASONS.get(incident.reason, plain(incident.reason.value))
    first = hypotheses[0]
    # That a server crashed is seen; what made it crash is what people want to know.
    deeper = next(
        (one for one in hypotheses[1:] if one.cause in _MADE_IT_CRASH and one.confidence >= 0.8), None
    )
    if first.cause is Cause.SERVER_CRASH and deeper is not None:
        return f"{NAMES[first.cause]}, because {NAMES[deeper.cause]} ({deeper.confidence:.0%} sure)"
    return f"{NAMES[first.cause]} ({first.confidence:.0%} sure)"


# --- What it cost


def _cost(
    passage: Passage,
    incident: Incident,
    last: State,
    history: History | None,
    gpus: Sequence[object] | None,
) -> Cost:
    end = incident.resumed_at
    if end is None:
        end = incident.closed_at if incident.closed_at is not None else passage.rows[-1].at
    held_s = 0.0 if last.mode is Mode.SHADOW else max(0.0, end - incident.opened_at)
    step_s = _step_time(passage, incident)
    again = _taken_again(passage, incident)
    return Cost(
        held_s=held_s,
        refused_batches=incident.refused_batches,
        garbage_steps=_garbage(passage, incident),
        step_s=step_s,
        steps_again=again,
        steps_lost=None if not step_s else held_s / step_s + incident.refused_batches + again,
        gpus=None if gpus is None else len(gpus),
        gpu_hours=None if not gpus else held_s * len(gpus) / 3600,
    )


def _taken_again(passage: Passage, incident: Incident) -> int:
    """Steps that had been taken, and lie behind the point to which the run went back."""
    steps = [(row.at, row.event) for row in passage.curve if isinstance(row.event, StepCommitted)]
    before = [event for at, event in steps if at <= incident.opened_at]
    after = [event for at, event in steps if at > incident.opened_at]
    if not before or not after or after[-1].attempt == before[-1].attempt:
        return 0
    first = next(event.step for event in after if event.attempt == after[-1].attempt)
    return max(0, before[-1].step - first + 1)


def _step_time(passage: Passage, incident: Incident) -> float | None:
    """Seconds from one committed step to the next, before the incident."""
    times = [
        row.at
        for row in passage.curve
        if isinstance(row.event, StepCommitted) and row.at < incident.opened_at
    ][-50:]
    gaps = [later - earlier for earlier, later in pairwise(times) if later > earlier]
    return median(gaps) if len(gaps) >= 3 else None


def _garbage(passage: Passage, incident: Incident) -> int:
    """
    Optimizer steps that were taken on bad batches.

    From the onset to the hold where the reward tripped, as those were found bad afterwards; under a hold,
    unless the batch had passed before: a step that was under way when the hold came had good rollouts.
    """
    onset: int | None = None
    passed: dict[tuple[int, int], bool] = {}
    bad: set[tuple[int, int]] = set()
    for row, before, after in passage.walk():
        event = row.event
        if isinstance(event, BatchReported):
            passed[event.attempt, event.step] = after.gate.judged_ok and not after.gate.reason
        if after.trip is not None and onset is None:
            onset = after.trip.onset_step
        if isinstance(event, StepCommitted) and row.at >= incident.opened_at:
            held = before.gate.order is not GateOrder.GO or before.mode is Mode.SHADOW
            step = event.attempt, event.step
            if held and before.incident is not None and not passed.get(step, False):
                bad.add(step)
    for row in passage.curve:
        event = row.event
        early = isinstance(event, StepCommitted) and row.at <= incident.opened_at
        if onset is not None and isinstance(event, StepCommitted) and early and event.step >= onset:
            bad.add((event.attempt, event.step))
    return len(bad)


# --- What was done, what to do


def _actions(passage: Passage) -> list[Action]:
    opened = passage.opened.at
    actions = []
    for act in passage.acts:
        name = f"{ACTS.get(act.kind, act.kind)} {act.server or ''}".strip()
        took = None if act.ended is None else act.ended - act.begun
        actions.append(
            Action(name=name, after_s=act.begun - opened, took_s=took, ok=act.ok, detail=act.detail)
        )
    return actions


def _would(passage: Passage) -> list[str]:
    """What another mode would have done, each once; the modes shadow and hold tell it."""
    notes = (command for row in passage.rows for command in row.commands if isinstance(command, Notify))
    told = list(dict.fromkeys(note.text for note in notes if note.what == "would"))
    more = len(told) - _WOULD_SHOWN
    return told if more <= 0 else [*told[:_WOULD_SHOWN], f"and {more} more like these"]


def _summary(
    passage: Passage, incident: Incident, last: State, cost: Cost, moments: Sequence[Moment]
) -> list[str]:
    when = clock_time(passage.opened.wall)
    step = "" if incident.onset_step is None else f" at step {incident.onset_step}"
    first = next(
        (m for m in moments if m.bad and -1.0 <= m.after_s <= 0.0 and m.plane is not Plane.STEPGUARD), None
    )
    began = f"At {when} UTC{step} " + (
        f"the {first.text.removeprefix('the ')}"
        if first is not None and first.kind == "exit"
        else REASONS.get(incident.reason, f"the run was held for {plain(incident.reason.value)}")
    )
    sentences = [began + "."]
    if last.mode is Mode.SHADOW:
        sentences.append("In shadow mode nothing was held and nothing repaired.")
    else:
        done = []
        if incident.restarts:
            done.append(f"{times(incident.restarts, 'restart')} of {incident.server or 'the server'}")
        if incident.rollbacks:
            done.append(times(incident.rollbacks, "rollback"))
        if incident.relaunches:
            done.append(times(incident.relaunches, "relaunch", "relaunches") + " of the trainer")
        pushed = sum(act.kind == "PushWeights" and bool(act.ok) for act in passage.acts)
        if pushed:
            done.append("the current weights pushed and proven")
        elif incident.resyncs:
            done.append("the current weights handed over by the trainer, and proven")
        if any(act.kind == "ContinueServer" and act.ok for act in passage.acts):
            done.append("the stopped process told to go on")
        if any(act.kind == "RunCanary" and act.ok for act in passage.acts):
            done.append("the server seen to generate again")
        held = "Stepguard held the trainer before its next optimizer step"
        sentences.append(f"{held}{': ' + ', '.join(done) if done else ', and repaired nothing'}.")
    if incident.refused_batches:
        sentences.append(
            f"{times(incident.refused_batches, 'bad batch', 'bad batches')} "
            f"{'was' if incident.refused_batches == 1 else 'were'} refused instead of trained on."
        )
    garbage = cost.garbage_steps
    sentences.append(
        "No optimizer step was taken on garbage."
        if not garbage
        else f"{times(garbage, 'optimizer step')} {'was' if garbage == 1 else 'were'} taken on garbage"
        + (f", and the rollback took {'it' if garbage == 1 else 'them'} back." if incident.rollbacks else ".")
    )
    if incident.resumed_at is not None:
        sentences.append(f"The trainer went on after {seconds(incident.resumed_at - incident.opened_at)}.")
    match _stage(incident, last):
        case "closed":
            sentences.append("Probation was passed, and the incident is closed.")
        case "probation":
            sentences.append("The run is on probation: a relapse re-opens the incident.")
        case "locked out":
            sentences.append("No remedy is left, and the run is held until a person decides.")
        case "watched":
            sentences.append("The trouble lasts.")
        case _:
            sentences.append("The trainer is still held.")
    return sentences


def _next_steps(
    incident: Incident, last: State, hypotheses: Sequence[Hypothesis], stage: str, crash: str
) -> list[str]:
    steps = []
    match stage:
        case "closed":
            steps.append("Nothing is urgent: the run goes on with proven weights.")
        case "probation":
            steps.append("Nothing now: the run goes on under watch.")
        case "locked out":
            steps.append("Decide now: remove the cause and let it go on, go back, or stop the run.")
        case "watched":
            steps.append("Repair the cause: mode shadow only looks on. What another mode would do is below.")
        case _ if last.mode is Mode.ACT:
            steps.append("Nothing yet: Stepguard is repairing it. Watch, and decide if it locks out.")
        case _ if incident.server is not None:
            steps.append(
                f"Restart {incident.server} by the command below, which also renews its weights: this run's "
                "mode only holds and tells."
            )
        case _:
            steps.append("Repair the cause: this run's mode only holds and tells.")
    likely = [one.cause for one in hypotheses if one.confidence >= 0.5] or [
        one.cause for one in hypotheses[:1]
    ]
    if _MADE_IT_CRASH & {*likely} and Cause.SERVER_CRASH in likely:
        likely.remove(Cause.SERVER_CRASH)  # why is known
    for cause in likely[:2]:
        steps += [crash] if cause is Cause.SERVER_CRASH else AFTERWARDS[cause]
    if stage in {"held", "locked out"} and {Cause.POLICY_COLLAPSE, Cause.NAN_WEIGHTS} & {*likely[:1]}:
        steps.insert(1, "Go back to a checkpoint from before the onset: the command is below.")
    if incident.reason in {Reason.TRAINER_EXITED, Reason.RANK_LOST} and not steps[1:]:
        steps.append(
            "Find out why the trainer ended: the end of its log and the kernel's lines. Code -9 without an "
            "error in the log is a kill from outside: the kernel's OOM killer, a scheduler, or a person."
        )
    if incident.restarts and stage == "closed":
        steps.append("If it comes back, the restart budget decides how often; after that a person is called.")
    return steps


def _crash_words(logs: Sequence[LogSlice], notes: Sequence[str]) -> str:
    """What the logs were found to say of a crash, so that nobody has to look for what is not there."""
    told = [log.name for log in logs if any(Sign(sign) in BAD_SIGNS for _, sign, _ in log.signs)]
    if told:
        return f"Find out why the process ended: the log of {' and of '.join(told)} says it, below."
    kernel = any(log.name == "kernel" for log in logs)
    if kernel:
        return (
            "Find out who ended the process: no log says why, and the kernel's tells of no kill for memory. "
            "So it was a signal from outside: a person, a script, a scheduler, a container's stop."
        )
    unread = next((note for note in notes if note.startswith("the kernel's log")), "it was not read")
    return (
        f"Find out why the process ended: no log says it, and the kernel's is missing ({unread}). As root, "
        "`dmesg -T | grep -i 'killed process'` shows whether it was killed for memory."
    )


def _advice(passage: Passage) -> Iterator[str]:
    """What Stepguard itself advised while it repaired: each prompt that kills, and the newest on memory."""
    notes = [command for row in passage.rows for command in row.commands if isinstance(command, Notify)]
    for text in dict.fromkeys(note.text for note in notes if note.reason == Reason.PROMPT_QUARANTINED.value):
        yield f"{text[:1].upper()}{text[1:]}."
    on_memory = [note.text.removeprefix(ADVICE) for note in notes if note.text.startswith(ADVICE)]
    if on_memory:
        yield f"For the trainer: {on_memory[-1]}."


def _commands(
    collected: Collected, incident: Incident, stage: str, folder: Path | None
) -> list[tuple[str, str]]:
    at = f" --run-dir {collected.run_dir}" if collected.run_dir else ""
    commands = [("how it is now", f"stepguard status{at}")]
    if stage in {"held", "locked out"}:
        if incident.server is not None:
            commands.append(("restart the server", f"stepguard restart-server {incident.server}{at}"))
        commands.append(("let it go on", f"stepguard resume{at} --why '…'"))
        onset = "" if incident.onset_step is None else f" --before-step {incident.onset_step}"
        commands.append(("go back to before it", f"stepguard rollback{at}{onset}"))
    elif stage != "watched":
        commands.append(("hold the run", f"stepguard pause{at} --why '…'"))
    if incident.rollbacks and collected.checkpoint_dir:
        commands.append(("undo the rollback", undo_command(Path(collected.checkpoint_dir))))
    decisions = DECISIONS if folder is None else str(folder / DECISIONS)
    commands.append(("decide it again", f"stepguard replay {shlex.quote(decisions)}"))
    return commands


# --- The curve


def _curve(passage: Passage, history: History | None, incident: Incident, last: State) -> Curve:
    del last
    refused = []
    for row, _, after in passage.walk():
        event = row.event
        if (
            isinstance(event, BatchReported)
            and not after.gate.judged_ok
            and row.at >= incident.opened_at - 60
        ):
            refused.append((event.step, event.reward, after.gate.reason))
    held = None
    if history is not None and history.steps:
        committed = [
            (row.at, row.event.step) for row in passage.curve if isinstance(row.event, StepCommitted)
        ]
        logged = [(row.at, row.event.step) for row in passage.curve if isinstance(row.event, RewardLogged)]
        times = committed or logged
        end = incident.resumed_at if incident.resumed_at is not None else passage.rows[-1].at
        before = [step for at, step in times if at <= incident.opened_at]
        behind = [step for at, step in times if at > end]
        if before:
            held = before[-1], behind[0] if behind else before[-1] + 1
    saved = [row.event.step for row in passage.curve if isinstance(row.event, CheckpointSaved)]
    return Curve(
        steps=() if history is None else tuple(history.steps),
        values=() if history is None else tuple(history.values),
        attempts=() if history is None else tuple(history.attempts),
        refused=tuple(refused),
        saved=tuple(saved),
        held=held,
        onset=incident.onset_step,
    )
