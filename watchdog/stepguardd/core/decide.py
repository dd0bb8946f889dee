"""
The one function that decides: `decide(state, event, now) -> (state, commands)`.

Pure: no clock, I/O, randomness or logging. The live daemon, `replay`, the simulator and every test call it,
and nothing else makes a command.

The gate's order is never set by hand: it is worked out of the state after each event, so that a hold ends
exactly when nothing asks for it any more.
"""

from dataclasses import replace
from typing import assert_never

from . import budget, fleet, recovery, reward
from .breaker import Phase, Trigger, move
from .commands import Command, PrepareRollback, PublishGate
from .events import (
    Answer,
    BatchReported,
    CheckpointSaved,
    DaemonStarted,
    EffectEnded,
    Event,
    OperatorAsked,
    OrderAcknowledged,
    ProcessExited,
    RewardLogged,
    ServerProbed,
    StepCommitted,
    Tick,
    TrainerExited,
    TrainerSeen,
    TreeSampled,
    TreeSeen,
)
from .reasons import Reason
from .state import (
    CHECKPOINTS_KEPT,
    REWARDS_KEPT,
    GateOrder,
    Incident,
    Mode,
    Pause,
    Rollback,
    Saved,
    Server,
    ServerState,
    State,
    Trip,
)
from .turn import Turn


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
    turn = Turn(state, now)
    _take_in(turn, event)
    _settle(turn)
    return turn.finish()


def _take_in(turn: Turn, event: Event) -> None:
    match event:
        case Tick():
            _on_tick(turn)
        case BatchReported():
            _on_batch(turn, event)
        case StepCommitted():
            _on_step(turn, event)
        case TrainerSeen():
            _on_trainer(turn, event)
        case ServerProbed() | TreeSampled() | ProcessExited() | TreeSeen():
            _on_server(turn, event)
        case EffectEnded():
            _on_effect(turn, event)
        case OrderAcknowledged():
            _on_ack(turn, event)
        case RewardLogged():
            _on_logged(turn, event)
        case CheckpointSaved():
            saved = Saved(attempt=event.attempt, step=event.step, path=event.path)
            kept = (*turn.state.checkpoints, saved)[-CHECKPOINTS_KEPT:]
            turn.state = replace(turn.state, checkpoints=kept)
        case TrainerExited():
            _on_trainer_exit(turn, event)
        case OperatorAsked():
            _on_operator(turn, event)
        case DaemonStarted():
            _on_start(turn, event)
        case _:
            assert_never(event)


# ---- servers ---------------------------------------------------------------------------------------


def _on_server(turn: Turn, event: ServerProbed | TreeSampled | ProcessExited | TreeSeen) -> None:
    server = turn.server(event.server)
    if server is None:
        return
    match event:
        case ServerProbed():
            server, suspicion = fleet.probed(server, event, turn.state.trainer, turn.state.settings, turn.now)
        case TreeSampled():
            server, suspicion = fleet.sampled(server, event, turn.now)
        case ProcessExited():
            server, suspicion = fleet.process_exited(server, event)
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


def _never_started(server: Server) -> bool:
    return server.managed and server.state is ServerState.STARTING and server.repair is None


def _first_word(turn: Turn, server: Server, event: ServerProbed) -> None:
    """A server that was running before the daemon came is taken as it is: its run is not held to look."""
    if server.state is ServerState.STARTING and server.repair is None and event.model_info is Answer.OK:
        if turn.state.reconciling:
            recovery.verify(turn, server, Reason.RECONCILING)
        else:
            turn.put(server.move(ServerState.SERVING, turn.now, None))


def _on_effect(turn: Turn, event: EffectEnded) -> None:
    rollback = turn.state.rollback
    if rollback is not None and rollback.intent == event.intent:
        _target_found(turn, rollback, event)
        return
    for server in turn.state.servers:
        recovery.effect_ended(turn, server, event)


def _on_ack(turn: Turn, event: OrderAcknowledged) -> None:
    rollback = turn.state.rollback
    ordered = rollback is not None and rollback.generation is not None
    if event.order == GateOrder.ROLLBACK.value and rollback is not None and ordered:
        if event.generation >= (rollback.generation or 0):
            _rolled_back(turn, rollback, event.ok, event.detail)
        return
    if event.order == GateOrder.SAVE.value:
        _saved(turn, event)
        return
    for server in turn.state.servers:
        recovery.acknowledged(turn, server, event)


