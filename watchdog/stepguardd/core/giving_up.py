"""What is left when no remedy is: the run goes on without a server, or is held until a person decides."""

from dataclasses import replace

from . import holding
from .reasons import Reason
from .state import Lockout, Server, ServerState
from .turn import Turn


def give_up(turn: Turn, server: Server, reason: Reason) -> None:
    """
    Nothing is left to try for this server: a person is called.

    Where the others suffice the run goes on without it; else the run is locked out. One that was being
    started counts as dead from here: without a repair nobody would prove it.
    """
    server = replace(server, repair=None)
    if server.state is not ServerState.STALE:
        server = server.move(ServerState.DEAD, turn.now, reason)
    turn.put(server)
    if holding.why_down(turn.state) is None:
        turn.note("call", reason, f"{server.name} is given up: {reason.value}; the others go on without it")
    else:
        lock_out(turn, reason)


def lock_out(turn: Turn, reason: Reason) -> None:
    """Nothing is left to try: hold, and call a person."""
    if turn.state.lockout is None:
        turn.state = replace(turn.state, lockout=Lockout(reason=reason, since=turn.now))
        turn.note("locked_out", reason, f"locked out: {reason.value}; a person has to decide")
