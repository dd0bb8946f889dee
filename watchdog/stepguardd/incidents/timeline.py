"""
What happened in one incident, in order, across trainer, server, GPU, kernel, people and Stepguard itself.

Pure: each recorded event with the state before and after it gives the moments that a person would tell of.
Repetitions are told once, with their number.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum, StrEnum
from typing import Final

from ..core.breaker import Phase
from ..core.commands import Notify
from ..core.events import (
    Answer,
    BatchReported,
    CheckpointGone,
    CheckpointPinned,
    CheckpointSaved,
    CheckpointVetted,
    DaemonStarted,
    EffectEnded,
    Event,
    NodeAcknowledged,
    NodeJoined,
    NodeLost,
    OrderAcknowledged,
    ProcessExited,
    RewardLogged,
    RolloutsLost,
    ServerProbed,
    StepCommitted,
    Tick,
    TrainerExited,
    TrainerLeft,
    TrainerSeen,
    TrainerTree,
    TreeSampled,
    TreeSeen,
)
from ..core.state import GateOrder, ServerState, State
from ..journal import Recorded
from .passage import Act, Passage

LEAD_S: Final = 30.0
MOMENTS_MAX: Final = 250


class Plane(StrEnum):
    """Where something happened."""

    TRAINER = "trainer"
    SERVER = "server"
    GPU = "gpu"
    KERNEL = "kernel"
    STEPGUARD = "stepguard"
    PERSON = "person"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One thing that happened; `after_s` counts from the opening of the incident."""

    after_s: float
    wall: float
    plane: Plane
    text: str
    kind: str
    """Of two moments in a row with one kind and one plane, the second is a repetition."""
    bad: bool = False


_BAD: Final = {ServerState.DEAD, ServerState.SUSPECT, ServerState.STALE}
# An act's name for a person, as the thing that was done.
ACTS: Final = {
    "ContinueServer": "SIGCONT to",
    "StopServer": "stop of",
    "StartServer": "start of",
    "RunCanary": "canary generations on",
    "PushWeights": "weights pushed to",
    "CompareWeights": "look at the weights of",
    "PauseGeneration": "pause of",
    "ContinueGeneration": "end of the pause of",
    "PrepareRollback": "search for a checkpoint to go back to",
    "StopTrainer": "stop of the trainer",
    "StartTrainer": "start of the trainer",
}


def timeline(passage: Passage) -> list[Moment]:
    """The moments from shortly before the opening to the end."""
    opened = passage.opened
    acts = {act.intent: act for act in passage.acts}
    found: list[Moment] = []
    last_good: Moment | None = None
    last_saved: Moment | None = None
    for row, before, after in passage.walk():
        after_s = row.at - opened.at
        for plane, kind, text, bad in _told(row, before, after, acts):
            moment = Moment(after_s=after_s, wall=row.wall, plane=plane, text=text, kind=kind, bad=bad)
            if kind == "committed":
                if row.seq < opened.seq:
                    last_good = moment
                    continue
                if last_good is None:
                    continue  # only the first step after the trouble is worth a line
                found, last_good = [*found, moment], None
            elif kind == "saved" and row.seq < opened.seq:
                last_saved = moment
            elif after_s >= -LEAD_S:
                found.append(moment)
        if row.seq == opened.seq - 1:
            found += [moment for moment in (last_saved, last_good) if moment is not None]
    return _few(_once(found))


def merged(moments: Iterable[Moment], more: Iterable[Moment]) -> list[Moment]:
    """Two timelines as one."""
    return _few(sorted([*moments, *more], key=lambda moment: moment.after_s))


def _told(
    row: Recorded, before: State, after: State, acts: dict[str, Act]
) -> Iterator[tuple[Plane, str, str, bool]]:
    yield from _event(row, before, after, acts)
    yield from _servers(row.event, before, after)
    told = [command for command in row.commands if isinstance(command, Notify)]
    opened = any(note.what in {"opened", "resumed"} for note in told)
    if after.gate.order is not before.gate.order and not opened:
        why = f" ({after.gate.reason})" if after.gate.reason else ""
        yield Plane.STEPGUARD, "gate", f"the gate says {after.gate.order.value}{why}", False
    for note in told:
        if note.what == "refused":
            continue  # the batch itself says so
        plane = Plane.PERSON if note.what == "person" else Plane.STEPGUARD
        bad = note.what in {"opened", "locked_out", "call", "relapse"}
        yield plane, f"note {note.what}", note.text, bad
    if after.phase is Phase.LOCKED_OUT and before.phase is not Phase.LOCKED_OUT:
        yield Plane.STEPGUARD, "phase", "the breaker is locked out: held until a person decides", True


