"""
The one function that decides: `decide(state, event, now) -> (state, commands)`.

Pure: no clock, I/O, randomness or logging. The live daemon, `replay`, the simulator and every test call it,
and nothing else makes a command.

The gate's order is never set by hand: it is worked out of the state after each event, so that a hold ends
exactly when nothing asks for it any more.
"""

from dataclasses import replace
from typing import assert_never

from . import (
    batches,
    budget,
    checkpoints,
    cluster,
    fleet,
    holding,
    opinions,
    people,
    planned,
    poison,
    probation,
    recovery,
    relaunch,
    rollbacks,
    rungs,
    stall,
    surroundings,
    unguarded,
    weights,
)
from .breaker import Phase
from .commands import Command, PublishGate
from .events import (
    Answer,
    BatchReported,
    CallsHung,
    CheckpointGone,
    CheckpointPinned,
    CheckpointSaved,
    CheckpointVetted,
    DaemonStarted,
    EffectEnded,
    Event,
    GenerationAsked,
    GpuTroubled,
    LogRead,
    LogSeen,
    MemoryPressed,
    NodeAcknowledged,
    NodeJoined,
    NodeLost,
    OomSeen,
    OperatorAsked,
    OrderAcknowledged,
    ProcessExited,
    RequestsFailed,
    RewardLogged,
    RolloutsLost,
    SchedulerAsked,
    ServerProbed,
    StepCommitted,
    Tick,
    TrainerExited,
    TrainerLeft,
    TrainerSeen,
    TrainerTree,
    TreeSampled,
    TreeSeen,
)
from .memory import SHORTAGES
from .reasons import Reason
from .state import (
    REWARDS_KEPT,
    GateOrder,
    Hands,
    Mode,
    Server,
    ServerState,
    State,
)
from .turn import Turn

FAILED_REQUESTS = 8


def decide(state: State, event: Event, now: float) -> tuple[State, tuple[Command, ...]]:
    """
    The state after an event, and what to do about it.

    Args:
        state: everything known before the event.
        event: what happened.
        now: seconds of the monotonic clock; never less than at the call before.

    Returns:
        The next state, and commands in the order in which they are to be carried out: the gate first.

    Raises:
        InvariantError: a bug of the core; the daemon ends, and holds whatever it held.

    """
    turn = Turn(state, event, now)
    _take_in(turn, event)
    batches.settle_trip(turn)
    holding.settle(turn)
    unguarded.settle(turn)
    return turn.finish()


def _take_in(turn: Turn, event: Event) -> None:
    match event:
        case Tick():
            _on_tick(turn)
        case BatchReported():
            batches.reported(turn, event)
        case RolloutsLost():
            poison.lost(turn, event)
        case CallsHung():
            batches.calls_hung(turn, event)
        case StepCommitted():
            _on_step(turn, event)
        case TrainerSeen():
            _on_trainer(turn, event)
        case (
            ServerProbed()
            | TreeSampled()
            | ProcessExited()
            | TreeSeen()
            | SchedulerAsked()
            | GenerationAsked()
        ):
            _on_server(turn, event)
        case RequestsFailed():
            _on_requests(turn, event)
        case EffectEnded():
            _on_effect(turn, event)
        case OrderAcknowledged():
            _on_ack(turn, event)
        case RewardLogged():
            _on_logged(turn, event)
        case CheckpointSaved() | CheckpointVetted() | CheckpointPinned() | CheckpointGone():
            _on_checkpoint(turn, event)
        case OomSeen():
            _on_oom(turn, event)
        case GpuTroubled() | LogSeen() | LogRead() | MemoryPressed():
            surroundings.seen(turn, event)
        case TrainerExited():
            relaunch.exited(turn, event)
        case TrainerLeft():
            relaunch.goodbye(turn, event)
        case TrainerTree():
            relaunch.tree(turn, event)
        case NodeJoined():
            _on_join(turn, event)
        case NodeAcknowledged():
            cluster.acknowledged(turn, event)
        case NodeLost():
            cluster.lost(turn, event)
        case OperatorAsked():
            people.asked(turn, event)
        case DaemonStarted():
            _on_start(turn, event)
        case _:
            assert_never(event)


_OfServer = ServerProbed | TreeSampled | ProcessExited | TreeSeen | SchedulerAsked | GenerationAsked


