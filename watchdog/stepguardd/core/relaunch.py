"""
A trainer that died, hung or has to go back and cannot in place: it is ended, and started again.

    STOP ─▶ BACKOFF ─▶ TARGET ─▶ START ─▶ UP ─▶ the run goes on, on probation

TARGET chooses the newest proven checkpoint (for a rollback: from before the onset), sets newer ones aside and
moves the framework's marker, while nothing writes to the folder. Each stage ends by its effect or its
timeout; the budget, and three launches without a step committed between them, end in a lockout.
"""

from dataclasses import replace

from . import budget, checkpoints
from .breaker import Phase
from .commands import PrepareRollback, StartTrainer, StopTrainer
from .events import EffectEnded, TrainerExited, TrainerLeft, TrainerSeen, TrainerTree
from .giving_up import lock_out
from .reasons import Reason
from .state import Launch, Mode, Relaunch, Trainer
from .turn import Turn

SKIPS_KEPT = 16
# SIGINT and SIGTERM, as a child's code and as a shell tells them: somebody wanted it to end.
_ASKED_TO_END = frozenset({-2, -15, 130, 143})
_ENDED_WELL = frozenset({"finished", "stopped"})
_OLD_ONE_ENDS = frozenset({Launch.STOP, Launch.BACKOFF, Launch.TARGET})


def begin(turn: Turn, cause: Reason, *, before_step: int | None = None) -> bool:
    """
    Begin one, or say why not: in another mode than act it takes a person.

    Returns:
        Whether one is under way now.

    """
    state, now = turn.state, turn.now
    settings, trainer = state.settings, state.trainer
    if state.relaunch is not None:
        return True
    if not settings.trainer_managed:
        turn.note("call", cause, "the trainer is not Stepguard's to start: a person has to; see [trainer]")
        return False
    if state.phase is Phase.SHADOW or not turn.may_act(cause):
        turn.note("would", cause, "would start the trainer again in mode act")
        return False
    if state.lockout is not None and cause not in {Reason.OPERATOR_RELAUNCH, Reason.OPERATOR_ROLLBACK}:
        return False
    left = budget.left(
        trainer.budget, now=now, limit=settings.relaunch_budget, window_s=settings.relaunch_window_s
    )
    if left < 1 or trainer.launches_without_step >= settings.relaunches_without_step:
        lock_out(turn, Reason.RELAUNCH_BUDGET_SPENT)
        return False
    intent = turn.intent("stop-trainer")
    turn.state = replace(
        state,
        rollback=None,
        trainer=replace(
            trainer,
            budget=budget.spend(
                trainer.budget, now=now, limit=settings.relaunch_budget, window_s=settings.relaunch_window_s
            ),
            launches=trainer.launches + 1,
            launches_without_step=trainer.launches_without_step + 1,
            rank_lost=None,
            rank_lost_at=None,
        ),
        relaunch=Relaunch(
            cause=cause,
            stage=Launch.STOP,
            since=now,
            pid=trainer.pid,
            intent=intent,
            before_step=before_step,
        ),
    )
    turn.count("relaunches")
    turn.note("action", cause, f"starting the trainer again: {cause.value}")
    turn.commands.append(StopTrainer(intent=intent, procs=trainer.procs))
    return True


def hung(turn: Turn, cause: Reason, text: str) -> None:
    """The trainer lives and makes no progress: as good as dead."""
    trainer = turn.state.trainer
    if turn.state.relaunch is None and trainer.alive is not False and trainer.left is None:
        _died(turn, cause, text)


def exited(turn: Turn, event: TrainerExited) -> None:
    """A process of the trainer's ended: perhaps its death, perhaps the run's good end, perhaps neither."""
    state = turn.state
    trainer, relaunch = state.trainer, state.relaunch
    root = trainer.procs[0].pid if trainer.procs else None
    if event.pid is not None and event.pid not in {trainer.pid, root}:
        if event.rank is not None and trainer.rank_lost_at is None and trainer.alive is not False:
            lost = replace(trainer, rank_lost=event.rank, rank_lost_at=turn.now)
            turn.state = replace(state, trainer=lost)
        return
    if trainer.alive is False:
        return
    if relaunch is not None and relaunch.stage in _OLD_ONE_ENDS:
        turn.state = replace(state, trainer=replace(trainer, alive=False))
        return
    how = _how(trainer, event)
    turn.state = replace(state, trainer=replace(trainer, alive=False, left=how, procs=()))
    if how in _ENDED_WELL:
        turn.state = replace(turn.state, relaunch=None, rollback=None)
        where = "" if trainer.committed_step is None else f" at step {trainer.committed_step}"
        turn.note("finished", Reason.TRAINER_FINISHED, f"the trainer has {how}{where}")
        return
    code = "" if event.code is None else f", code {event.code}"
    who = "the trainer" if event.pid is None else f"the trainer (pid {event.pid})"
    _died(turn, Reason.TRAINER_EXITED, f"{who} died{code}")