def stopped_by_us(server: str, at: float, acts: Iterable[Act]) -> bool:
    """Whether a server was being stopped by Stepguard at that time."""
    return any(
        act.kind == "StopServer"
        and act.server == server
        and act.begun < at <= (at if act.ended is None else act.ended)
        for act in acts
    )


def _event(
    row: Recorded, before: State, after: State, acts: dict[str, Act]
) -> Iterator[tuple[Plane, str, str, bool]]:
    event: Event = row.event
    match event:
        case Tick() | TreeSeen() | TrainerTree() | RewardLogged() | CheckpointPinned() | CheckpointGone():
            return
        case NodeJoined() | NodeAcknowledged() | NodeLost():
            return  # told by its note
        case CheckpointVetted():
            if event.verdict != "good":
                text = f"checkpoint of step {event.step} vetted {event.verdict}: {event.reason}"
                yield Plane.TRAINER, "vetted", text, True
        case TrainerLeft():
            yield Plane.TRAINER, "left", f"the trainer took its leave: {event.why}", False
        case ProcessExited():
            ours = stopped_by_us(event.server, row.at, acts.values())
            code = "" if event.code is None else f" with code {event.code}"
            text = f"{event.proc.role} of {event.server} (pid {event.proc.pid}) ended{code}"
            yield Plane.SERVER, "exit", text, not ours
        case TreeSampled():
            was = next((one.stopped for one in before.servers if one.name == event.server), ())
            if event.stopped != was:
                pids = ", ".join(map(str, event.stopped))
                text = (
                    f"{event.server}: stopped processes: {pids}" if pids else f"{event.server}: none stopped"
                )
                yield Plane.SERVER, "stopped", text, bool(pids)
        case ServerProbed():
            if not _expected_down(after, event.server):
                yield from _answers(event)
        case BatchReported():
            verdict = "" if after.gate.judged_ok else f"; refused: {after.gate.reason}"
            if event.failed or verdict:
                reward = "unknown" if event.reward is None else f"{event.reward:.3g}"
                total = event.ok + event.failed
                text = (
                    f"batch of step {event.step}: {event.failed} of {total} rollouts failed, "
                    f"reward {reward}{verdict}"
                )
                yield Plane.TRAINER, f"batch {after.gate.reason}", text, bool(verdict)
        case RolloutsLost():
            if event.lost:
                count = len(event.lost)
                yield Plane.TRAINER, "lost", f"rollouts of {count} prompts were under way and failed", True
        case StepCommitted():
            reward = "unknown" if event.reward is None else f"{event.reward:.3g}"
            yield Plane.TRAINER, "committed", f"step {event.step} taken, reward {reward}", False
        case TrainerSeen():
            if event.phase != before.trainer.phase and "HELD" in {event.phase, before.trainer.phase}:
                step = "" if event.step is None else f" at step {event.step}"
                held = event.phase == "HELD"
                text = f"the trainer waits{step}" if held else f"the trainer goes on{step}"
                yield Plane.TRAINER, "waits" if held else "goes on", text, False
        case TrainerExited():
            code = "unknown" if event.code is None else str(event.code)
            yield Plane.TRAINER, "exit", f"the trainer (pid {event.pid}) ended, code {code}", True
        case CheckpointSaved():
            yield Plane.TRAINER, "saved", f"checkpoint of step {event.step} saved: {event.path}", False
        case OrderAcknowledged():
            how = "obeyed" if event.ok else f"could not obey ({event.detail})"
            if event.order != GateOrder.GO.value:
                yield Plane.TRAINER, "order", f"the trainer {how} {event.order}", not event.ok
        case EffectEnded():
            yield from _effect(event, acts.get(event.intent))
        case DaemonStarted():
            yield Plane.STEPGUARD, "daemon", "a daemon came up", False
        case _:
            yield from _other(event)


def _effect(event: EffectEnded, act: Act | None) -> Iterator[tuple[Plane, str, str, bool]]:
    if act is None:
        return
    took = "" if act.ended is None else f" in {act.ended - act.begun:.2f} s"
    how = f"done{took}" if event.ok else f"failed{took}"
    name = f"{ACTS.get(act.kind, act.kind)} {act.server or ''}".strip()
    detail = f": {event.detail}" if event.detail else ""
    yield Plane.STEPGUARD, f"effect {act.kind}", f"{name} {how}{detail}", not event.ok