def _on_server(turn: Turn, event: _OfServer) -> None:
    server = turn.server(event.server)
    if server is None:
        return
    match event:
        case ServerProbed():
            server, suspicion = fleet.probed(server, event, turn.state.trainer, turn.state.settings, turn.now)
            if suspicion is None:
                server, suspicion = weights.version_seen(turn, server, event)
            if server.node is not None and _never_started(server):
                suspicion = None  # whether it runs, the agent of its machine will say
        case TreeSampled():
            server, suspicion = fleet.sampled(server, event, turn.now)
        case ProcessExited():
            server, suspicion = fleet.process_exited(server, event)
        case SchedulerAsked():
            server, suspicion = fleet.asked(server, event, turn.now)
        case GenerationAsked():
            server, suspicion = fleet.generated(server, event, turn.now)
        case TreeSeen():
            server, suspicion = fleet.tree_seen(server, event.procs)
            if not event.procs and _never_started(server):
                recovery.start_first(turn, server)
                return
    if suspicion is not None:
        recovery.suspect(turn, server, suspicion)
        return
    turn.put(server)
    if isinstance(event, ServerProbed):
        _first_word(turn, server, event)
        recovery.probed(turn, server, event)
    elif isinstance(event, TreeSampled):
        recovery.sampled(turn, server, event)


def _on_join(turn: Turn, event: NodeJoined) -> None:
    away = [server.name for server in turn.state.servers if cluster.away(turn.state, server)]
    cluster.joined(turn, event)
    for name in away:
        server = turn.server(name)
        if server is not None:
            recovery.in_reach(turn, server)


def _never_started(server: Server) -> bool:
    new = server.state is ServerState.STARTING and server.repair is None
    return server.managed and server.hands is Hands.OWN and new


def _first_word(turn: Turn, server: Server, event: ServerProbed) -> None:
    """A server that was running before the daemon came is taken as it is: its run is not held to look."""
    if server.state is ServerState.STARTING and server.repair is None and event.model_info is Answer.OK:
        if turn.state.reconciling:
            recovery.verify(turn, server, Reason.RECONCILING)
        else:
            turn.put(server.move(ServerState.SERVING, turn.now, None))


def _on_oom(turn: Turn, event: OomSeen) -> None:
    """Told, and kept for the next start of the server that it befell."""
    surroundings.seen(turn, event)
    server = None if event.server is None else turn.server(event.server)
    shortage = SHORTAGES.get(event.kind.value)
    if server is not None and shortage is not None:
        rungs.ran_short(turn, server, shortage)


def _on_effect(turn: Turn, event: EffectEnded) -> None:
    rollback = turn.state.rollback
    if rollback is not None and rollback.intent == event.intent:
        rollbacks.target_found(turn, rollback, event)
        return
    under_way = turn.state.relaunch
    if under_way is not None and under_way.intent == event.intent:
        relaunch.effect_ended(turn, under_way, event)
        return
    if unguarded.ended(turn, event):
        return
    for server in turn.state.servers:
        recovery.effect_ended(turn, server, event)


def _on_ack(turn: Turn, event: OrderAcknowledged) -> None:
    rollback = turn.state.rollback
    ordered = rollback is not None and rollback.generation is not None
    if event.order == GateOrder.ROLLBACK.value and rollback is not None and ordered:
        if event.generation >= (rollback.generation or 0):
            rollbacks.rolled_back(turn, rollback, event.ok, event.detail)
        return
    if event.order == GateOrder.SAVE.value:
        holding.saved(turn, event)
        return
    for server in turn.state.servers:
        weights.acknowledged(turn, server, event)


def _on_trainer(turn: Turn, event: TrainerSeen) -> None:
    old, now = turn.state.trainer, turn.now
    new_version = event.weight_version != old.weight_version
    turn.state = replace(
        turn.state,
        trainer=replace(
            old,
            pid=event.pid,
            alive=True if event.pid != old.pid or old.alive is None else old.alive,
            attempt=event.attempt,
            step=event.step,
            phase=event.phase,
            works_at=old.works_at if event.phase == "HELD" else event.phase,
            phase_at=now if event.phase != old.phase or old.phase_at is None else old.phase_at,
            beats=event.beats,
            beats_at=now if event.beats != old.beats else old.beats_at,
            progress=event.progress,
            progress_at=now if event.progress != old.progress else old.progress_at,
            acked_generation=event.acked_generation,
            weight_version=event.weight_version,
            version_at=now if new_version or old.version_at is None else old.version_at,
            handles_resync=event.handles_resync,
            handles_rollback=event.handles_rollback,
            handles_save=event.handles_save,
        ),
    )
    _announce(turn)
    relaunch.seen(turn, event, old)
    stall.seen(turn)


def _announce(turn: Turn) -> None:
    """The trainer's phase says which servers are silent on purpose, and when what was left open is proven."""
    for server in turn.state.servers:
        after = planned.by_phase(server, turn.state.trainer, turn.state.settings, turn.now)
        after = opinions.wanted(after, turn.state.trainer, turn.state.settings, turn.now)
        turn.put(after)
        if after.owes_proof and after.state is ServerState.SERVING:
            after = replace(after, owes_proof=False)
            turn.put(after)
            recovery.verify(turn, after, Reason.SERVER_RETURNED)


