"""
What the evidence on one server comes to.

Each function takes a server and one piece of evidence and gives the server with that evidence in it, and
what it is suspected of.
A suspicion holds the run; whether anything is killed for it is the recovery's business.

The endpoints that answer without the scheduler (`/ready`, `/model_info`, `/metrics`) can only speak
against a server, never for it: they answer 200 with a frozen scheduler.
"""

from dataclasses import dataclass, replace
from enum import Enum

from . import opinions, planned
from .events import (
    Answer,
    GenerationAsked,
    Proc,
    ProcessExited,
    SchedulerAsked,
    ServerProbed,
    TreeSampled,
)
from .reasons import Reason
from .state import Endpoints, Server, ServerState, Settings, Trainer

FAILED_PROBES = 3
STALE_PROBES = 2
BUSY_CORES = 0.1
_NO_ANSWER = frozenset({Answer.REFUSED, Answer.TIMEOUT, Answer.BROKEN, Answer.UNAVAILABLE})
VITAL_ROLES = frozenset({"server", "scheduler", "detokenizer", "data_parallel"})


class Remedy(Enum):
    """What a suspicion asks for."""

    RESTART = "restart"  # it is dead
    CONTINUE = "continue"  # it is stopped: SIGCONT first
    WATCH = "watch"  # hold; restart only if it lasts
    RESYNC = "resync"  # it lives, with the wrong weights
    RECHECK = "recheck"  # rollouts had the wrong weights: the next probe tells whose
    VERIFY = "verify"  # a dead one came back: prove it before it serves


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """What a server is suspected of, and what that asks for."""

    reason: Reason
    remedy: Remedy


Judged = tuple[Server, Suspicion | None]


def tree_seen(server: Server, procs: tuple[Proc, ...]) -> Judged:
    """
    The live processes of a server.

    One of the vital ones missing is a death that nobody saw; none of the old ones left is another server.
    What remains of a dead server's tree is not its return.
    """
    had = server.procs
    kept = {_identity(known) for known in had} & {_identity(known) for known in procs}
    server = replace(server, procs=procs, seen=server.seen or server.managed or bool(procs))
    if procs and not kept and (had or server.state is ServerState.DEAD):
        return server, Suspicion(reason=Reason.SERVER_RETURNED, remedy=Remedy.VERIFY)
    lost = any(_vital(known, had) and _identity(known) not in kept for known in had)
    if lost and server.state is not ServerState.DEAD:
        return server, Suspicion(reason=Reason.SERVER_DIED, remedy=Remedy.RESTART)
    return server, None


def _vital(known: Proc, tree: tuple[Proc, ...]) -> bool:
    """Whether a server ends with this process. Compilers and trackers come and go."""
    return known.role in VITAL_ROLES or _identity(known) == _identity(tree[0])


def _identity(known: Proc) -> tuple[int, int]:
    return known.pid, known.start_ticks


def process_exited(server: Server, event: ProcessExited) -> Judged:
    """
    One process of the tree is gone, and with it the server, unless it was a helper.

    SGLang's parent outlives a dead child by 5 to 67 s as a black hole; nothing is gained by waiting for it.
    The dead process stays in `procs`, for the stop to see it gone.
    """
    ended = _identity(event.proc)
    found = next((known for known in server.procs if _identity(known) == ended), None)
    if found is None:
        return server, None
    if not _vital(found, server.procs):
        return replace(server, procs=tuple(known for known in server.procs if known is not found)), None
    return server, Suspicion(reason=Reason.SERVER_DIED, remedy=Remedy.RESTART)


def sampled(server: Server, event: TreeSampled, now: float) -> Judged:
    """
    Stopped in two samples running is stopped; a debugger's short stop is not.

    Busy is a rate: a parent that answers probes uses some CPU also while its scheduler is in deadlock.
    CPU time that went down is another set of processes, and says nothing.
    """
    lasting = set(event.stopped) & set(server.stopped)
    used_s = None if server.cpu_s is None else event.cpu_s - server.cpu_s
    over_s = 0.0 if server.sampled_at is None else now - server.sampled_at
    idle = used_s is not None and 0.0 <= used_s < BUSY_CORES * over_s
    waits_on = set(event.uninterruptible) & set(server.uninterruptible)
    server = replace(
        server,
        stopped=event.stopped,
        uninterruptible=event.uninterruptible,
        uninterruptible_since=(server.uninterruptible_since if waits_on else now)
        if event.uninterruptible
        else None,
        cpu_s=event.cpu_s,
        sampled_at=now,
        busy_at=server.busy_at if idle else now,
    )
    if lasting:
        return server, Suspicion(reason=Reason.SERVER_STOPPED, remedy=Remedy.CONTINUE)
    return server, None


def probed(server: Server, event: ServerProbed, trainer: Trainer, settings: Settings, now: float) -> Judged:
    """One round of cheap endpoints."""
    failed = _failed(server, event)
    # A round in which `/metrics` was lost says nothing of tokens: what they were is still what they were.
    tokens = server.tokens if event.tokens is None else event.tokens
    moved = tokens != server.tokens
    known = moved and server.tokens is not None
    idle = event.running == 0
    said = server.endpoints
    server = replace(
        server,
        seen=server.seen or event.model_info is Answer.OK or server.failed_probes + failed >= FAILED_PROBES,
        failed_probes=server.failed_probes + 1 if failed else 0,
        endpoints=said if failed else _answered(said, event),
        running=event.running,
        tokens=tokens,
        tokens_at=now if moved or idle or server.tokens_at is None else server.tokens_at,
        generated_at=now if known else server.generated_at,
        weight_version=event.weight_version if event.model_info is Answer.OK else server.weight_version,
    )
    server = planned.by_ready(server, event, now)
    excused = planned.excused(server, (event.ready, event.model_info))
    if server.failed_probes >= FAILED_PROBES and not excused:
        return server, _unreachable(server)
    return _stale(server, trainer, settings, now)


