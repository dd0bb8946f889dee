"""
When a server climbs the memory ladder: down at a restart for a shortage, up once at one for something else.

Nothing is restarted for a rung: the next start, for whatever reason, has the arguments.
"""

from dataclasses import replace

from . import memory
from .breaker import Phase
from .memory import Short, Shortage
from .reasons import Reason
from .state import Server
from .turn import Turn

ADVICE = "advice for the trainer: "
"""How a note begins that is for whoever set the trainer up."""

_RELAPSES = frozenset({Reason.SERVER_DIED, Reason.SERVER_HUNG})


def ran_short(turn: Turn, server: Server, shortage: Shortage) -> None:
    """
    Keep that a server ran short, for its next start.

    The word on it may come before the death or after: it counts until the start that follows.
    """
    turn.put(replace(server, short=Short(at=turn.now, shortage=shortage)))


def suspected(turn: Turn, server: Server, reason: Reason) -> Server:
    """A server that dies again in probation, without a word on why, may have been short of memory."""
    relapse = turn.state.phase is Phase.HALF_OPEN and reason in _RELAPSES
    if relapse and server.short is None:
        return replace(server, short=Short(at=turn.now, shortage=Shortage.SUSPECTED))
    return server


def explained(turn: Turn) -> None:
    """The last deaths had another cause than memory."""
    for server in turn.state.servers:
        turn.put(_explained(server))


def chosen(turn: Turn, server: Server, reason: Reason) -> Server:
    """The server with the limits of its next start, told with their reason."""
    if turn.state.suspects.apart:
        server = _explained(server)
    ladder, short, climb = turn.state.settings.ladder, server.short, server.climb
    if short is None:
        higher = memory.up(climb, ladder, turn.now)
        if higher is None:
            return server
        turn.note("action", reason, f"{server.name} goes one rung up again: {_flags(higher)}")
        return replace(server, climb=higher)
    rung = memory.step(climb.limits, short.shortage, ladder, server.sizes)
    if rung.limits is None:
        climb = replace(climb, short_at=turn.now)
        if short.shortage is not Shortage.SUSPECTED:
            text = f"{server.name} ran out of {short.shortage.value}, and no rung is left: {rung.words}"
            turn.note("call", reason, text)
    else:
        climb = replace(climb, limits=rung.limits, short_at=turn.now)
        text = f"{server.name} ran out of {short.shortage.value}: {rung.words}"
        turn.note("action", reason, text)
    advice = memory.advice(short.shortage, climb.limits)
    turn.note("action", reason, f"{ADVICE}{advice}")
    return replace(server, climb=climb, short=None)


def _explained(server: Server) -> Server:
    guessed = server.short is not None and server.short.shortage is Shortage.SUSPECTED
    return replace(server, short=None) if guessed else server


def _flags(climb: memory.Climb) -> str:
    flags = memory.arguments(climb)
    return " ".join(f"{flag} {value}" for flag, value in flags) or "its own arguments"