# ---- the trainer and its batches -------------------------------------------------------------------


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


def _on_trainer_exit(turn: Turn, event: TrainerExited) -> None:
    trainer = turn.state.trainer
    if trainer.pid == event.pid and trainer.alive is not False:
        turn.state = replace(turn.state, trainer=replace(trainer, alive=False))
        code = "unknown" if event.code is None else str(event.code)
        turn.note("call", Reason.TRAINER_EXITED, f"the trainer (pid {event.pid}) exited, code {code}")
        if turn.state.rollback is not None:
            turn.note("call", turn.state.rollback.reason, "and with it the rollback that it was ordered to")
            turn.state = replace(turn.state, rollback=None)


def _on_batch(turn: Turn, event: BatchReported) -> None:
    """
    The verdict on a batch, before its optimizer step.

    A batch whose rollouts overlapped an outage is refused whatever its reward: a trainer that scores a
    failed rollout 0 has no way to say which of its zeros were earned.
    """
    state, trainer = turn.state, turn.state.trainer
    if event.batch <= state.gate.judged_batch:
        turn.commands.append(PublishGate(gate=state.gate))  # asked again: the datagram or the page was lost
        return
    refusal = _refusal(turn, event)
    if refusal is None:
        refusal = _reward_verdict(turn, event)
    elif refusal is Reason.STALE_WEIGHTS:
        for server in turn.state.servers:
            recovery.suspect(turn, server, fleet.Suspicion(reason=refusal, remedy=fleet.Remedy.RECHECK))
    in_a_row = trainer.refused_in_a_row + 1 if event.refused is not None else 0
    if in_a_row >= state.settings.max_refused_batches and _healthy(turn.state) and turn.state.trip is None:
        _trip(turn, Reason.ROLLOUTS_FAILED, kind="unknown", step=event.step, onset=event.step)
    if state.mode is Mode.SHADOW and event.refused is None and _tripped(turn.state, Reason.ROLLOUTS_FAILED):
        turn.state = replace(turn.state, trip=None)  # in shadow nobody lets go of what holds nothing
    ok = refusal is None or state.mode is Mode.SHADOW
    turn.state = replace(
        turn.state,
        trainer=replace(turn.state.trainer, refused_in_a_row=in_a_row, step=event.step),
        refused_batches=turn.state.refused_batches + (not ok),
        gate=replace(
            turn.state.gate,
            judged_batch=event.batch,
            judged_step=event.step,
            judged_ok=ok,
            reason="" if refusal is None else refusal.value,
        ),
    )
    turn.commands.append(PublishGate(gate=turn.state.gate))
    if not ok and refusal is not None:
        turn.count("refused_batches")
        turn.note("refused", refusal, f"batch of step {event.step} refused: {refusal.value}")


def _refusal(turn: Turn, event: BatchReported) -> Reason | None:
    """Why a batch is refused without a look at its reward."""
    state = turn.state
    if event.refused is not None:
        known = {reason.value for reason in (Reason.STALE_WEIGHTS, Reason.NO_GROUP)}
        return Reason(event.refused) if event.refused in known else Reason.FAILED_FRACTION
    if event.attempt < state.trainer.attempt:
        return Reason.OLD_ATTEMPT
    if _outage(state) is not None:
        return Reason.OUTAGE
    ended = state.outage_ended
    if ended is not None and event.began is not None and event.began < ended:
        return Reason.OUTAGE
    return None


def _reward_verdict(turn: Turn, event: BatchReported) -> Reason | None:
    if event.reward is None:
        return None
    spread = None
    if event.reward_std is not None and event.reward_min is not None and event.reward_max is not None:
        spread = reward.Spread(event.reward_std, event.reward_min, event.reward_max)
    seen = reward.Observation(
        attempt=event.attempt,
        step=event.step,
        value=event.reward,
        ok=event.ok,
        failed=event.failed,
        spread=spread,
        metrics=turn.state.metrics,
        witnesses=_witnesses(turn.state),
    )
    return _judge(turn, seen)


