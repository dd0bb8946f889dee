"""Which of a person's requests make sense now. Pure; the others are refused with why, and what would help."""

from ..core.events import OperatorAsked
from ..core.state import Mode, ServerState, State
from .contract import Refused


def refuse_nonsense(state: State, request: OperatorAsked) -> None:
    """
    Let a request pass that can be done.

    Raises:
        Refused: it makes no sense now; the message says why and what would.

    """
    names = [server.name for server in state.servers if server.managed]
    if request.verb == "restart-server":
        if not names:
            raise Refused("no server of this run is Stepguard's to restart")
        if request.server is not None and request.server not in names:
            raise Refused(f"no server {request.server!r} to restart; there is {', '.join(names)}")
    elif request.verb == "plan-server":
        _refuse_plan(state, request)
    elif request.verb == "rollback":
        managed = state.settings.trainer_managed
        if state.trainer.pid is None and not managed:
            raise Refused("no trainer reports to this run; start it with STEPGUARD_RUN_DIR set")
        if not state.trainer.handles_rollback and not managed:
            raise Refused(
                "the trainer registered no on_rollback, and none is Stepguard's to start: stop it, and use "
                "stepguard checkpoints rollback; or see [trainer]"
            )
        if state.rollback is not None or state.relaunch is not None:
            raise Refused("a rollback or relaunch is under way already")
    elif request.verb == "ack":
        _refuse_ack(state, request)
    elif request.verb == "mode" and request.mode not in {mode.value for mode in Mode}:
        raise Refused(f"no mode {request.mode!r}; there is shadow, hold and act")


def incident_number(given: object) -> int | None:
    """
    The incident that a request names, as people write it: 3, "3" or "#3".

    Raises:
        Refused: it is no number.

    """
    if given is None:
        return None
    digits = str(given).removeprefix("#")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 9):
        raise Refused(f"no incident {str(given)[:20]!r}; it is a number, as `stepguard status` shows it")
    return int(digits)


def _refuse_plan(state: State, request: OperatorAsked) -> None:
    """A silence can be announced of a server that lives; a dead one is no matter of silence."""
    named = [server for server in state.servers if request.server in {None, server.name}]
    if not named:
        there = ", ".join(server.name for server in state.servers) or "none"
        raise Refused(f"no server {request.server or ''!r} in this run; there is {there}")
    gone = {ServerState.DEAD, ServerState.RESTARTING, ServerState.STALE}
    if all(server.state in gone or server.state is ServerState.STARTING for server in named):
        states = ", ".join(f"{server.name} is {server.state.value}" for server in named)
        raise Refused(f"{states}: only a server that serves can be silent on purpose")


def _refuse_ack(state: State, request: OperatorAsked) -> None:
    incident = state.incident
    if incident is None:
        raise Refused("no incident is open: there is nothing to acknowledge")
    if request.incident is not None and request.incident != incident.number:
        raise Refused(f"incident {request.incident} is not open; the open one is {incident.number}")
    if not request.why:
        raise Refused("say why: the next person on call reads it")
