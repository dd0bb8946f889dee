"""
A trainer without the guard reads no order: it is held by its requests, which wait in paused servers.

Like the gate's order this is worked out of the state after each event. A server is to be paused while the run
is held, that server is well, and the trainer's requests have time left; whatever else was paused is lifted.
A server under repair is never paused: its canary has to be answered, and SGLang 0.5.23 dies of two loads of
weights into a paused server.
"""

from dataclasses import replace

from . import planned
from .breaker import Phase
from .commands import ContinueGeneration, PauseGeneration
from .events import Answer, DaemonStarted, EffectEnded, ServerProbed
from .reasons import Reason
from .state import GateOrder, Halt, Halted, Server, ServerState, State
from .turn import Turn

RETRY_S = 2.0
_HELD = frozenset({Phase.OPEN, Phase.FORCED_OPEN, Phase.LOCKED_OUT})


def known(state: State) -> bool:
    """Whether the run has a trainer of which only its log or its processes are known."""
    trainer = state.trainer
    return trainer.pid is None and (state.stream_step is not None or bool(trainer.procs))


def bound_s(state: State) -> float:
    """
    How long a hold may pause a server: the trainer's requests must not time out in it.

    Half of their time, because those that were open already have used some of it.
    """
    return min(state.settings.request_timeout_s, state.settings.planned_lease_s) / 2


def of(state: State, server: str) -> Halt | None:
    """What is known of our pause of a server; None where this hold has not paused it."""
    return next((halt for halt in state.halts if halt.server == server), None)


def paused(state: State, server: str) -> bool:
    """Whether a server may be paused by us."""
    halt = of(state, server)
    return halt is not None and halt.stage is not Halted.LIFTED


def settle(turn: Turn) -> None:
    """Bring the pauses in line with what is now known."""
    held = _held(turn.state)
    if not held and not turn.state.halts:
        return
    for server in turn.state.servers:
        halt = of(turn.state, server.name)
        wanted = held and _may_wait(server)
        if halt is None:
            if wanted:
                _pause(turn, server, Halt(server=server.name, since=turn.now, at=turn.now))
            continue
        late = turn.now - halt.since > bound_s(turn.state)
        if late and held and not halt.over:
            halt = _over(
                turn, halt, f"after {bound_s(turn.state):g} s, before the trainer's requests time out"
            )
        _one(turn, server, halt, wanted=wanted and not halt.over, held=held)


def _one(turn: Turn, server: Server, halt: Halt, *, wanted: bool, held: bool) -> None:
    if halt.stage is Halted.PAUSED:
        if not wanted:
            _lift(turn, server, halt)
        elif isinstance(turn.event, DaemonStarted):
            _pause(turn, server, halt)  # the daemon that ended well lifted it
        elif _lifted_by_others(turn, halt):
            halt = _over(turn, halt, f"somebody else continued {halt.server}")
            _keep(turn, replace(halt, stage=Halted.LIFTED, at=turn.now))
    elif halt.stage is Halted.LIFTED:
        if wanted:
            _pause(turn, server, halt)
        elif not held:
            turn.state = replace(
                turn.state, halts=tuple(one for one in turn.state.halts if one.server != server.name)
            )


def ended(turn: Turn, event: EffectEnded) -> bool:
    """Take in the outcome of a pause or of its end; whether it was one."""
    halt = next((one for one in turn.state.halts if one.intent == event.intent), None)
    server = None if halt is None else turn.server(halt.server)
    if halt is None or server is None:
        return halt is not None
    if halt.stage is Halted.PAUSING:
        # One that failed may have been obeyed all the same: it is lifted like any other.
        _keep(turn, replace(halt, stage=Halted.PAUSED, intent=None, at=turn.now, over=not event.ok))
        if event.ok and server.state is ServerState.SERVING:
            turn.put(server.move(ServerState.PLANNED, turn.now, Reason.SERVER_PAUSED))
        elif not event.ok:
            _tell(turn, f"{server.name} could not be paused: {event.detail}")
    elif event.ok:
        _keep(turn, replace(halt, stage=Halted.LIFTED, intent=None, again_at=None, at=turn.now))
        if server.state is ServerState.PLANNED and server.reason is Reason.SERVER_PAUSED:
            turn.put(planned.over(server, turn.now))
    else:
        again_at = turn.now + RETRY_S
        _keep(turn, replace(halt, stage=Halted.PAUSED, intent=None, again_at=again_at, at=turn.now))
    return True


def _held(state: State) -> bool:
    """Whether the run is held, and its trainer can be held by nothing but its requests."""
    if state.phase not in _HELD or state.gate.order is GateOrder.GO or not known(state):
        return False
    if state.settings.request_timeout_s == 0.0:
        return False
    return state.relaunch is None and state.trainer.alive is not False


def _may_wait(server: Server) -> bool:
    serving = server.state is ServerState.SERVING
    ours = server.state is ServerState.PLANNED and server.reason is Reason.SERVER_PAUSED
    return server.repair is None and (serving or ours)


def _pause(turn: Turn, server: Server, halt: Halt) -> None:
    first = halt.stage is Halted.LIFTED and halt.intent is None and of(turn.state, server.name) is None
    if first and server.state is not ServerState.SERVING:
        return  # somebody else's pause, and theirs to end
    if not turn.state.halts:
        _tell(
            turn,
            "the trainer has no guard: its requests wait in paused servers, "
            f"for {bound_s(turn.state):g} s at most",
        )
    intent = turn.intent("pause")
    _keep(turn, replace(halt, stage=Halted.PAUSING, intent=intent, at=turn.now))
    turn.commands.append(PauseGeneration(intent=intent, server=server.name))


def _lift(turn: Turn, server: Server, halt: Halt) -> None:
    """Once it answers: one that does not may be dead, and its pause with it."""
    answers = server.failed_probes == 0 and server.endpoints.model_info is Answer.OK
    if not answers or (halt.again_at is not None and turn.now < halt.again_at):
        return
    intent = turn.intent("continue-generation")
    _keep(turn, replace(halt, stage=Halted.LIFTING, intent=intent, at=turn.now))
    turn.commands.append(ContinueGeneration(intent=intent, server=server.name))


def _lifted_by_others(turn: Turn, halt: Halt) -> bool:
    """A trainer ends its own pauses for new weights, and ours with them: nobody fights it for that."""
    event = turn.event
    seen = isinstance(event, ServerProbed) and event.server == halt.server and event.ready is Answer.OK
    return seen and turn.now - halt.at > 4 * turn.state.settings.interval_s


def _over(turn: Turn, halt: Halt, why: str) -> Halt:
    """A hold pauses its server no more. Told once, of the first one."""
    if not any(one.over for one in turn.state.halts):
        _tell(turn, f"the trainer without a guard goes on although the run is held: {why}", what="call")
    halt = replace(halt, over=True)
    _keep(turn, halt)
    return halt


def _tell(turn: Turn, text: str, what: str = "action") -> None:
    incident = turn.state.incident
    turn.note(what, Reason.OPERATOR_PAUSE if incident is None else incident.reason, text)


def _keep(turn: Turn, halt: Halt) -> None:
    others = [one for one in turn.state.halts if one.server != halt.server]
    turn.state = replace(turn.state, halts=(*others, halt))