def _judge(turn: Turn, seen: reward.Observation) -> Reason | None:
    """Put one observation to the reward tests; a hold trips, and its reason is returned."""
    judge, verdict = reward.observe(turn.state.settings.reward, turn.state.reward, seen)
    turn.state = replace(turn.state, reward=judge)
    if verdict.recovered and turn.state.mode is Mode.SHADOW:
        turn.state = replace(turn.state, trip=None)
    if verdict.level is reward.Level.WARN:
        turn.note("warning", verdict.reason, f"step {seen.step}: {verdict.reason.value}")
    if verdict.level is not reward.Level.HOLD:
        return None
    if turn.state.trip is None:
        onset = verdict.onset_step if verdict.onset_step is not None else seen.step
        _trip(
            turn,
            verdict.reason,
            kind=verdict.kind.value,
            step=seen.step,
            onset=onset,
            evidence=verdict.evidence,
        )
    return verdict.reason


def _witnesses(state: State) -> frozenset[reward.Witness]:
    """What the servers say beside a reward."""
    if any(server.state is ServerState.STALE for server in state.servers):
        return frozenset({reward.Witness.WEIGHTS_SUSPECT})
    if not _healthy(state):
        return frozenset({reward.Witness.SERVER_UNHEALTHY})
    return frozenset({reward.Witness.SERVERS_HEALTHY}) if state.servers else frozenset()


def _on_step(turn: Turn, event: StepCommitted) -> None:
    state = turn.state
    probation = max(0, state.probation_left - 1)
    turn.state = replace(
        state,
        trainer=replace(state.trainer, committed_step=event.step),
        rewards=(*state.rewards, event.reward)[-REWARDS_KEPT:],
        metrics=event.metrics,
        probation_left=probation,
    )
    if state.phase is Phase.HALF_OPEN and probation == 0:
        _to(turn, Trigger.PROVEN)


def _on_logged(turn: Turn, event: RewardLogged) -> None:
    """A logged stream judges only a run whose trainer does not report by itself."""
    position = turn.state.stream_position if event.position is None else event.position
    turn.state = replace(turn.state, stream_step=event.step, stream_position=position)
    if turn.state.trainer.pid is not None:
        return
    turn.state = replace(turn.state, rewards=(*turn.state.rewards, event.reward)[-REWARDS_KEPT:])
    seen = reward.Observation(
        attempt=0,
        step=event.step,
        value=event.reward,
        metrics=event.metrics,
        witnesses=_witnesses(turn.state),
    )
    _judge(turn, seen)


# ---- trips -----------------------------------------------------------------------------------------


def _trip(
    turn: Turn,
    reason: Reason,
    *,
    kind: str,
    step: int,
    onset: int,
    evidence: tuple[tuple[str, float], ...] = (),
) -> None:
    """No step on this: hold, and look at every server, since a reward alone names no culprit."""
    relapse = turn.state.phase is Phase.HALF_OPEN and reason is not Reason.ROLLOUTS_FAILED
    turn.state = replace(
        turn.state,
        trip=Trip(reason=reason, kind=kind, step=step, onset_step=onset, since=turn.now, evidence=evidence),
    )
    if turn.state.mode is Mode.SHADOW:
        return
    for server in turn.state.servers:
        recovery.verify(turn, server, reason)
    committed = turn.state.trainer.committed_step
    poisoned = 0 if committed is None else committed - onset + 1
    if poisoned >= turn.state.settings.poison_steps or (relapse and kind != "policy"):
        _begin_rollback(turn, onset, reason)


def _settle_trip(turn: Turn) -> None:
    """A trip ends when its cause was found and repaired; without a cause a person decides."""
    state = turn.state
    trip = state.trip
    if trip is None or not _healthy(state) or state.rollback is not None:
        return
    if trip.infra:
        turn.state = replace(state, trip=None)
        return
    if state.phase is Phase.SHADOW:
        return
    settings = state.settings
    if trip.reason is Reason.ROLLOUTS_FAILED:
        left = budget.left(
            state.retries, now=turn.now, limit=settings.restart_budget, window_s=settings.restart_window_s
        )
        if left > 0:
            spent = budget.spend(
                state.retries, now=turn.now, limit=settings.restart_budget, window_s=settings.restart_window_s
            )
            turn.state = replace(state, trip=None, retries=spent)
            turn.note("action", trip.reason, "every server generates: letting the trainer try again")
        else:
            recovery.lock_out(turn, None, trip.reason)
    elif trip.kind != "called":
        turn.state = replace(state, trip=replace(trip, kind="called"))
        turn.note(
            "call",
            trip.reason,
            f"{trip.reason.value} since step {trip.onset_step}, and every server is well: "
            "the policy or the reward function; held until a person decides",
        )