def _answered(said: Endpoints, event: ServerProbed) -> Endpoints:
    return replace(said, ready=event.ready, model_info=event.model_info, metrics=event.metrics)


def _failed(server: Server, event: ServerProbed) -> bool:
    """
    Whether a round got no good answer at all.

    An endpoint that was there and is not any more, or that talks nonsense, is another program's answer.
    """
    lost = event.model_info is Answer.NOT_OFFERED and server.endpoints.model_info is Answer.OK
    silent = event.model_info in _NO_ANSWER and event.ready in _NO_ANSWER
    return lost or silent or event.model_info is Answer.BROKEN


def _unreachable(server: Server) -> Suspicion:
    """A server that nobody has seen serve yet is loading its model, until its start takes too long."""
    if server.state is ServerState.STARTING and server.repair is None:
        return Suspicion(reason=Reason.SERVER_STARTING, remedy=Remedy.VERIFY)
    return Suspicion(reason=Reason.SERVER_UNREACHABLE, remedy=Remedy.WATCH)


def _stale(server: Server, trainer: Trainer, settings: Settings, now: float) -> Judged:
    """
    Another version than the trainer's, during its rollouts, and not just for the moment of an update.

    Several pieces have to agree: the trainer is generating, its own version is older than two rounds, and two
    rounds running saw the difference.
    """
    wrong = (
        server.state is ServerState.SERVING
        and trainer.phase == "ROLLOUT"
        and trainer.version_at is not None
        and now - trainer.version_at > 2 * settings.interval_s
        and not current(server.weight_version, trainer.weight_version, settings.max_staleness)
    )
    server = replace(server, stale_probes=server.stale_probes + 1 if wrong else 0)
    if server.stale_probes >= STALE_PROBES:
        return server, Suspicion(reason=Reason.STALE_WEIGHTS, remedy=Remedy.RESYNC)
    return server, None


def current(served: str | None, held: str | None, max_staleness: int) -> bool:
    """Whether a served weight version may stand for the one that the trainer holds. Unknown may."""
    if served is None or held is None or served == held:
        return True
    if max_staleness and served.isdecimal() and held.isdecimal():
        return 0 <= int(held) - int(served) <= max_staleness
    return False


def asked(server: Server, event: SchedulerAsked, now: float) -> Judged:
    """The second opinion; what its silence comes to, time will tell."""
    return opinions.scheduler(server, event, now), None


def generated(server: Server, event: GenerationAsked, now: float) -> Judged:
    """A token was asked for."""
    server, failed = opinions.token(server, event, now)
    return server, Suspicion(reason=Reason.SERVER_HUNG, remedy=Remedy.WATCH) if failed else None


def ticked(server: Server, trainer: Trainer, settings: Settings, now: float) -> Judged:
    """
    What only time can tell: requests run and no token comes, or the scheduler does not answer.

    With no CPU used either it is a deadlock; a busy CPU may be a long prefill, so that takes longer.
    """
    server = opinions.wanted(server, trainer, settings, now)
    if planned.too_long(server, settings, now):
        if server.reason is Reason.OPERATOR_PLANNED:
            return planned.over(server, now), None
        return server, Suspicion(reason=Reason.PAUSED_TOO_LONG, remedy=Remedy.WATCH)
    hung = Suspicion(reason=Reason.SERVER_HUNG, remedy=Remedy.WATCH)
    if server.repair is None and opinions.frozen(server, settings, now):
        return server, hung
    if server.state is not ServerState.SERVING or not server.running or server.tokens_at is None:
        return server, None
    still_s = now - server.tokens_at
    idle_s = 0.0 if server.busy_at is None else now - server.busy_at
    if min(still_s, idle_s) > settings.deadlock_after_s:
        if _paused_unsaid(server, settings, now):
            return server.move(ServerState.PLANNED, now, Reason.SERVER_PAUSED), None
        return server, hung
    if still_s > settings.spin_after_s:
        return server, Suspicion(reason=Reason.SERVER_SPINNING, remedy=Remedy.WATCH)
    return server, None


def _paused_unsaid(server: Server, settings: Settings, now: float) -> bool:
    """
    Whether it is paused and has no `/ready` to say so: its scheduler answers, and lets requests wait.

    Where there is a `/ready` it would say so; there, requests that wait for nothing are a hang.
    """
    turning = server.loop_at is not None and now - server.loop_at < settings.deadlock_after_s / 2
    return turning and server.endpoints.ready is Answer.NOT_OFFERED


def well(server: Server, settings: Settings, now: float) -> bool:
    """Whether nothing soft speaks against it any more."""
    quiet = not server.running or (
        server.tokens_at is not None and now - server.tokens_at <= 2 * settings.interval_s
    )
    answers = server.failed_probes == 0 and server.unanswered_since is None
    return not server.stopped and answers and quiet