def goodbye(turn: Turn, event: TrainerLeft) -> None:
    """The guard says why the process ends, before it does."""
    turn.state = replace(turn.state, trainer=replace(turn.state.trainer, left=event.why))


def seen(turn: Turn, event: TrainerSeen, before: Trainer) -> None:
    """Another process writes the trainer's page: the one that was started, or one that somebody started."""
    if event.pid == before.pid:
        return
    turn.state = replace(turn.state, trainer=replace(turn.state.trainer, left=None, rank_lost_at=None))
    relaunch = turn.state.relaunch
    if relaunch is not None and relaunch.stage is Launch.UP:
        _arrived(turn, relaunch)


def tree(turn: Turn, event: TrainerTree) -> None:
    """The live processes of a trainer that Stepguard starts. One that was never seen is started."""
    state = turn.state
    trainer, relaunch = state.trainer, state.relaunch
    if not event.procs and trainer.alive and relaunch is None:
        exited(turn, TrainerExited())  # while no daemon was there to see it
        return
    starting = relaunch is not None and relaunch.stage is not Launch.UP
    alive = True if event.procs and not starting else trainer.alive
    turn.state = replace(state, trainer=replace(trainer, procs=event.procs, alive=alive))
    if not event.procs and trainer.alive is None and relaunch is None and state.settings.trainer_managed:
        turn.state = replace(
            turn.state,
            relaunch=Relaunch(
                cause=Reason.TRAINER_STARTING, stage=Launch.BACKOFF, since=turn.now, first=True
            ),
        )


def effect_ended(turn: Turn, relaunch: Relaunch, event: EffectEnded) -> None:
    """The outcome of the effect that the relaunch waits for."""
    match relaunch.stage:
        case Launch.STOP:
            if not event.ok:
                turn.state = replace(turn.state, relaunch=None)
                turn.note("call", Reason.STOP_FAILED, f"the trainer would not end: {event.detail}")
                lock_out(turn, Reason.STOP_FAILED)
                return
            trainer = replace(turn.state.trainer, alive=False, procs=())
            waiting = replace(relaunch, stage=Launch.BACKOFF, since=turn.now, intent=None)
            turn.state = replace(turn.state, trainer=trainer, relaunch=waiting)
            if _wait_s(turn) <= 0.0:
                _choose(turn, waiting)
        case Launch.TARGET:
            _chosen(turn, relaunch, event)
        case Launch.START:
            _started(turn, relaunch, event)
        case Launch.BACKOFF | Launch.UP:
            pass


def ticked(turn: Turn) -> None:
    """The timeouts, and a rank that did not come back."""
    state, settings = turn.state, turn.state.settings
    trainer, relaunch = state.trainer, state.relaunch
    if relaunch is None:
        at = trainer.rank_lost_at
        if at is not None and trainer.left is None and turn.now - at > settings.lost_rank_grace_s:
            _died(turn, Reason.RANK_LOST, f"rank {trainer.rank_lost} ended, and the others wait for it")
        return
    waited_s = turn.now - relaunch.since
    match relaunch.stage:
        case Launch.STOP:
            if waited_s > 4 * settings.trainer_stop_timeout_s:
                turn.state = replace(state, relaunch=None)
                lock_out(turn, Reason.STOP_FAILED)
        case Launch.BACKOFF:
            if relaunch.first and all(server.usable for server in state.servers):
                _start(turn, relaunch)
            elif not relaunch.first and waited_s >= _wait_s(turn):
                _choose(turn, relaunch)
        case Launch.UP:
            if waited_s > settings.trainer_start_timeout_s:
                _failed(turn, relaunch, f"it was not heard of for {waited_s:.0f} s")
        case Launch.TARGET | Launch.START:
            pass


def _how(trainer: Trainer, event: TrainerExited) -> str | None:
    """How it ended: finished, stopped, or None for a death. What the guard said of a good end stands."""
    if trainer.left is not None:
        return trainer.left
    if event.code is None:
        return None
    return "finished" if event.code == 0 else "stopped" if event.code in _ASKED_TO_END else None


