"""What a person may ask for, by name and with a reason."""

from dataclasses import replace

from . import budget, holding, planned, recovery, relaunch, reward, rollbacks
from .breaker import Phase, Trigger
from .events import (
    OperatorAsked,
)
from .reasons import Reason
from .state import (
    Mode,
    Pause,
    ServerState,
    Stage,
    State,
)
from .turn import Turn

HOUR_S = 3600.0
REMINDED_AFTER_H = 4


def asked(turn: Turn, event: OperatorAsked) -> None:
    """Do what a person asked for, and say by whom."""
    state, now = turn.state, turn.now
    by = f"{event.who}: {event.why}" if event.why else event.who
    match event.verb:
        case "pause":
            if state.phase not in {Phase.FORCED_OPEN, Phase.LOCKED_OUT}:
                turn.state = replace(state, pause=Pause(who=event.who, why=event.why, since=now))
                holding.to(turn, Trigger.PAUSE)
                turn.note("person", Reason.OPERATOR_PAUSE, f"paused by {by}")
        case "resume":
            _resume(turn, by)
        case "rollback":
            before = event.before_step if event.before_step is not None else _incident_step(state)
            turn.note("person", Reason.OPERATOR_ROLLBACK, f"rollback to before step {before} asked by {by}")
            rollbacks.begin(turn, before, Reason.OPERATOR_ROLLBACK)
        case "restart-server":
            for server in state.servers:
                if event.server in {None, server.name} and server.managed:
                    turn.note("person", Reason.OPERATOR_RESTART, f"restart of {server.name} asked by {by}")
                    refilled = replace(server, repair=None, budget=budget.Budget())
                    recovery.restart(turn, refilled, Reason.OPERATOR_RESTART)
        case "plan-server":
            _plan(turn, event, by)
        case "ack":
            if state.incident is not None:
                turn.state = replace(state, incident=replace(state.incident, known_to=by))
                turn.note("acked", Reason.OPERATOR_ACK, f"known to {by}: silent until it ends or gets worse")
        case "mode":
            known = {mode.value: mode for mode in Mode}
            if event.mode in known:
                _change_mode(turn, known[event.mode], by)
            else:
                turn.note("person", Reason.UNKNOWN_VERB, f"unknown mode {event.mode!r} asked by {by}")
        case _:
            turn.note("person", Reason.UNKNOWN_VERB, f"unknown request {event.verb!r} by {by}")


def remind(turn: Turn) -> None:
    """
    Tell of a pause that goes on: it is no incident and wakes nobody, and one that was forgotten burns GPUs.

    Where an incident is open as well, its own repetition says that the run is held.
    """
    state, pause = turn.state, turn.state.pause
    if pause is None or state.incident is not None:
        return
    hours = int((turn.now - pause.since) / HOUR_S)
    if hours < REMINDED_AFTER_H * (pause.reminders + 1):
        return
    turn.state = replace(state, pause=replace(pause, reminders=hours // REMINDED_AFTER_H))
    by = f"{pause.who}: {pause.why}" if pause.why else pause.who
    turn.note("person", Reason.OPERATOR_PAUSE, f"still paused after {hours} h, by {by}")


def _resume(turn: Turn, by: str) -> None:
    """
    A person lets go of whatever holds, and answers for it.

    Soft evidence and unproven weights are set aside, and a tripped reward becomes the new normal.
    What cannot be let go of: a dead server, and a rollback that the trainer was already told of.
    """
    state = turn.state
    if state.phase in {Phase.FORCED_OPEN, Phase.LOCKED_OUT}:
        holding.to(turn, Trigger.RELEASE)
        if state.mode is Mode.SHADOW:
            holding.to(turn, Trigger.SHADOW_ON)
    judge = state.reward if state.trip is None else reward.acknowledge(state.reward)
    ordered = state.rollback is not None and state.rollback.generation is not None
    ordered = ordered and state.mode is not Mode.SHADOW
    turn.state = replace(
        turn.state,
        pause=None,
        lockout=None,
        trip=None,
        rollback=state.rollback if ordered else None,
        retries=budget.Budget(),
        reward=judge,
        reconciling=False,
    )
    turn.note("person", Reason.OPERATOR_RESUME, f"resumed by {by}")
    for server in turn.state.servers:
        recovery.accept(turn, server)
    relaunch.resumed(turn)


def _plan(turn: Turn, event: OperatorAsked, by: str) -> None:
    """Somebody answers for a server's silence: soft evidence against it is set aside until then."""
    for_s = event.for_s or 0.0
    for server in turn.state.servers:
        if event.server not in {None, server.name}:
            continue
        soft = server.repair is not None and server.repair.stage in {Stage.WATCH, Stage.CANARY}
        let_go = server.state is ServerState.SUSPECT and soft and for_s > 0.0
        if (server.repair is None or let_go) and server.state in _PLANNABLE:
            turn.put(planned.by_person(replace(server, repair=None), for_s, turn.now))
            what = f"silent on purpose for {for_s:g} s" if for_s > 0.0 else "expected to serve again"
            turn.note("person", Reason.OPERATOR_PLANNED, f"{server.name} is {what}, says {by}")


_PLANNABLE = frozenset({ServerState.SERVING, ServerState.SUSPECT, ServerState.PLANNED})


def _incident_step(state: State) -> int:
    """Where an operator's rollback without a step goes: before the incident, else before the newest step."""
    for incident in (state.incident, state.last_incident):
        if incident is not None and incident.onset_step is not None:
            return incident.onset_step
    return state.trainer.committed_step if state.trainer.committed_step is not None else 0


def _change_mode(turn: Turn, mode: Mode, by: str) -> None:
    state = turn.state
    if mode is state.mode:
        return
    if mode is Mode.SHADOW and state.phase is not Phase.FORCED_OPEN and state.phase is not Phase.LOCKED_OUT:
        holding.to(turn, Trigger.SHADOW_ON)
        turn.state = replace(turn.state, rollback=None)  # an order that is no longer given ends by nothing
    elif state.phase is Phase.SHADOW:
        holding.to(turn, Trigger.SHADOW_OFF)
    turn.state = replace(turn.state, mode=mode)
    turn.note("person", Reason.OPERATOR_MODE, f"mode {mode.value} set by {by}")
    if mode is Mode.ACT:
        for server in turn.state.servers:
            if server.state is ServerState.DEAD and server.managed and server.repair is None:
                recovery.restart(turn, server, server.reason or Reason.SERVER_DIED)