# ---- rollback --------------------------------------------------------------------------------------


def _begin_rollback(turn: Turn, before_step: int, reason: Reason) -> None:
    state = turn.state
    if state.rollback is not None:
        return
    if state.phase is Phase.SHADOW and reason is Reason.OPERATOR_ROLLBACK:
        turn.note("call", reason, "mode shadow gives no orders: set mode hold or act, and ask again")
        return
    if state.mode is not Mode.ACT and reason is not Reason.OPERATOR_ROLLBACK:
        turn.note("would", reason, f"would roll back to before step {before_step} in mode act")
        return
    if not state.trainer.handles_rollback:
        turn.note("call", reason, "the trainer cannot roll back in place: a person has to relaunch it")
        return
    intent = turn.intent("prepare-rollback")
    turn.state = replace(
        turn.state,
        rollback=Rollback(before_step=before_step, reason=reason, since=turn.now, intent=intent),
    )
    turn.commands.append(PrepareRollback(intent=intent, before_step=before_step))


def _target_found(turn: Turn, rollback: Rollback, event: EffectEnded) -> None:
    if not event.ok or event.target_step is None:
        turn.state = replace(turn.state, rollback=None)
        turn.note("call", Reason.NO_CHECKPOINT, f"no checkpoint to roll back to: {event.detail}")
        if rollback.reason is not Reason.OPERATOR_ROLLBACK:
            recovery.lock_out(turn, None, Reason.NO_CHECKPOINT)
        return
    turn.state = replace(
        turn.state,
        rollback=replace(
            rollback,
            intent=None,
            target_step=event.target_step,
            target_path=event.target_path,
            generation=turn.state.gate.generation + 1,
        ),
    )
    turn.note("action", rollback.reason, f"rolling back to the checkpoint of {event.detail}")


def _rolled_back(turn: Turn, rollback: Rollback, ok: bool, detail: str) -> None:
    turn.state = replace(turn.state, rollback=None)
    if not ok:
        turn.note("call", Reason.ROLLBACK_FAILED, f"the trainer could not roll back: {detail}")
        recovery.lock_out(turn, None, Reason.ROLLBACK_FAILED)
        return
    turn.count("rollbacks")
    turn.note("action", rollback.reason, f"rolled back to step {rollback.target_step}")
    trip = turn.state.trip
    turn.state = replace(
        turn.state,
        trip=None if trip is None else replace(trip, infra=True),
        trainer=replace(turn.state.trainer, committed_step=rollback.target_step, weight_version=None),
    )
    # The servers hold the weights of a later step now.
    for server in turn.state.servers:
        if server.state is ServerState.SERVING:
            recovery.suspect(
                turn, server, fleet.Suspicion(reason=Reason.ROLLED_BACK, remedy=fleet.Remedy.RESYNC)
            )


# ---- people ----------------------------------------------------------------------------------------