def _died(turn: Turn, cause: Reason, text: str) -> None:
    """Tell it, remember in which batch it was, and start it again."""
    state = turn.state
    trainer = state.trainer
    step = (trainer.committed_step or 0) + 1
    again = trainer.crashed_at == step
    skip = trainer.skip_steps
    if again and trainer.pid is not None and step not in skip:
        skip = (*skip, step)[-SKIPS_KEPT:]
    turn.state = replace(
        state,
        rollback=None,
        relaunch=None,
        trainer=replace(trainer, crashed_at=step, skip_steps=skip, rank_lost=None, rank_lost_at=None),
    )
    managed = state.settings.trainer_managed
    turn.note("action" if managed else "call", cause, text)
    if again:
        what = (
            f"it died twice in the batch of step {step}, which is skipped"
            if trainer.pid is not None
            else f"it died twice in the batch of step {step}; without the guard it cannot be skipped"
        )
        turn.note("warning", cause, what)
    under_way = state.relaunch or state.rollback
    if managed:
        begin(turn, cause, before_step=None if under_way is None else under_way.before_step)
    elif state.rollback is not None:
        turn.note("call", state.rollback.reason, "and with it ends the rollback that it was ordered to")


def _wait_s(turn: Turn) -> float:
    settings = turn.state.settings
    return budget.wait_s(
        turn.state.trainer.budget,
        first_s=settings.backoff_first_s,
        max_s=settings.backoff_max_s,
        jitter=settings.backoff_jitter,
    )


def _choose(turn: Turn, relaunch: Relaunch) -> None:
    intent = turn.intent("choose-checkpoint")
    choosing = replace(relaunch, stage=Launch.TARGET, since=turn.now, intent=intent)
    turn.state = replace(turn.state, relaunch=choosing)
    turn.commands.append(PrepareRollback(intent=intent, before_step=relaunch.before_step))


def _chosen(turn: Turn, relaunch: Relaunch, event: EffectEnded) -> None:
    if not event.ok:
        turn.state = replace(turn.state, relaunch=None)
        turn.note("call", Reason.NO_CHECKPOINT, f"no checkpoint to start the trainer from: {event.detail}")
        lock_out(turn, Reason.NO_CHECKPOINT)
        return
    if event.target_step is not None:
        checkpoints.set_aside(turn, event.target_step)
    what = event.detail if event.target_step is None else f"from the checkpoint of {event.detail}"
    turn.note("action", relaunch.cause, f"the trainer starts {what}")
    _start(turn, replace(relaunch, target_step=event.target_step, target_path=event.target_path))


def _start(turn: Turn, relaunch: Relaunch) -> None:
    intent = turn.intent("start-trainer")
    starting = replace(relaunch, stage=Launch.START, since=turn.now, intent=intent)
    turn.state = replace(turn.state, relaunch=starting)
    turn.commands.append(
        StartTrainer(
            intent=intent,
            target_step=relaunch.target_step,
            target_path=relaunch.target_path,
            skip_steps=turn.state.trainer.skip_steps,
        )
    )


def _started(turn: Turn, relaunch: Relaunch, event: EffectEnded) -> None:
    if not event.ok:
        _failed(turn, relaunch, event.detail)
        return
    up = replace(relaunch, stage=Launch.UP, since=turn.now, intent=None)
    trainer = replace(turn.state.trainer, procs=event.procs, alive=True, left=None)
    turn.state = replace(turn.state, relaunch=up, trainer=trainer)
    if relaunch.pid is None or trainer.pid != relaunch.pid:
        # Without a guard nothing more is heard of it than that it runs; a quick one was heard of already.
        _arrived(turn, up)


def _failed(turn: Turn, relaunch: Relaunch, detail: str) -> None:
    turn.state = replace(turn.state, relaunch=None, trainer=replace(turn.state.trainer, alive=False))
    turn.note("action", Reason.START_FAILED, f"the trainer did not start: {detail}")
    cause = Reason.START_FAILED if relaunch.first else relaunch.cause
    begin(turn, cause, before_step=relaunch.before_step)


def _arrived(turn: Turn, relaunch: Relaunch) -> None:
    """
    It is back, before its first step. What was known of the old one's steps holds up to the target.

    It brings its weights to the servers itself, as at any start; what they served before is void.
    """
    state = turn.state
    turn.state = replace(state, relaunch=None)
    if relaunch.first:
        return
    target = relaunch.target_step
    trip = state.trip
    turn.state = replace(
        turn.state,
        trip=None if trip is None else replace(trip, infra=True, rolled_back=True),
        metrics={},
        recent=tuple(one for one in state.recent if target is not None and one.step <= target),
        trainer=replace(state.trainer, committed_step=target),
    )
    if relaunch.before_step is not None:
        turn.count("rollbacks")
    where = "from its beginning" if target is None else f"from step {target}"
    turn.note("action", relaunch.cause, f"the trainer is back, {where}")


def resumed(turn: Turn) -> None:
    """A person lets go: a trainer that died is started again, with a new budget."""
    trainer = turn.state.trainer
    if trainer.alive is False and trainer.left is None and turn.state.settings.trainer_managed:
        fresh = replace(trainer, budget=budget.Budget(), launches_without_step=0)
        turn.state = replace(turn.state, trainer=fresh)
        if turn.state.mode is Mode.ACT:
            begin(turn, Reason.TRAINER_EXITED)
