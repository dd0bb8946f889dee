"""
What happened in one incident, in order, across trainer, server, GPU, kernel, people and Stepguard itself.

Pure: each recorded event with the state before and after it gives the moments that a person would tell of.
Repetitions are told once, with their number.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import PurePath
from typing import Final, assert_never

from ..core.breaker import Phase
from ..core.commands import Notify
from ..core.events import (
    Answer,
    BatchReported,
    CallsHung,
    CheckpointGone,
    CheckpointPinned,
    CheckpointSaved,
    CheckpointVetted,
    DaemonStarted,
    EffectEnded,
    Event,
    GenerationAsked,
    GpuTroubled,
    LogRead,
    LogSeen,
    MemoryPressed,
    NodeAcknowledged,
    NodeJoined,
    NodeLost,
    OomKind,
    OomSeen,
    OperatorAsked,
    OrderAcknowledged,
    ProcessExited,
    RequestsFailed,
    RewardLogged,
    RolloutsLost,
    SchedulerAsked,
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
from ..core.signs import Sign
from ..core.state import GateOrder, Server, ServerState, State
from ..core.surroundings import CRASH_SIGNS, TROUBLE_SIGNS
from ..journal import Recorded
from ..redaction import redacted
from .passage import Act, Passage
from .words import in_words, plain, times

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
_BECAME: Final = {
    ServerState.STARTING: "starts",
    ServerState.SERVING: "serves",
    ServerState.SUSPECT: "is under suspicion",
    ServerState.DEAD: "is dead",
    ServerState.RESTARTING: "is being restarted",
    ServerState.STALE: "lives, its weights not proven current",
    ServerState.PLANNED: "is away by plan",
}
# The state itself says that a server comes up: the line that its log prints then is told by no sentence.
STATES_TELL: Final = {Sign.STARTING, Sign.READY}
BAD_SIGNS: Final = (
    CRASH_SIGNS
    | TROUBLE_SIGNS
    | {Sign.CUDA_OOM, Sign.POOL_TOO_SMALL, Sign.START_FAILED, Sign.RAY_MEMORY_KILL, Sign.HOST_OOM_KILL}
)
_OF_CUDA: Final = {OomKind.CUDA_START, OomKind.CUDA_RUN, OomKind.CUDA_UNKNOWN, OomKind.POOL_TOO_SMALL}
LINE_CHARS_MAX: Final = 160
# An act's name for a person, as the thing that was done.
ACTS: Final = {
    "ContinueServer": "SIGCONT to",
    "StopServer": "stop of",
    "StartServer": "start of",
    "RunCanary": "canary generations on",
    "PushWeights": "weights pushed to",
    "CompareWeights": "look at the weights of",
    "PauseGeneration": "pause of",
    "AbortRequests": "end of the requests of",
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
    """Two timelines as one; a line that the log itself gives, with its time, is not told a second time."""
    more = list(more)
    told = {moment.text for moment in more}
    own = [moment for moment in moments if not (moment.kind.startswith("log ") and moment.text in told)]
    return _few(_once(sorted([*own, *more], key=lambda moment: moment.after_s)))


def quoted(line: str) -> str:
    """A log's line as a moment tells it: without secrets, and not endless."""
    line = redacted(line.strip())
    return f"log: {line if len(line) <= LINE_CHARS_MAX else line[: LINE_CHARS_MAX - 1] + '…'}"


def _told(
    row: Recorded, before: State, after: State, acts: dict[str, Act]
) -> Iterator[tuple[Plane, str, str, bool]]:
    yield from _event(row, before, after, acts)
    yield from _servers(row.event, before, after)
    told = [command for command in row.commands if isinstance(command, Notify)]
    opened = any(note.what in {"opened", "resumed"} for note in told)
    if after.gate.order is not before.gate.order and not opened:
        why = f" ({plain(after.gate.reason)})" if after.gate.reason else ""
        yield Plane.STEPGUARD, "gate", f"the gate says {after.gate.order.value}{why}", False
    for note in told:
        if note.what == "refused" or (note.what == "warning" and isinstance(row.event, LogSeen)):
            continue  # the batch says so itself, and the line
        plane = Plane.PERSON if note.what == "person" else _seen_at(row.event)
        bad = note.what in {"opened", "locked_out", "call", "relapse"} or plane in {Plane.KERNEL, Plane.GPU}
        yield plane, f"note {note.what}", in_words(note.text), bad
    if after.phase is Phase.LOCKED_OUT and before.phase is not Phase.LOCKED_OUT:
        yield Plane.STEPGUARD, "phase", "the breaker is locked out: held until a person decides", True


def _seen_at(event: Event) -> Plane:
    """Where that happened of which a note tells."""
    match event:
        case OomSeen() if event.kind in _OF_CUDA:
            return Plane.GPU
        case OomSeen(kind=OomKind.KV_FULL) | LogSeen(server=str()):
            return Plane.SERVER
        case LogSeen():
            return Plane.TRAINER
        case OomSeen() | MemoryPressed():
            return Plane.KERNEL
        case GpuTroubled():
            return Plane.GPU
        case _:
            return Plane.STEPGUARD