def _expected_down(state: State, name: str) -> bool:
    """A server that is being restarted refuses, as it should."""
    server = next((one for one in state.servers if one.name == name), None)
    down = {ServerState.STARTING, ServerState.RESTARTING}
    return server is not None and server.state in down and server.repair is not None


_LAST_ANSWERS: Final = ("ready", "model_info", "metrics")


def _answers(event: ServerProbed) -> Iterator[tuple[Plane, str, str, bool]]:
    """Only what is no good answer; a repetition is dropped later."""
    bad = {
        name: answer
        for name in _LAST_ANSWERS
        if (answer := getattr(event, name)) not in {Answer.OK, Answer.NOT_OFFERED, Answer.UNKNOWN}
    }
    if bad:
        told = ", ".join(f"/{name} {answer.value}" for name, answer in bad.items())
        yield Plane.SERVER, f"answers {event.server}", f"{event.server} answers: {told}", True


def _servers(event: Event, before: State, after: State) -> Iterator[tuple[Plane, str, str, bool]]:
    del event
    known = {server.name: server for server in before.servers}
    for server in after.servers:
        old = known.get(server.name)
        if old is None or old.state is server.state:
            continue
        why = f" ({server.reason.value})" if server.reason is not None else ""
        text = f"{server.name}: {old.state.value} → {server.state.value}{why}"
        yield (
            Plane.SERVER,
            f"state {server.name}",
            text,
            (server.state in _BAD and (server.repair is None or not server.repair.restarts)),
        )


def _other(event: object) -> Iterator[tuple[Plane, str, str, bool]]:
    """An event that this page knows no words for is told by its fields."""
    name = type(event).__name__
    if not is_dataclass(event):
        return
    lowered = name.lower()
    plane = Plane.SERVER
    if "gpu" in lowered or "xid" in lowered:
        plane = Plane.GPU
    elif "oom" in lowered or "kernel" in lowered or "host" in lowered or "memory" in lowered:
        plane = Plane.KERNEL
    elif lowered.startswith(("operator", "person")):
        return  # a note tells it, with what came of it
    elif lowered.startswith("trainer"):
        plane = Plane.TRAINER
    said = getattr(event, "text", "") or getattr(event, "line", "")
    told = str(said) or ", ".join(
        f"{field.name} {shown}"
        for field in fields(event)
        if (shown := _shown(getattr(event, field.name))) is not None
    )
    yield plane, name, f"{name}: {told}", False


def _shown(value: object) -> str | None:
    if value is None or value in ((), ""):
        return None
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 120 else text[:119] + "…"


def _once(moments: list[Moment]) -> list[Moment]:
    """A run of one kind as its first moment, with the number of the others."""
    kept: list[Moment] = []
    repeats: dict[int, int] = {}
    newest: dict[tuple[Plane, str], int] = {}
    for moment in moments:
        key = moment.plane, moment.kind
        at = newest.get(key)
        same = at is not None and _repeats(kept[at], moment) and _nothing_between(kept, at, moment)
        if same and at is not None:
            repeats[at] = repeats.get(at, 0) + 1
            continue
        newest[key] = len(kept)
        kept.append(moment)
    return [
        Moment(
            after_s=moment.after_s,
            wall=moment.wall,
            plane=moment.plane,
            text=f"{moment.text} (and {count} more like it)"
            if (count := repeats.get(at, 0))
            else moment.text,
            kind=moment.kind,
            bad=moment.bad,
        )
        for at, moment in enumerate(kept)
    ]


def _repeats(one: Moment, other: Moment) -> bool:
    return one.kind.startswith(("answers", "batch", "note warning")) or one.text == other.text


def _nothing_between(kept: list[Moment], at: int, moment: Moment) -> bool:
    """Whether nothing else of that plane happened since, so that no order is lost."""
    return not any(later.plane is moment.plane for later in kept[at + 1 :])


def _few(moments: list[Moment]) -> list[Moment]:
    """The first and the last of too many."""
    if len(moments) <= MOMENTS_MAX:
        return moments
    half = MOMENTS_MAX // 2
    return [*moments[:half], *moments[-half:]]