def _on_operator(turn: Turn, event: OperatorAsked) -> None:
    state, now = turn.state, turn.now
    by = f"{event.who}: {event.why}" if event.why else event.who
    match event.verb:
        case "pause":
            if state.phase not in {Phase.FORCED_OPEN, Phase.LOCKED_OUT}:
                turn.state = replace(state, pause=Pause(who=event.who, why=event.why, since=now))
                _to(turn, Trigger.PAUSE)
                turn.note("person", Reason.OPERATOR_PAUSE, f"paused by {by}")
        case "resume":
            _resume(turn, by)
        case "rollback":
            before = event.before_step if event.before_step is not None else _incident_step(state)
            turn.note("person", Reason.OPERATOR_ROLLBACK, f"rollback to before step {before} asked by {by}")
            _begin_rollback(turn, before, Reason.OPERATOR_ROLLBACK)
        case "restart-server":
            for server in state.servers:
                if event.server in {None, server.name} and server.managed:
                    turn.note("person", Reason.OPERATOR_RESTART, f"restart of {server.name} asked by {by}")
                    refilled = replace(server, repair=None, budget=budget.Budget())
                    recovery.restart(turn, refilled, Reason.OPERATOR_RESTART)
        case "mode":
            known = {mode.value: mode for mode in Mode}
            if event.mode in known:
                _change_mode(turn, known[event.mode], by)
            else:
                turn.note("person", Reason.UNKNOWN_VERB, f"unknown mode {event.mode!r} asked by {by}")
        case _:
            turn.note("person", Reason.UNKNOWN_VERB, f"unknown request {event.verb!r} by {by}")


def _resume(turn: Turn, by: str) -> None:
    """
    A person lets go of whatever holds, and answers for it.

    Soft evidence and unproven weights are set aside, and a tripped reward becomes the new normal.
    What cannot be let go of: a dead server, and a rollback that the trainer was already told of.
    """
    state = turn.state
    if state.phase in {Phase.FORCED_OPEN, Phase.LOCKED_OUT}:
        _to(turn, Trigger.RELEASE)
        if state.mode is Mode.SHADOW:
            _to(turn, Trigger.SHADOW_ON)
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
        _to(turn, Trigger.SHADOW_ON)
        turn.state = replace(turn.state, rollback=None)  # an order that is no longer given ends by nothing
    elif state.phase is Phase.SHADOW:
        _to(turn, Trigger.SHADOW_OFF)
    turn.state = replace(turn.state, mode=mode)
    turn.note("person", Reason.OPERATOR_MODE, f"mode {mode.value} set by {by}")
    if mode is Mode.ACT:
        for server in turn.state.servers:
            if server.state is ServerState.DEAD and server.managed and server.repair is None:
                recovery.restart(turn, server, server.reason or Reason.SERVER_DIED)


# ---- time, and the daemon's own start --------------------------------------------------------------


def _on_tick(turn: Turn) -> None:
    for server in turn.state.servers:
        judged, suspicion = fleet.ticked(server, turn.state.settings, turn.now)
        if suspicion is not None:
            recovery.suspect(turn, judged, suspicion)
        else:
            recovery.ticked(turn, judged)
    _rollback_wait(turn)
    _reset_budgets(turn)


def _rollback_wait(turn: Turn) -> None:
    """A trainer that stands at the gate and does not roll back will not."""
    rollback, trainer, settings = turn.state.rollback, turn.state.trainer, turn.state.settings
    if rollback is None or rollback.generation is None or trainer.phase != "HELD":
        return
    held_s = turn.now - max(rollback.since, trainer.phase_at or rollback.since)
    if held_s > settings.save_timeout_s:
        _rolled_back(turn, rollback, False, f"no answer for {held_s:.0f} s")


def _reset_budgets(turn: Turn) -> None:
    for server in turn.state.servers:
        if server.state is ServerState.SERVING and server.budget.streak and turn.state.phase is Phase.CLOSED:
            kept = budget.recovered(
                server.budget, now=turn.now, healthy_reset_s=turn.state.settings.healthy_reset_s
            )
            if kept is not server.budget:
                turn.put(replace(server, budget=kept))


def _on_start(turn: Turn, event: DaemonStarted) -> None:
    """
    Take up the page where it stands.

    A hold that the journal has no reason for (its last rows were lost) is kept until every server was
    looked at and has generated; a generation never goes back.
    """
    state = turn.state
    gate = state.gate
    if event.gate_generation > gate.generation:
        gate = replace(gate, generation=event.gate_generation + 1)
    gate = replace(gate, judged_batch=max(gate.judged_batch, event.judged_batch))
    unexplained = event.gate_order != GateOrder.GO.value and _wanted(state)[0] is GateOrder.GO
    reconciling = (unexplained or state.reconciling) and state.mode is not Mode.SHADOW
    turn.state = replace(
        state,
        gate=gate,
        reconciling=reconciling,
        servers=tuple(replace(server, seen=False) for server in state.servers),
    )
    if reconciling:
        for server in turn.state.servers:
            if server.state is not ServerState.STARTING:  # that one waits for its first word
                recovery.verify(turn, server, Reason.RECONCILING)
    turn.commands.append(PublishGate(gate=gate))


