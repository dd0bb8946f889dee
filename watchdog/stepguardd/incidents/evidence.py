"""
What the journal itself says about an incident, as evidence for the diagnosis.

Pure. What Stepguard's own repair brought about (a server that it stopped refuses connections) is no evidence.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from math import isfinite
from typing import Final

from ..core.diagnosis import Evidence, Fact
from ..core.events import (
    Answer,
    BatchReported,
    DaemonStarted,
    OomKind,
    OomSeen,
    ProcessExited,
    RewardLogged,
    Role,
    ServerProbed,
    StepCommitted,
    TreeSampled,
)
from ..core.reasons import Reason
from ..core.state import ServerState, State
from ..core.surroundings import of_a_stranger
from ..history import History
from ..journal import Recorded
from .passage import Passage
from .timeline import LEAD_S, stopped_by_us, stuck_in_kernel

GAP_S: Final = 30.0

_KERNEL: Final = {OomKind.KERNEL_HOST, OomKind.KERNEL_CGROUP, OomKind.CGROUP_COUNTER}
_HUNG: Final = {Reason.SERVER_HUNG, Reason.SERVER_SPINNING, Reason.SERVER_STOPPED, Reason.CANARY_FAILED}
_STALE: Final = {Reason.STALE_WEIGHTS, Reason.WEIGHTS_UNPROVEN, Reason.RESYNC_FAILED}


def journal_evidence(passage: Passage) -> list[Evidence]:
    """Each kind of evidence once, at its first place, with the number of the others in its text."""
    found: dict[tuple[Fact, str], Evidence] = {}
    counts: dict[tuple[Fact, str], int] = {}
    for row, before, after in passage.walk():
        if row.at - passage.opened.at < -LEAD_S:
            continue
        for fact, source, text in _facts(row, before, after, passage):
            key = fact, source
            counts[key] = counts.get(key, 0) + 1
            found.setdefault(key, Evidence(fact=fact, time=clock_time(row.wall), source=source, text=text))
    return [
        piece if counts[key] == 1 else _repeated(piece, counts[key])
        for key, piece in found.items()
        if not (key[0] is Fact.COMPLETE and any(fact is Fact.ABORTED_UP for fact, _ in found))
    ]


def clock_time(wall: float) -> str:
    """A wall time of day, for a person, in UTC."""
    return datetime.fromtimestamp(wall, UTC).strftime("%H:%M:%S")


def reward_history(passage: Passage, run: str) -> History | None:
    """The rewards that the journal has, one a step: the trainer's own reports, else the logged stream's."""
    rows = [
        (row.event.attempt, row.event.step, row.event.reward, row.wall, dict(row.event.metrics))
        for row in passage.curve
        if isinstance(row.event, StepCommitted)
    ]
    if not any(reward is not None for _, _, reward, _, _ in rows):
        rows = [
            (0, row.event.step, row.event.reward, row.wall, dict(row.event.metrics))
            for row in passage.curve
            if isinstance(row.event, RewardLogged)
        ]
    if not rows:
        return None
    names = sorted({name for *_, metrics in rows for name in metrics} - {"reward", "step"})
    return History(
        source=f"{run}/journal",
        metric="reward",
        steps=[step for _, step, *_ in rows],
        values=[reward for _, _, reward, _, _ in rows],
        attempts=[attempt for attempt, *_ in rows],
        times=[wall for *_, wall, _ in rows],
        columns={name: [metrics.get(name) for *_, metrics in rows] for name in names},
    )


def _facts(row: Recorded, before: State, after: State, passage: Passage) -> Iterator[tuple[Fact, str, str]]:
    event = row.event
    match event:
        case ProcessExited() if not stopped_by_us(event.server, row.at, passage.acts):
            code = "" if event.code is None else f", exit code {event.code}"
            role = event.proc.role
            yield Fact.SERVER_CRASHED, event.server, f"its {role} (pid {event.proc.pid}) ended{code}"
        case TreeSampled() if event.stopped:
            pids = ", ".join(map(str, event.stopped))
            yield Fact.SERVER_HUNG, event.server, f"its processes {pids} are stopped (SIGSTOP or a debugger)"
        case TreeSampled() if stuck := stuck_in_kernel(after, event.server):
            yield Fact.SERVER_HUNG, event.server, f"its {stuck}"
        case ServerProbed() if _before_repair(before, event.server):
            if Answer.REFUSED in {event.ready, event.model_info}:
                yield Fact.SERVER_UNREACHABLE, event.server, "connections are refused"
            elif event.model_info is Answer.TIMEOUT:
                yield Fact.SERVER_HUNG, event.server, "/model_info was not answered in time"
        case BatchReported() if row.seq >= passage.opened.seq:
            yield from _batch(event, tripped=after.trip is not None)
        case StepCommitted():
            yield from _step(event)
        case OomSeen() if event.kind in _KERNEL and _felt_here(event):
            whose = event.server or f"the {event.role.value}"
            where = "" if event.cgroup is None else f" in cgroup {event.cgroup}"
            yield Fact.HOST_OOM, whose, f"the kernel killed for memory{where}, where {whose} runs"
        case DaemonStarted() if row.seq > passage.opened.seq:
            yield Fact.WATCHDOG_GAP, "stepguard", "a daemon came up within the incident"
        case _:
            pass
    yield from _server_reasons(before, after)


def _felt_here(event: OomSeen) -> bool:
    """A kill whose victim is known, and is not somebody else's at a limit of their own."""
    return event.role is not Role.UNKNOWN and not of_a_stranger(event)


