"""
What holds the run, and what follows from it: the breaker's phase, the incident, the gate's order.

All of it is worked out of the state after each event; nothing here is asked for by name.
"""

from dataclasses import replace

from . import cluster, levels
from .alerts.facts import evidence
from .breaker import Phase, Trigger, move
from .commands import PublishGate
from .events import (
    OrderAcknowledged,
)
from .reasons import CONTRADICTIONS, Reason
from .state import GateOrder, Incident, Server, ServerState, State
from .turn import Turn

_BEGINNINGS = frozenset({Reason.RECONCILING, Reason.NODES_JOINING})


def healthy(state: State) -> bool:
    """Whether every server may be used, and none is under repair."""
    return all(server.usable and server.repair is None for server in state.servers)


def why_down(state: State) -> Reason | None:
    """
    Why rollouts cannot be had now: fewer servers usable than the quorum asks for.

    Weights that contradict their own label also hold a run with servers enough: nobody knows since when, nor
    which of the others have them.
    """
    if not state.servers:
        return None
    down = [server for server in state.servers if not server.usable]
    for server in down:
        if server.reason in CONTRADICTIONS:
            return server.reason
    if 1.0 - len(down) / len(state.servers) >= state.settings.quorum:
        return None
    return down[0].reason or Reason.SERVER_DIED


def _held(state: State) -> Reason | None:
    """What holds the run, the gravest first; None when nothing does."""
    if state.lockout is not None:
        return state.lockout.reason
    if state.pause is not None:
        return Reason.OPERATOR_PAUSE
    apart = cluster.why_lost(state)
    if apart is not None:
        return apart
    outage = why_down(state)
    if outage is not None:
        return outage
    if state.trip is not None:
        return state.trip.reason
    if state.rollback is not None:
        return state.rollback.reason
    if state.relaunch is not None and not state.relaunch.first:
        return state.relaunch.cause
    return Reason.RECONCILING if state.reconciling else cluster.why_joining(state)


def wanted_order(state: State) -> tuple[GateOrder, Reason | None, int]:
    """The order that the state asks for, why, and the generation that it must have at least."""
    held = _held(state)
    if state.phase is Phase.SHADOW:
        return GateOrder.GO, None, 0
    if state.lockout is not None and state.lockout.stop:
        return GateOrder.STOP, held, 0
    if state.lockout is not None and state.lockout.save_generation is not None:
        return GateOrder.SAVE, held, state.lockout.save_generation
    rollback = state.rollback
    if rollback is not None and rollback.generation is not None:
        return GateOrder.ROLLBACK, rollback.reason, rollback.generation
    generations = [
        server.repair.resync_generation
        for server in state.servers
        if server.repair is not None and server.repair.resync_generation is not None
    ]
    if generations and state.lockout is None:
        return GateOrder.RESYNC, held, max(generations)
    if held is not None:
        return GateOrder.HOLD, held, 0
    return GateOrder.GO, None, 0


def settle(turn: Turn) -> None:
    """Bring the breaker, the incident and the gate in line with what is now known."""
    state = turn.state
    if state.reconciling and all(_looked_at(server) for server in state.servers):
        turn.state = replace(state, reconciling=False)
    _settle_lockout(turn)
    _settle_outage(turn)
    _settle_breaker(turn)
    _settle_gate(turn)


def _looked_at(server: Server) -> bool:
    """Whether a server gave its first word; from then on its own state says whether it may be used."""
    return server.seen and (server.state is not ServerState.STARTING or server.repair is not None)


def _settle_lockout(turn: Turn) -> None:
    """Nobody came: SAVE where the trainer can, then STOP, so that no GPU burns all night."""
    state, now = turn.state, turn.now
    lockout, settings, trainer = state.lockout, state.settings, state.trainer
    if lockout is None or lockout.stop or state.phase is Phase.SHADOW:
        return
    if lockout.saving_since is not None:
        if now - lockout.saving_since > settings.save_timeout_s or trainer.alive is False:
            _stop_trainer(turn, "the trainer did not save in time, and is told to stop")
    elif now - lockout.since > settings.locked_out_hold_s:
        if trainer.handles_save and trainer.alive is not False:
            generation = state.gate.generation + 1
            saving = replace(lockout, save_generation=generation, saving_since=now)
            turn.state = replace(state, lockout=saving)
            turn.note("action", lockout.reason, "nobody came: the trainer is told to save, and then to stop")
        else:
            _stop_trainer(turn, "nobody came: the trainer is told to stop")


def saved(turn: Turn, event: OrderAcknowledged) -> None:
    """The trainer answered SAVE: now it may stop."""
    lockout = turn.state.lockout
    if lockout is None or lockout.save_generation is None or event.generation < lockout.save_generation:
        return
    if event.ok:
        _stop_trainer(turn, "the trainer saved, and is told to stop")
    else:
        _stop_trainer(turn, f"the trainer could not save ({event.detail}), and is told to stop")


def _stop_trainer(turn: Turn, text: str) -> None:
    lockout = turn.state.lockout
    if lockout is not None and not lockout.stop:
        turn.state = replace(turn.state, lockout=replace(lockout, stop=True))
        turn.note("action", lockout.reason, text)


def _settle_outage(turn: Turn) -> None:
    state = turn.state
    if why_down(state) is not None:
        if state.outage_began is None:
            turn.state = replace(state, outage_began=turn.now)
    elif state.outage_began is not None:
        turn.state = replace(state, outage_began=None, outage_ended=turn.now)