def stuck_in_kernel(state: State, name: str) -> str:
    """What to say of a server's processes that wait in the kernel for long; "" where none does."""
    server = next((one for one in state.servers if one.name == name), None)
    pids = ", ".join(map(str, server.stuck_in_kernel())) if server is not None else ""
    why = "a disk, a network file system or the GPU's driver does not answer, and no signal reaches them"
    return f"processes {pids} wait in the kernel (state D): {why}" if pids else ""


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
        case LogRead():
            return
        case NodeJoined() | NodeAcknowledged() | NodeLost() | OperatorAsked() | OomSeen() | GpuTroubled():
            return  # told by its note
        case MemoryPressed():
            if not event.short:
                yield Plane.KERNEL, "memory", "nobody waits for memory any more", False
        case LogSeen():
            if event.sign not in STATES_TELL:
                plane = Plane.TRAINER if event.server is None else Plane.SERVER
                yield plane, f"log {event.sign.value}", quoted(event.line), event.sign in BAD_SIGNS
        case RequestsFailed():
            yield from _requests(event)
        case CallsHung():
            text = f"{event.failed} of {event.calls} calls hung at once: {event.what}"
            yield Plane.TRAINER, "calls", text, True
        case SchedulerAsked() | GenerationAsked():
            yield from _opinion(event)
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
            stuck = stuck_in_kernel(after, event.server)
            if stuck and not stuck_in_kernel(before, event.server):
                yield Plane.SERVER, "stuck", f"{event.server}: {stuck}", True
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
                    f"reward {reward}{plain(verdict)}"
                )
                yield Plane.TRAINER, f"batch {after.gate.reason}", text, bool(verdict)
        case RolloutsLost():
            if event.lost:
                prompts = times(len(event.lost), "prompt")
                yield Plane.TRAINER, "lost", f"rollouts of {prompts} were under way and failed", True
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
            yield (
                Plane.TRAINER,
                "saved",
                f"checkpoint of step {event.step} saved: {_short(event.path)}",
                False,
            )
        case OrderAcknowledged():
            how = "obeyed" if event.ok else f"could not obey ({event.detail})"
            if event.order != GateOrder.GO.value:
                yield Plane.TRAINER, "order", f"the trainer {how} {event.order}", not event.ok
        case EffectEnded():
            yield from _effect(event, acts.get(event.intent))
        case DaemonStarted():
            yield Plane.STEPGUARD, "daemon", "a daemon came up", False
        case _:
            assert_never(event)


def _requests(event: RequestsFailed) -> Iterator[tuple[Plane, str, str, bool]]:
    if not event.in_a_row:
        yield Plane.TRAINER, "answered", "the trainer's requests are answered again", False
        return
    error = quoted(event.error).removeprefix("log: ")
    count = "a request" if event.in_a_row == 1 else f"{event.in_a_row} requests in a row"
    yield Plane.TRAINER, "tally requests", f"{count} of the trainer failed: {error}", True


def _opinion(event: SchedulerAsked | GenerationAsked) -> Iterator[tuple[Plane, str, str, bool]]:
    """What was asked in doubt: an answer that speaks for the server is worth no line."""
    if isinstance(event, GenerationAsked):
        answer, whose = event.answer, f"{event.server} gave no token"
    else:
        answer, whose = event.info, f"the scheduler of {event.server} gave no answer"
    if answer not in {Answer.OK, Answer.NOT_OFFERED, Answer.UNKNOWN}:
        waited = f" for {event.waited_s:.1f} s" if event.waited_s else ""
        yield Plane.SERVER, f"tally {whose}", f"{whose}{waited} ({answer.value})", True


def _short(path: str) -> str:
    """The end of a path, by which people know a checkpoint."""
    parts = PurePath(path).parts
    return path if len(parts) <= 3 else "…/" + "/".join(parts[-2:])


def _effect(event: EffectEnded, act: Act | None) -> Iterator[tuple[Plane, str, str, bool]]:
    if act is None or (event.ok and act.kind in {"PushWeights", "CompareWeights"}):
        return  # a note tells of weights that came, and a look that found nothing needs no line
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
        yield (
            Plane.SERVER,
            f"state {server.name}",
            _became(server),
            (server.state in _BAD and (server.repair is None or not server.repair.restarts)),
        )


def _became(server: Server) -> str:
    """A state and, where it is no good one, why."""
    told = server.reason is not None and server.state not in {ServerState.STARTING, ServerState.SERVING}
    why = f" ({plain(server.reason.value)})" if told and server.reason is not None else ""
    return f"{server.name} {_BECAME[server.state]}{why}"


def _once(moments: list[Moment]) -> list[Moment]:
    """A run of one kind as its first moment, with the number of the others."""
    kept: list[Moment] = []
    repeats: dict[int, int] = {}
    newest: dict[tuple[Plane, str], int] = {}
    for moment in moments:
        key = moment.plane, moment.kind
        at = newest.get(key)
        same = at is not None and _repeats(kept[at], moment) and _nothing_between(kept, at, moment)
        if same and at is not None and moment.kind.startswith("tally"):
            kept[at] = replace(kept[at], text=moment.text)  # the last count is the whole
            continue
        if same and at is not None:
            repeats[at] = repeats.get(at, 0) + 1
            continue
        newest[key] = len(kept)
        kept.append(moment)
    return [
        replace(moment, text=f"{moment.text} (and {count} more like it)")
        if (count := repeats.get(at, 0))
        else moment
        for at, moment in enumerate(kept)
    ]


def _repeats(one: Moment, other: Moment) -> bool:
    return (
        one.kind.startswith(("answers", "batch", "note warning", "log ", "tally")) or one.text == other.text
    )


def _nothing_between(kept: list[Moment], at: int, moment: Moment) -> bool:
    """Whether nothing else of that plane happened since, so that no order is lost."""
    return not any(later.plane is moment.plane for later in kept[at + 1 :])


def _few(moments: list[Moment]) -> list[Moment]:
    """The first and the last of too many."""
    if len(moments) <= MOMENTS_MAX:
        return moments
    half = MOMENTS_MAX // 2
    return [*moments[:half], *moments[-half:]]
