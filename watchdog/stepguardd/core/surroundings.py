"""
What was seen of memory, GPUs and logs: kept for the diagnosis, told to people, and rarely a suspicion.

None of it holds a run by itself but one: a log that tells of a server's crash, since its processes may not
show it for a minute (SGLang writes its diagnostics first, and its HTTP is a black hole meanwhile). That
holds and looks; what is killed is decided by what lasts.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from . import recovery
from .events import GpuTrouble, GpuTroubled, LogRead, LogSeen, MemoryPressed, OomKind, OomSeen, Role
from .fleet import Remedy, Suspicion
from .reasons import Reason
from .signs import Sign
from .state import SEEN_KEPT, LogPosition, Server, ServerState, State
from .turn import Turn

SAME_FOR_S = 60.0
"""Of one kind and place within this long, the count goes up and nobody is told again."""

CRASH_SIGNS = frozenset(
    {
        Sign.SCHEDULER_CRASHED,
        Sign.DETOKENIZER_CRASHED,
        Sign.SCHEDULER_EXCEPTION,
        Sign.CHILD_FAILED,
        Sign.SEGFAULT,
    }
)
TROUBLE_SIGNS = frozenset(
    {
        Sign.CUDA_ERROR,
        Sign.NCCL_TIMEOUT,
        Sign.NCCL_ERROR,
        Sign.RAY_ACTOR_DIED,
        Sign.RAY_NODE_DIED,
        Sign.DISK_FULL,
        Sign.XID,
    }
)
FLOOD = 100
"""So many lines in one look, of what is harmless one by one (a cancelled task, a refused connection)."""

_OOM_REASONS = {
    OomKind.KERNEL_HOST: Reason.HOST_OOM,
    OomKind.KERNEL_CGROUP: Reason.HOST_OOM,
    OomKind.CGROUP_COUNTER: Reason.HOST_OOM,
    OomKind.RAY_MONITOR: Reason.RAY_OOM,
    OomKind.CUDA_START: Reason.GPU_OOM,
    OomKind.CUDA_RUN: Reason.GPU_OOM,
    OomKind.CUDA_UNKNOWN: Reason.GPU_OOM,
    OomKind.POOL_TOO_SMALL: Reason.GPU_OOM,
    OomKind.KV_FULL: Reason.KV_FULL,
}
_OOM_WORDS = {
    OomKind.KERNEL_HOST: "the machine ran out of memory, and the kernel killed",
    OomKind.KERNEL_CGROUP: "a cgroup ran out of memory, and the kernel killed",
    OomKind.CGROUP_COUNTER: "a cgroup ran out of memory, and the kernel killed",
    OomKind.RAY_MONITOR: "Ray's memory monitor killed",
    OomKind.CUDA_START: "CUDA ran out of memory at the start of",
    OomKind.CUDA_RUN: "CUDA ran out of memory at work in",
    OomKind.CUDA_UNKNOWN: "CUDA ran out of memory in",
    OomKind.POOL_TOO_SMALL: "no memory was left for the KV pool of",
    OomKind.KV_FULL: "the KV pool is full, requests are retracted in",
}
_WHOSE = {
    Role.SERVER: "a server",
    Role.TRAINER: "the trainer",
    Role.OTHER: "another process",
    Role.UNKNOWN: "a process",
}
_GPU_REASONS = {
    GpuTrouble.XID: Reason.GPU_FAULT,
    GpuTrouble.ECC: Reason.GPU_FAULT,
    GpuTrouble.LOST: Reason.GPU_FAULT,
    GpuTrouble.FILLING: Reason.GPU_FILLING,
    GpuTrouble.ORPHAN: Reason.GPU_ORPHAN,
}

LINE_CHARS_TOLD = 200

S = TypeVar("S")


def seen(turn: Turn, event: OomSeen | GpuTroubled | LogSeen | LogRead | MemoryPressed) -> None:
    """Take in one thing that was seen."""
    match event:
        case OomSeen():
            _out_of_memory(turn, event)
        case GpuTroubled():
            _gpu(turn, event)
        case LogSeen():
            _line(turn, event)
        case LogRead():
            _stands(turn, event.server, event.position)
        case MemoryPressed():
            _pressure(turn, event)


def newest_oom(state: State, server: str, since: float) -> tuple[float, OomSeen] | None:
    """When and how memory last ran out at a server; a full KV pool is no such time."""
    for at, oom in reversed(state.surroundings.ooms):
        if at >= since and oom.server == server and oom.crashed:
            return at, oom
    return None


def _kept(
    old: tuple[tuple[float, S], ...], event: S, now: float, join: Callable[[S, S], S | None]
) -> tuple[tuple[tuple[float, S], ...], bool]:
    """The bounded record with the event in it, joined to what it repeats; and whether it is news."""
    for index, (at, known) in enumerate(old):
        if now - at <= SAME_FOR_S and (joined := join(known, event)) is not None:
            return (*old[:index], *old[index + 1 :], (now, joined)), False
    return (*old, (now, event))[-SEEN_KEPT:], True


def _out_of_memory(turn: Turn, event: OomSeen) -> None:
    around = turn.state.surroundings
    ooms, news = _kept(around.ooms, event, turn.now, _join_ooms)
    turn.state = replace(turn.state, surroundings=replace(around, ooms=ooms))
    if news and not of_a_stranger(event):
        whose = event.server or event.name or _WHOSE[event.role]
        if event.kind is OomKind.CGROUP_COUNTER and event.role is not Role.UNKNOWN:
            whose = f"a process of {whose}"  # which one the counter does not say
        pid = "" if event.pid is None else f" (pid {event.pid})"
        held = "" if event.used_bytes is None else f", {_size(event.used_bytes)}"
        where = "" if event.cgroup is None else f", cgroup {event.cgroup}"
        turn.note("warning", _OOM_REASONS[event.kind], f"{_OOM_WORDS[event.kind]} {whose}{pid}{held}{where}")


def of_a_stranger(event: OomSeen) -> bool:
    """Whether somebody else met a limit of their own: nothing that this run would feel."""
    return event.kind is OomKind.KERNEL_CGROUP and event.role is Role.OTHER


def _join_ooms(known: OomSeen, event: OomSeen) -> OomSeen | None:
    """
    One out of two reports of the same thing; None where they are two things.

    A kernel kill in a cgroup is seen by the kernel's log, with its victim, and by the cgroup's counter.
    """
    kinds = {known.kind, event.kind}
    if kinds == {OomKind.KERNEL_CGROUP, OomKind.CGROUP_COUNTER}:
        victim, counter = (known, event) if known.kind is OomKind.KERNEL_CGROUP else (event, known)
        if not overlap(victim.cgroup, counter.cgroup):
            return None
        return replace(victim, server=victim.server or counter.server, count=max(known.count, event.count))
    if len(kinds) > 1:
        return None
    place = (known.server, known.role, known.pid, known.gpu, known.cgroup)
    if place != (event.server, event.role, event.pid, event.gpu, event.cgroup):
        return None
    return replace(event, count=known.count + event.count)


def overlap(one: str | None, other: str | None) -> bool:
    """Whether two cgroups are the same or one lies in the other; unknown may be any."""
    if one is None or other is None:
        return True
    shorter, longer = sorted((one.rstrip("/"), other.rstrip("/")), key=len)
    return longer == shorter or longer.startswith(shorter + "/")


def _gpu(turn: Turn, event: GpuTroubled) -> None:
    around = turn.state.surroundings
    gpus, news = _kept(around.gpus, event, turn.now, _join_gpus)
    turn.state = replace(turn.state, surroundings=replace(around, gpus=gpus))
    if news:
        turn.note("warning", _GPU_REASONS[event.trouble], event.text or event.trouble.value)


def _join_gpus(known: GpuTroubled, event: GpuTroubled) -> GpuTroubled | None:
    if (known.trouble, known.gpu) != (event.trouble, event.gpu):
        return None
    by_number = event.trouble in {GpuTrouble.XID, GpuTrouble.ORPHAN}
    return None if by_number and known.number != event.number else event


def _line(turn: Turn, event: LogSeen) -> None:
    """A line of a log; what it says of a crash makes a living server suspect, and nothing more."""
    if event.position is not None:
        _stands(turn, event.server, event.position)
    around = turn.state.surroundings
    logs, news = _kept(around.logs, replace(event, position=None), turn.now, _join_lines)
    turn.state = replace(turn.state, surroundings=replace(around, logs=logs))
    server = None if event.server is None else turn.server(event.server)
    if server is not None and event.sign in CRASH_SIGNS and _unaware(server):
        suspicion = Suspicion(reason=Reason.SERVER_EXCEPTION, remedy=Remedy.WATCH)
        recovery.suspect(turn, server, suspicion)
    trouble = event.sign in TROUBLE_SIGNS or event.count >= FLOOD
    if news and trouble:
        whose = "the trainer" if event.server is None else event.server
        turn.note("warning", Reason.LOG_TROUBLE, f"the log of {whose}: {event.line[:LINE_CHARS_TOLD]}")


def _stands(turn: Turn, server: str | None, position: str) -> None:
    """Where the log is read on after a restart; a log of a server that is no longer there is forgotten."""
    around = turn.state.surroundings
    others = [
        one
        for one in around.log_positions
        if one.server != server and (one.server is None or turn.server(one.server) is not None)
    ]
    log_positions = (*others, LogPosition(server=server, position=position))
    if log_positions != around.log_positions:
        turn.state = replace(turn.state, surroundings=replace(around, log_positions=log_positions))


def _join_lines(known: LogSeen, event: LogSeen) -> LogSeen | None:
    if (known.sign, known.server) != (event.sign, event.server):
        return None
    return replace(known, count=known.count + event.count)


def _unaware(server: Server) -> bool:
    """Whether nothing is known against it yet: lines of a crash that is being repaired come late."""
    return server.state in {ServerState.SERVING, ServerState.PLANNED} and server.repair is None


def _pressure(turn: Turn, event: MemoryPressed) -> None:
    around = turn.state.surroundings
    since = around.memory_short_since
    if event.short and since is None:
        turn.note(
            "warning",
            Reason.MEMORY_PRESSURE,
            f"memory is short: some processes waited for it {event.some_10s:.0f} % of the last 10 s, "
            f"all of them {event.full_10s:.0f} %",
        )
        since = turn.now
    elif not event.short:
        since = None
    if since != around.memory_short_since:
        turn.state = replace(turn.state, surroundings=replace(around, memory_short_since=since))


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**29 else f"{size_bytes / 2**20:.0f} MiB"