def _settle_breaker(turn: Turn) -> None:
    state = turn.state
    held = _held(state)
    if state.phase is Phase.SHADOW:
        _shadow(turn, held)
        return
    if state.lockout is not None and state.phase is not Phase.LOCKED_OUT:
        if state.incident is None:
            _open_incident(turn, state.lockout.reason)
        to(turn, Trigger.GIVE_UP)
    elif held is not None and state.phase in {Phase.CLOSED, Phase.HALF_OPEN}:
        if _starting(state) or held in _BEGINNINGS:
            return  # the first start, or the first look after a restart, is no incident
        _open_incident(turn, held)
        to(turn, Trigger.TRIP)
    elif held is not None and state.phase is Phase.OPEN and state.incident is None:
        # A person let go of a pause, and something else still holds: trouble that began under the pause.
        if not _starting(state) and held not in _BEGINNINGS:
            _open_incident(turn, held)
    elif held is None and state.phase is Phase.OPEN:
        incident = turn.state.incident
        turn.state = replace(
            turn.state,
            probation_left=state.settings.probation_steps,
            probation_rewards=(),
            incident=None if incident is None else replace(incident, resumed_at=turn.now),
        )
        to(turn, Trigger.REPAIRED)
        if incident is not None:
            turn.note("resumed", incident.reason, "the trainer goes on, on probation")


def tripped(state: State, reason: Reason) -> bool:
    """Whether the run is held for this very reason already."""
    return state.trip is not None and state.trip.reason is reason


def _starting(state: State) -> bool:
    """Whether all that holds is a server's first start."""
    down = [server for server in state.servers if not server.usable]
    first = all(
        server.repair is not None and server.repair.cause is Reason.SERVER_STARTING for server in down
    )
    free = (state.trip, state.pause, state.rollback) == (None, None, None)
    free = free and (state.relaunch is None or state.relaunch.first)
    return bool(down) and first and free and cluster.why_lost(state) is None


def _shadow(turn: Turn, held: Reason | None) -> None:
    """In shadow the incident is told and nothing else."""
    if held is not None and turn.state.incident is None and not _starting(turn.state):
        _open_incident(turn, held)
        turn.note("would", held, "would hold the trainer in mode hold")
    elif held is None and turn.state.incident is not None:
        _close_incident(turn)


def _open_incident(turn: Turn, reason: Reason) -> None:
    state = turn.state
    if state.incident is not None:
        turn.note("relapse", reason, f"again: {reason.value}")
        return
    down = next((server.name for server in state.servers if not server.usable), None)
    step = state.trainer.step if state.trip is None else state.trip.onset_step
    number = state.incidents + 1
    incident = Incident(
        number=number,
        reason=reason,
        server=down,
        onset_step=step,
        opened_at=turn.now,
        evidence=evidence(state, reason, turn.event, turn.now),
        before=levels.level(state.recent, before_step=step),
    )
    turn.state = replace(state, incident=incident, incidents=number)
    turn.note("opened", reason, f"held: {reason.value}" + ("" if step is None else f" at step {step}"))


def _close_incident(turn: Turn) -> None:
    incident = turn.state.incident
    if incident is None:
        return
    turn.note("resolved", incident.reason, "the run is well again")
    turn.state = replace(turn.state, incident=None, last_incident=replace(incident, closed_at=turn.now))
    turn.closed = True


def to(turn: Turn, trigger: Trigger) -> None:
    """Move the breaker; a passed probation ends the incident."""
    turn.state = replace(turn.state, phase=move(turn.state.phase, trigger), phase_since=turn.now)
    if trigger is Trigger.PROVEN:
        _close_incident(turn)


def _settle_gate(turn: Turn) -> None:
    """Publish the gate when its order has to change: first of all commands, in one write with a verdict."""
    order, reason, at_least = _agreed_order(turn)
    state = turn.state
    gate = state.gate
    rollback = state.rollback if order is GateOrder.ROLLBACK else None
    why = "" if reason is None else reason.value
    if order is GateOrder.GO and not gate.judged_ok:
        why = gate.reason  # the refusal of the newest batch
    wanted = replace(
        gate,
        order=order,
        reason=why,
        target_step=None if rollback is None else rollback.target_step,
        target_path=None if rollback is None else rollback.target_path,
    )
    if wanted == gate and at_least <= gate.generation:
        if any(isinstance(command, PublishGate) for command in turn.commands):
            _publish_first(turn)
        return
    same_order = gate.order is order and at_least <= gate.generation
    generation = gate.generation if same_order else max(gate.generation + 1, at_least)
    turn.state = replace(state, gate=replace(wanted, generation=generation))
    _publish_first(turn)


def _agreed_order(turn: Turn) -> tuple[GateOrder, Reason | None, int]:
    """The order that the state asks for; where it is GO, a hold until every other machine says so too."""
    state = turn.state
    order, reason, at_least = wanted_order(state)
    if order is not GateOrder.GO or not state.nodes or state.phase is Phase.SHADOW:
        if state.clearing is not None:
            turn.state = replace(state, clearing=None)
        return order, reason, at_least
    if state.gate.order is GateOrder.GO or cluster.agreed(state):
        turn.state = replace(state, clearing=None)
        return order, reason, at_least
    if state.clearing is None:
        turn.state = replace(state, clearing=state.gate.generation + 1)
    return GateOrder.HOLD, Reason.NODES_AGREE, turn.state.clearing or 0


def _publish_first(turn: Turn) -> None:
    rest = [command for command in turn.commands if not isinstance(command, PublishGate)]
    turn.commands = [PublishGate(gate=turn.state.gate), *rest]
