"""A rollback: the checkpoints are prepared, the trainer is ordered to the target, the weights are proven."""

from dataclasses import replace

from . import checkpoints, fleet, recovery, relaunch, stall
from .breaker import Phase
from .commands import PrepareRollback
from .events import (
    DaemonStarted,
    EffectEnded,
)
from .giving_up import lock_out
from .reasons import Reason
from .state import (
    GateOrder,
    Mode,
    Rollback,
    ServerState,
)
from .turn import Turn


def begin(turn: Turn, before_step: int, reason: Reason) -> bool:
    """
    Begin one, or say why not: in another mode than act it takes a person.

    A trainer that cannot reload in place is ended and started again from the target.

    Returns:
        Whether one is under way now.

    """
    state = turn.state
    if state.rollback is not None or state.relaunch is not None:
        return True
    if state.phase is Phase.SHADOW and reason is Reason.OPERATOR_ROLLBACK:
        turn.note("call", reason, "mode shadow gives no orders: set mode hold or act, and ask again")
        return False
    if state.mode is not Mode.ACT and reason is not Reason.OPERATOR_ROLLBACK:
        turn.note("would", reason, f"would roll back to before step {before_step} in mode act")
        return False
    checkpoints.doubt(turn, before_step)
    in_place = state.trainer.handles_rollback and state.trainer.alive is not False
    if not in_place and state.settings.trainer_managed:
        return relaunch.begin(turn, reason, before_step=before_step)
    if not in_place:
        turn.note("call", reason, "the trainer cannot roll back in place: a person has to relaunch it")
        return False
    intent = turn.intent("prepare-rollback")
    turn.state = replace(
        turn.state,
        rollback=Rollback(before_step=before_step, reason=reason, since=turn.now, intent=intent),
    )
    turn.commands.append(PrepareRollback(intent=intent, before_step=before_step))
    return True


def target_found(turn: Turn, rollback: Rollback, event: EffectEnded) -> None:
    """The checkpoints are prepared: order the trainer to the target, or call a person."""
    if not event.ok or event.target_step is None:
        turn.state = replace(turn.state, rollback=None)
        turn.note("call", Reason.NO_CHECKPOINT, f"no checkpoint to roll back to: {event.detail}")
        if rollback.reason is not Reason.OPERATOR_ROLLBACK:
            lock_out(turn, Reason.NO_CHECKPOINT)
        return
    checkpoints.set_aside(turn, event.target_step)
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


def already_ordered(turn: Turn, event: DaemonStarted) -> bool:
    """
    Whether the page orders the very rollback whose target was still being found, as the journal has it.

    The row of the order was lost. Ordered anew under another generation it would be obeyed twice.
    """
    rollback = turn.state.rollback
    if rollback is None or rollback.generation is not None or event.target_step is None:
        return False
    if event.gate_order != GateOrder.ROLLBACK.value or event.gate_generation <= turn.state.gate.generation:
        return False
    checkpoints.set_aside(turn, event.target_step)
    turn.state = replace(
        turn.state,
        rollback=replace(
            rollback,
            intent=None,
            target_step=event.target_step,
            target_path=event.target_path,
            generation=event.gate_generation,
        ),
    )
    return True


def rolled_back(turn: Turn, rollback: Rollback, ok: bool, detail: str) -> None:
    """The trainer answered ROLLBACK: the servers hold the weights of a later step now."""
    turn.state = replace(turn.state, rollback=None)
    if not ok:
        turn.note("call", Reason.ROLLBACK_FAILED, f"the trainer could not roll back: {detail}")
        lock_out(turn, Reason.ROLLBACK_FAILED)
        return
    turn.count("rollbacks")
    turn.note("action", rollback.reason, f"rolled back to step {rollback.target_step}")
    trip, target = turn.state.trip, rollback.target_step
    turn.state = replace(
        turn.state,
        trip=None if trip is None else replace(trip, infra=True, rolled_back=True),
        metrics={},
        recent=tuple(one for one in turn.state.recent if target is not None and one.step <= target),
        trainer=replace(turn.state.trainer, committed_step=rollback.target_step, weight_version=None),
    )
    # The servers hold the weights of a later step now.
    for server in turn.state.servers:
        if server.state is ServerState.SERVING:
            recovery.suspect(
                turn, server, fleet.Suspicion(reason=Reason.ROLLED_BACK, remedy=fleet.Remedy.RESYNC)
            )


def wait(turn: Turn) -> None:
    """A trainer that stands at the gate and does not roll back will not, nor one that never comes there."""
    rollback, trainer, settings = turn.state.rollback, turn.state.trainer, turn.state.settings
    if rollback is None or rollback.generation is None:
        return
    if trainer.phase != "HELD":
        _unheard(turn, rollback)
        return
    held_s = turn.now - max(rollback.since, trainer.phase_at or rollback.since)
    if held_s > settings.save_timeout_s:
        rolled_back(turn, rollback, False, f"no answer for {held_s:.0f} s")


def _unheard(turn: Turn, rollback: Rollback) -> None:
    waited_s = stall.deaf_s(turn.state, rollback.since, turn.now)
    if waited_s is None:
        return
    phase = turn.state.trainer.phase
    text = f"the trainer, in {phase}, has reached no guard call for {waited_s / 60:.0f} min"
    if turn.state.settings.trainer_managed and turn.may_act(rollback.reason):
        relaunch.hung(turn, Reason.TRAINER_STALLED, f"{text}, and is ordered to roll back")
    if turn.state.rollback is not None:
        rolled_back(turn, rollback, False, text)
