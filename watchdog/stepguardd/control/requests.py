"""Which of a person's requests make sense now. Pure; the others are refused with why, and what would help."""

from ..core.events import OperatorAsked
from ..core.state import Mode, State
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
    elif request.verb == "rollback":
        if state.trainer.pid is None:
            raise Refused("no trainer reports to this run; start it with STEPGUARD_RUN_DIR set")
        if not state.trainer.handles_rollback:
            raise Refused("the trainer registered no on_rollback: relaunch it from a checkpoint instead")
        if state.rollback is not None:
            raise Refused("a rollback is under way already")
    elif request.verb == "ack":
        raise Refused("there is nobody to tell yet: alerts are not part of this version")
    elif request.verb == "mode" and request.mode not in {mode.value for mode in Mode}:
        raise Refused(f"no mode {request.mode!r}; there is shadow, hold and act")