# ---- what holds, and what the gate says ------------------------------------------------------------


def _healthy(state: State) -> bool:
    return all(server.usable and server.repair is None for server in state.servers)


def _outage(state: State) -> Reason | None:
    """Why rollouts cannot be had now: fewer servers usable than the quorum asks for."""
    if not state.servers:
        return None
    down = [server for server in state.servers if not server.usable]
    if 1.0 - len(down) / len(state.servers) >= state.settings.quorum:
        return None
    return down[0].reason or Reason.SERVER_DIED


def _held(state: State) -> Reason | None:
    """What holds the run, the gravest first; None when nothing does."""
    if state.lockout is not None:
        return state.lockout.reason
    if state.pause is not None:
        return Reason.OPERATOR_PAUSE
    outage = _outage(state)
    if outage is not None:
        return outage
    if state.trip is not None:
        return state.trip.reason
    if state.rollback is not None:
        return state.rollback.reason
    return Reason.RECONCILING if state.reconciling else None


def _wanted(state: State) -> tuple[GateOrder, Reason | None, int]:
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


def _settle(turn: Turn) -> None:
    """Bring the breaker, the incident and the gate in line with what is now known."""
    state = turn.state
    if state.reconciling and all(server.seen for server in state.servers):
        turn.state = replace(state, reconciling=False)
    _settle_trip(turn)
    _settle_lockout(turn)
    _settle_outage(turn)
    _settle_breaker(turn)
    _settle_gate(turn)


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


def _saved(turn: Turn, event: OrderAcknowledged) -> None:
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
    if _outage(state) is not None:
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
        _to(turn, Trigger.GIVE_UP)
    elif held is not None and state.phase in {Phase.CLOSED, Phase.HALF_OPEN}:
        if _starting(state) or held is Reason.RECONCILING:
            return  # the first start, or the first look after a restart, is no incident
        _open_incident(turn, held)
        _to(turn, Trigger.TRIP)
    elif held is None and state.phase is Phase.OPEN:
        incident = turn.state.incident
        turn.state = replace(
            turn.state,
            probation_left=state.settings.probation_steps,
            incident=None if incident is None else replace(incident, resumed_at=turn.now),
        )
        _to(turn, Trigger.REPAIRED)
        if incident is not None:
            turn.note("resumed", incident.reason, "the trainer goes on, on probation")


def _tripped(state: State, reason: Reason) -> bool:
    return state.trip is not None and state.trip.reason is reason


def _starting(state: State) -> bool:
    """Whether all that holds is a server's first start."""
    down = [server for server in state.servers if not server.usable]
    first = all(
        server.repair is not None and server.repair.cause is Reason.SERVER_STARTING for server in down
    )
    return bool(down) and first and state.trip is None and state.pause is None and state.rollback is None


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
    incident = Incident(number=number, reason=reason, server=down, onset_step=step, opened_at=turn.now)
    turn.state = replace(state, incident=incident, incidents=number)
    turn.note("opened", reason, f"held: {reason.value}" + ("" if step is None else f" at step {step}"))


def _close_incident(turn: Turn) -> None:
    incident = turn.state.incident
    if incident is None:
        return
    turn.note("resolved", incident.reason, "the run is well again")
    turn.state = replace(turn.state, incident=None, last_incident=replace(incident, closed_at=turn.now))
    turn.closed = True


def _to(turn: Turn, trigger: Trigger) -> None:
    turn.state = replace(turn.state, phase=move(turn.state.phase, trigger), phase_since=turn.now)
    if trigger is Trigger.PROVEN:
        _close_incident(turn)


def _settle_gate(turn: Turn) -> None:
    """Publish the gate when its order has to change: first of all commands, in one write with a verdict."""
    state = turn.state
    order, reason, at_least = _wanted(state)
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


def _publish_first(turn: Turn) -> None:
    rest = [command for command in turn.commands if not isinstance(command, PublishGate)]
    turn.commands = [PublishGate(gate=turn.state.gate), *rest]
