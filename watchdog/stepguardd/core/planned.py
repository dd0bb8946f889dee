"""
Silence on purpose: who announced it, and for how long that is believed.

Three may announce it: the server itself (`/ready` says no while the rest answers: paused, or draining), the
trainer by its guard's phase (new weights; the GPUs are its own for a while), and a person or a script.
Each is bounded: by a lease, or by the phase of a trainer whose own stall is watched elsewhere.
"""

from dataclasses import replace

from .events import Answer, ServerProbed
from .reasons import Reason
from .state import Server, ServerState, Settings, Trainer

PLAN_MAX_S = 86_400.0
_BY_PHASE = frozenset({Reason.SERVER_UPDATING, Reason.SERVER_OFFLOADED})


def announced(trainer: Trainer, settings: Settings) -> Reason | None:
    """What the trainer's phase announces for every server; None for nothing."""
    if trainer.pid is None or trainer.works_at == "ROLLOUT":
        return None
    if trainer.works_at == "SYNC":
        return Reason.SERVER_UPDATING
    return Reason.SERVER_OFFLOADED if settings.colocated else None


def hands_off(trainer: Trainer, settings: Settings) -> bool:
    """Whether nothing that generates may be sent: the trainer has the GPUs of a colocated run."""
    known = trainer.pid is not None and trainer.alive is not False
    return settings.colocated and known and trainer.works_at != "ROLLOUT"


def by_phase(server: Server, trainer: Trainer, settings: Settings, now: float) -> Server:
    """The server, as the trainer's phase announces it."""
    why = announced(trainer, settings)
    if server.repair is not None:
        return server
    if why is None:
        ends = server.state is ServerState.PLANNED and server.reason in _BY_PHASE
        return over(server, now) if ends else server
    if server.state is ServerState.SERVING:
        return server.move(ServerState.PLANNED, now, why)
    other = server.state is ServerState.PLANNED and server.reason not in {why, Reason.OPERATOR_PLANNED}
    return replace(server, reason=why, since=now) if other else server


def by_ready(server: Server, event: ServerProbed, now: float) -> Server:
    """
    `/ready` says no and the rest answers: paused, draining or updating, not dead.

    Not believed where it generated with that answer, or failed to when it was asked: SGLang's `/ready` also
    says no after a failed health check, until one succeeds.
    """
    if event.ready is Answer.OK:
        server = replace(server, ready_doubted=False)
    no = event.ready is Answer.UNAVAILABLE and event.model_info is Answer.OK
    if no and server.state is ServerState.SERVING and not (server.ready_doubted or server.failed_health):
        return server.move(ServerState.PLANNED, now, Reason.SERVER_PAUSED)
    if server.state is ServerState.PLANNED and server.reason is Reason.SERVER_PAUSED:
        silent = event.ready is Answer.NOT_OFFERED
        if event.ready is Answer.OK or (silent and server.generated_at == now):
            return over(server, now)
    return server


def by_person(server: Server, for_s: float, now: float) -> Server:
    """The server, announced to be silent for so many seconds, a day at most; 0 takes that back."""
    if not for_s > 0.0:
        ends = server.state is ServerState.PLANNED and server.reason is Reason.OPERATOR_PLANNED
        return over(server, now) if ends else server
    return replace(
        server.move(ServerState.PLANNED, now, Reason.OPERATOR_PLANNED),
        planned_until=now + min(for_s, PLAN_MAX_S),
        since=now,
    )


def over(server: Server, now: float) -> Server:
    """What waited through a planned silence is not late: its time begins now."""
    server = replace(server.move(ServerState.SERVING, now, None), planned_until=None)
    return replace(server, tokens_at=now, unanswered_since=None)


def too_long(server: Server, settings: Settings, now: float) -> bool:
    """
    Whether a planned silence outlasts its lease.

    A server that generates is not silent: one that drains may take its time. An offload lasts as long as the
    trainer's phase, whose own stall is watched.
    """
    if server.state is not ServerState.PLANNED or server.reason is Reason.SERVER_OFFLOADED:
        return False
    since = server.since if server.generated_at is None else max(server.since, server.generated_at)
    if server.reason is Reason.OPERATOR_PLANNED:
        return server.planned_until is not None and now > server.planned_until
    return now - since > settings.planned_lease_s


def excused(server: Server, answers: tuple[Answer, ...]) -> bool:
    """A weight update or an offload may block the parent for a while; a closed port is no such thing."""
    return server.state is ServerState.PLANNED and Answer.REFUSED not in answers
