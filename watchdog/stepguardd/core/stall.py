"""
A trainer that lives and gets nowhere: told apart from one that is slow, evaluates, waits for us, or is dead.

Progress is any of: its step, its progress counter, its phase, the weight version, a token on any server. How
long it may be without any is learned per phase: some times the median of how long the phase takes, between a
floor and a ceiling; what is not learned yet may take up to the ceiling. A time in which the run was held, or
waited for a server, counts for nothing. A heartbeat that stops as well says that the process is frozen.
"""

from dataclasses import replace
from statistics import median

from . import relaunch
from .breaker import Phase
from .reasons import Reason
from .state import GateOrder, PhaseTimes, Settings, Stall, State
from .turn import Turn

TIMES_KEPT = 32
PHASES_KEPT = 16
FIRST_IGNORED = 2
"""A process's first times in a phase compile, warm up and fill caches."""
LEARNED_FROM = 3
SILENT_TOLD_S = 120.0


def seen(turn: Turn) -> None:
    """The trainer's page was read, and is in the state."""
    state, now = turn.state, turn.now
    trainer, old = state.trainer, state.stall
    if old.pid != trainer.pid:
        fresh = tuple(replace(one, entered=0) for one in old.phases)
        old = Stall(pid=trainer.pid, phases=fresh)
    tokens = sum(server.tokens or 0 for server in state.servers)
    mark = (trainer.progress, tokens, trainer.weight_version or "")
    place = (trainer.phase, trainer.step)
    beats = trainer.beats_at == now
    new = replace(old, phase=trainer.phase, step=trainer.step, mark=mark)
    if place != (old.phase, old.step) or old.entered_at is None:
        phases = _entered(_learned(old, now), trainer.phase)
        new = replace(new, phases=phases, entered_at=now, moved_at=now, clean=True, told=False)
    elif mark != old.mark:
        new = replace(new, moved_at=now, told=False)
    if _excused(state):
        new = replace(new, moved_at=now, clean=False, told=False)
    turn.state = replace(state, stall=replace(new, silent_told=old.silent_told and not beats))


def ticked(turn: Turn) -> None:
    """Whether it has been without progress for too long; said and acted on once."""
    state, now = turn.state, turn.now
    stall, trainer = state.stall, state.trainer
    if stall.moved_at is None or stall.told or _excused(state):
        return
    still_s = now - stall.moved_at
    silent_s = 0.0 if trainer.beats_at is None else now - trainer.beats_at
    silent = silent_s > SILENT_TOLD_S
    limit = limit_s(stall, state.settings)
    if still_s > limit:
        turn.state = replace(state, stall=replace(stall, told=True, silent_told=silent))
        how = f"it is frozen: no heartbeat for {silent_s:.0f} s" if silent else "its heartbeat goes on"
        text = (
            f"the trainer makes no progress in phase {stall.phase} for {still_s / 60:.0f} min "
            f"(allowed: {limit / 60:.0f}); {how}"
        )
        ours = state.settings.trainer_managed and state.phase is not Phase.SHADOW
        if ours and turn.may_act(Reason.TRAINER_STALLED):
            relaunch.hung(turn, Reason.TRAINER_STALLED, text)
        else:
            turn.note("call", Reason.TRAINER_STALLED, text)
    elif silent and not stall.silent_told:
        turn.state = replace(state, stall=replace(stall, silent_told=True))
        text = f"no heartbeat of the trainer for {silent_s:.0f} s: it is stopped or frozen, in {stall.phase}"
        turn.note("warning", Reason.TRAINER_FROZEN, text)


def deaf_s(state: State, asked_at: float, now: float) -> float | None:
    """
    For how long a trainer that was given an order has reached no guard call, once that is too long.

    Until then None: a step may be long, and as long as anything of it moves it may have twice the time.
    """
    trainer, settings = state.trainer, state.settings
    moved_at = max(asked_at, trainer.progress_at or asked_at, trainer.phase_at or asked_at)
    waited_s = now - asked_at
    still = now - moved_at > max(settings.resync_timeout_s, limit_s(state.stall, settings))
    return waited_s if still or waited_s > 2.0 * settings.stall_ceiling_s else None


def forgotten(stall: Stall) -> Stall:
    """What is left of it when the daemon comes back: nobody saw what happened meanwhile."""
    return replace(stall, entered_at=None, moved_at=None, clean=False, told=False)


def limit_s(stall: Stall, settings: Settings) -> float:
    """How long the phase that it is in may be without progress, in seconds."""
    times = next((one for one in stall.phases if one.name == stall.phase), None)
    if times is None or times.entered <= FIRST_IGNORED or len(times.last) < LEARNED_FROM:
        return settings.stall_ceiling_s
    # Twice the longest: a phase that is short mostly and long now and then has no typical time.
    learned = max(settings.stall_factor * median(times.last), 2.0 * max(times.last))
    return min(settings.stall_ceiling_s, max(settings.stall_floor_s, learned))


def _excused(state: State) -> bool:
    """Whether it has a reason to stand still, or is not there: neither is a stall."""
    trainer = state.trainer
    return (
        trainer.alive is False
        or trainer.left is not None
        or trainer.phase == "HELD"
        or state.gate.order is not GateOrder.GO
        or state.relaunch is not None
        or not all(server.usable for server in state.servers)
    )


def _learned(stall: Stall, now: float) -> tuple[PhaseTimes, ...]:
    """The times, with that of the phase that ends now, if it was a whole one and nothing disturbed it."""
    if stall.entered_at is None or not stall.clean:
        return stall.phases
    took_s = now - stall.entered_at
    return tuple(
        replace(one, last=(*one.last, took_s)[-TIMES_KEPT:])
        if one.name == stall.phase and one.entered > FIRST_IGNORED
        else one
        for one in stall.phases
    )


def _entered(phases: tuple[PhaseTimes, ...], name: str) -> tuple[PhaseTimes, ...]:
    if all(one.name != name for one in phases):
        phases = (*phases, PhaseTimes(name=name))[-PHASES_KEPT:]
    return tuple(
        replace(one, entered=min(one.entered + 1, FIRST_IGNORED + 1)) if one.name == name else one
        for one in phases
    )