def _on_requests(turn: Turn, event: RequestsFailed) -> None:
    """
    A streak of its own, apart from the probes': the trainer's requests fail, one after the other.

    They may fail for the trainer's own reasons, so nothing is concluded: each server has to generate, and the
    run is held until it did. Looked at again when the streak has doubled.
    """
    trainer = turn.state.trainer
    if event.attempt < trainer.attempt:
        return
    many = event.in_a_row >= max(FAILED_REQUESTS, 2 * trainer.verified_at_failures)
    looked_at = event.in_a_row if many else trainer.verified_at_failures
    turn.state = replace(
        turn.state,
        trainer=replace(
            trainer,
            failed_requests=event.in_a_row,
            verified_at_failures=looked_at if event.in_a_row else 0,
        ),
    )
    if many:
        for server in turn.state.servers:
            recovery.verify(turn, server, Reason.REQUESTS_FAILED)


def _on_checkpoint(
    turn: Turn, event: CheckpointSaved | CheckpointVetted | CheckpointPinned | CheckpointGone
) -> None:
    match event:
        case CheckpointSaved():
            checkpoints.saved(turn, event)
        case CheckpointVetted():
            checkpoints.vetted(turn, event)
        case CheckpointPinned():
            checkpoints.pinned(turn, event)
        case CheckpointGone():
            checkpoints.gone(turn, event)


def _on_step(turn: Turn, event: StepCommitted) -> None:
    state = turn.state
    turn.state = replace(
        state,
        trainer=replace(state.trainer, committed_step=event.step, launches_without_step=0, rank_lost_at=None),
        rewards=(*state.rewards, event.reward)[-REWARDS_KEPT:],
        metrics=event.metrics,
    )
    probation.stepped(turn, event)


def _on_logged(turn: Turn, event: RewardLogged) -> None:
    """A row of a trainer without the guard is also its word that the step was taken."""
    batches.logged(turn, event)
    trainer = turn.state.trainer
    if trainer.pid is None:
        step = StepCommitted(
            attempt=trainer.launches, step=event.step, reward=event.reward, metrics=event.metrics
        )
        _on_step(turn, step)


def _on_tick(turn: Turn) -> None:
    for server in turn.state.servers:
        judged, suspicion = fleet.ticked(server, turn.state.trainer, turn.state.settings, turn.now)
        if suspicion is not None:
            recovery.suspect(turn, judged, suspicion)
        else:
            turn.put(judged)
            recovery.ticked(turn, judged)
    rollbacks.wait(turn)
    relaunch.ticked(turn)
    stall.ticked(turn)
    people.remind(turn)
    _reset_budgets(turn)


def _reset_budgets(turn: Turn) -> None:
    for server in turn.state.servers:
        if server.state is ServerState.SERVING and server.budget.streak and turn.state.phase is Phase.CLOSED:
            kept = budget.recovered(
                server.budget, now=turn.now, healthy_reset_s=turn.state.settings.healthy_reset_s
            )
            if kept is not server.budget:
                turn.put(replace(server, budget=kept))
    trainer = turn.state.trainer
    if trainer.budget.streak and trainer.alive and turn.state.phase is Phase.CLOSED:
        calm = budget.recovered(
            trainer.budget, now=turn.now, healthy_reset_s=turn.state.settings.healthy_reset_s
        )
        if calm is not trainer.budget:
            turn.state = replace(turn.state, trainer=replace(trainer, budget=calm))


def _on_start(turn: Turn, event: DaemonStarted) -> None:
    """
    Take up the page where it stands.

    A hold that the journal has no reason for (its last rows were lost) is kept until every server was
    looked at and has generated; a generation never goes back.
    """
    newer = event.gate_generation > turn.state.gate.generation
    ordered = rollbacks.already_ordered(turn, event)
    state = turn.state
    gate = state.gate
    if ordered:
        gate = replace(
            gate,
            order=GateOrder.ROLLBACK,
            generation=event.gate_generation,
            target_step=event.target_step,
            target_path=event.target_path,
        )
    elif newer:
        gate = replace(gate, generation=event.gate_generation + 1)
    gate = replace(gate, judged_batch=max(gate.judged_batch, event.judged_batch))
    unexplained = event.gate_order != GateOrder.GO.value and holding.wanted_order(state)[0] is GateOrder.GO
    reconciling = (unexplained or state.reconciling) and state.mode is not Mode.SHADOW
    turn.state = replace(
        state,
        gate=gate,
        reconciling=reconciling,
        stall=stall.forgotten(state.stall),
        servers=tuple(replace(server, seen=False) for server in state.servers),
    )
    if reconciling:
        for server in turn.state.servers:
            if server.state is not ServerState.STARTING:  # that one waits for its first word
                recovery.verify(turn, server, Reason.RECONCILING)
    turn.commands.append(PublishGate(gate=gate))
    if newer and state.nodes:
        cluster.overtake(turn, gate.generation)
    poison.retell(turn)
