"""
What is asked when the cheap endpoints leave a doubt: the scheduler itself, and last of all for a token.

The core says what is to be asked (`Server.doubted`, `Server.health_due`), and whoever asks obeys.
A token is asked for only where nothing cheaper shows that the server generates, never twice at once, never of
a server that is silent on purpose, and only while the trainer is at its rollouts.
"""

from dataclasses import replace

from . import planned
from .events import Answer, GenerationAsked, SchedulerAsked
from .reasons import Reason
from .state import Server, ServerState, Settings, Stage, Trainer

DOUBT_AFTER_S = 3.0
ASKED_EVERY_S = 5.0
STUB_S = 0.5
FAILED_HEALTH = 2


def wanted(server: Server, trainer: Trainer, settings: Settings, now: float) -> Server:
    """The server, with what is to be asked of it now."""
    doubted = _doubted(server, trainer, settings, now)
    due = server.health_due and _may_be_asked(server, trainer, settings)
    asked = not due and _health_due(server, trainer, settings, now)
    if doubted == server.doubted and due == server.health_due and not asked:
        return server
    return replace(
        server,
        doubted=doubted,
        unanswered_since=server.unanswered_since if doubted else None,
        health_due=due or asked,
        health_at=now if asked else server.health_at,
    )


def _doubted(server: Server, trainer: Trainer, settings: Settings, now: float) -> bool:
    """
    Whether the scheduler should be asked if it still turns.

    Where requests wait for a token, where a pause has to be told from a freeze, where nothing tells of
    tokens, and where the server is held for and not yet given up.
    """
    said = server.endpoints
    if said.server_info is Answer.NOT_OFFERED and said.loads is Answer.NOT_OFFERED:
        return False
    if planned.hands_off(trainer, settings) or not server.seen:
        return False
    if server.repair is not None:
        return server.repair.stage is Stage.WATCH
    if server.state is ServerState.PLANNED:
        return server.reason is Reason.SERVER_PAUSED
    if server.state is not ServerState.SERVING:
        return False
    if server.tokens is None:
        lately = server.loop_at is not None and now - server.loop_at < ASKED_EVERY_S
        return server.unanswered_since is not None or not lately
    return bool(server.running) and server.tokens_at is not None and now - server.tokens_at > DOUBT_AFTER_S


def _may_be_asked(server: Server, trainer: Trainer, settings: Settings) -> bool:
    """A token may be asked for: it serves, and the trainer, if it says what it does, is at its rollouts."""
    if server.state is not ServerState.SERVING or server.repair is not None:
        return False
    if trainer.pid is None:
        return not settings.colocated
    return trainer.works_at == "ROLLOUT"


def _health_due(server: Server, trainer: Trainer, settings: Settings, now: float) -> bool:
    """Nothing cheaper showed for a whole interval that it generates, and as long ago was it last asked."""
    if server.endpoints.health is Answer.NOT_OFFERED or not _may_be_asked(server, trainer, settings):
        return False
    shown_at = max(at for at in (server.since, server.generated_at, server.health_at) if at is not None)
    return now - shown_at >= settings.health_interval_s


def scheduler(server: Server, event: SchedulerAsked, now: float) -> Server:
    """The scheduler's answer, or its silence, which counts only while it is asked in earnest."""
    stamped = event.loads_stamp is not None and server.loads_stamp is not None
    turned = event.info is Answer.OK or (stamped and event.loads_stamp != server.loads_stamp)
    silent = event.info in {Answer.TIMEOUT, Answer.BROKEN} or (
        event.info is Answer.NOT_OFFERED and stamped and not turned
    )
    unanswered = server.unanswered_since
    if turned:
        unanswered = None
    elif silent and server.doubted and unanswered is None:
        unanswered = now - event.waited_s
    return replace(
        server,
        endpoints=replace(server.endpoints, server_info=event.info, loads=event.loads),
        loop_at=now if turned else server.loop_at,
        loads_stamp=server.loads_stamp if event.loads_stamp is None else event.loads_stamp,
        unanswered_since=unanswered,
    )


def token(server: Server, event: GenerationAsked, now: float) -> tuple[Server, bool]:
    """
    The answer to a request for a token, and whether it has failed too often.

    What began before the server changed its state says nothing about it now. An answer at once comes from a
    stub: SGLang's own takes a second. While tokens flow a failure is the queue's, and not the server's.
    """
    server = replace(server, health_due=False, endpoints=replace(server.endpoints, health=event.answer))
    began = now - event.waited_s
    if server.state is not ServerState.SERVING or server.repair is not None or began < server.since:
        return server, False
    if event.answer is Answer.OK:
        shown = server.generated_at if event.waited_s < STUB_S else now
        return replace(server, failed_health=0, generated_at=shown), False
    flowing = server.generated_at is not None and server.generated_at >= began
    if flowing or event.answer in {Answer.NOT_OFFERED, Answer.UNKNOWN}:
        return replace(server, failed_health=0), False
    server = replace(server, failed_health=server.failed_health + 1)
    return server, server.failed_health >= FAILED_HEALTH


def frozen(server: Server, settings: Settings, now: float) -> bool:
    """
    Whether the scheduler's silence has lasted.

    As long as for requests without a token: soon where no processor is busy either, later where one is, as in
    a long prefill.
    """
    if server.unanswered_since is None:
        return False
    silent_s = now - server.unanswered_since
    idle_s = 0.0 if server.busy_at is None else now - server.busy_at
    return min(silent_s, idle_s) > settings.deadlock_after_s or silent_s > settings.spin_after_s