def _server_reasons(before: State, after: State) -> Iterator[tuple[Fact, str, str]]:
    """What a server came under suspicion for."""
    known = {server.name: server for server in before.servers}
    for server in after.servers:
        old = known.get(server.name)
        if old is None or server.reason is None or (old.reason, old.state) == (server.reason, server.state):
            continue
        suspect = server.state in {ServerState.SUSPECT, ServerState.DEAD, ServerState.RESTARTING}
        if suspect and server.reason in _HUNG:
            yield Fact.SERVER_HUNG, server.name, f"judged {server.reason.value}"
        elif server.reason in _STALE and server.state is ServerState.STALE:
            version = server.weight_version or "unknown"
            text = f"its weights are version {version}, the trainer's {after.trainer.weight_version}"
            yield Fact.WEIGHTS_STALE, server.name, text


def _before_repair(state: State, name: str) -> bool:
    server = next((one for one in state.servers if one.name == name), None)
    return server is None or server.repair is None


def _batch(event: BatchReported, *, tripped: bool) -> Iterator[tuple[Fact, str, str]]:
    """What a batch says; that one was complete says something only where its reward tripped."""
    total = event.ok + event.failed
    if event.failed > max(1, 0.05 * total):
        text = f"{event.failed} of {total} rollouts of step {event.step} failed"
        yield Fact.ABORTED_UP, "guard", text
    elif tripped and total and not event.failed:
        yield Fact.COMPLETE, "guard", f"all {total} rollouts of step {event.step} completed"
    if event.stale:
        yield Fact.WEIGHTS_STALE, "guard", f"{event.stale} rollouts of step {event.step} had old weights"
    if event.reward is not None and not isfinite(event.reward):
        yield Fact.NOT_FINITE, "guard", f"the reward of step {event.step} is {event.reward}"
    spread = event.reward_std, event.reward_min, event.reward_max
    if tripped and None not in spread and event.reward_min == event.reward_max and total > 1:
        text = f"all rollouts of step {event.step} scored {event.reward_min:.3g}"
        yield Fact.SAME_SCORES, "guard", text


def _step(event: StepCommitted) -> Iterator[tuple[Fact, str, str]]:
    for name in ("loss", "grad_norm"):
        value = event.metrics.get(name)
        if value is not None and not isfinite(value):
            yield Fact.LOSS_NOT_FINITE, "trainer", f"{name} of step {event.step} is {value}"


def _repeated(piece: Evidence, count: int) -> Evidence:
    return Evidence(
        fact=piece.fact, time=piece.time, source=piece.source, text=f"{piece.text} ({count} times)"
    )
