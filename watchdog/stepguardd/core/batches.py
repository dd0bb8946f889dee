"""
The verdict on a batch before its optimizer step, and on a logged stream after it.

A batch may be refused without a look at its reward; a reward that trips holds the run until a cause is found.
"""

from dataclasses import replace

from . import budget, checkpoints, fleet, holding, recovery, reward, rollbacks
from .breaker import Phase
from .commands import PublishGate
from .events import (
    BatchReported,
    CallsHung,
    RewardLogged,
)
from .giving_up import lock_out
from .reasons import Reason
from .state import (
    Mode,
    ServerState,
    State,
    Trip,
)
from .turn import Turn

# Warned of, and no sign that the weights are worse for it: such a step proves a checkpoint all the same.
_NO_DOUBT = frozenset(
    {
        Reason.REWARD_STUCK,
        Reason.REWARD_VARIANCE_COLLAPSE,
        Reason.REWARD_MISSING,
        Reason.ENTROPY_SHIFT,
        Reason.KL_SHIFT,
        Reason.LENGTH_SHIFT,
        Reason.CLIP_RATIO_SHIFT,
    }
)
# The batches before it are as good as any: nothing to go back from, and nothing to doubt.
_NO_GARBAGE = frozenset({Reason.ROLLOUTS_FAILED, Reason.CALLS_HUNG})
# Such a batch fails of something that is known: it is no sign of another trouble.
_KNOWN_CAUSE = frozenset({Reason.OUTAGE, Reason.OLD_ATTEMPT})
_BROKEN_WEIGHTS = frozenset({Reason.LOSS_NOT_FINITE, Reason.GRAD_NOT_FINITE})


def reported(turn: Turn, event: BatchReported) -> None:
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
    in_a_row = trainer.refused_in_a_row
    if event.refused is None:
        in_a_row = 0
    elif refusal not in _KNOWN_CAUSE and not _met_a_crash(state, event):
        in_a_row += 1
    if (
        in_a_row >= state.settings.max_refused_batches
        and holding.healthy(turn.state)
        and turn.state.trip is None
    ):
        trip(turn, Reason.ROLLOUTS_FAILED, kind="unknown", step=event.step, onset=event.step)
    if (
        state.mode is Mode.SHADOW
        and event.refused is None
        and holding.tripped(turn.state, Reason.ROLLOUTS_FAILED)
    ):
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
    elif refusal is not None:
        turn.note("would", refusal, f"would refuse the batch of step {event.step} in mode hold")


def calls_hung(turn: Turn, event: CallsHung) -> None:
    """Too many hung at once for it to be the actors: held until a cause is found, or a person decides."""
    state = turn.state
    text = f"{event.failed} of {event.calls} calls ({event.what}) hung at once; no actor was killed"
    if state.mode is Mode.SHADOW:
        turn.note("would", Reason.CALLS_HUNG, f"{text}: would hold the trainer in mode hold")
        return
    if event.attempt < state.trainer.attempt or state.trip is not None:
        return
    turn.note("action", Reason.CALLS_HUNG, text)
    step = state.trainer.step or 0
    counted = (("hung calls", float(event.failed)), ("calls", float(event.calls)))
    trip(turn, Reason.CALLS_HUNG, kind="unknown", step=step, onset=step, evidence=counted)


def _refusal(turn: Turn, event: BatchReported) -> Reason | None:
    """Why a batch is refused without a look at its reward."""
    state = turn.state
    if event.refused == Reason.STALE_WEIGHTS.value:
        return Reason.STALE_WEIGHTS  # which asks for more than another batch
    if event.attempt < state.trainer.attempt:
        return Reason.OLD_ATTEMPT
    if holding.why_down(state) is not None:
        return Reason.OUTAGE
    ended = state.outage_ended
    if ended is not None and event.began is not None and event.began < ended:
        return Reason.OUTAGE
    if event.refused is not None:
        return Reason.NO_GROUP if event.refused == Reason.NO_GROUP.value else Reason.FAILED_FRACTION
    return None


def _met_a_crash(state: State, event: BatchReported) -> bool:
    """Whether a server died under its rollouts, one of several perhaps, which is no outage."""
    crashed_at = state.suspects.at
    return crashed_at is not None and event.began is not None and event.began <= crashed_at


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
    going_on = turn.state.reward.episode is not None
    judge, verdict = reward.observe(turn.state.settings.reward, turn.state.reward, seen)
    turn.state = replace(turn.state, reward=judge)
    if verdict.level is not reward.Level.OK and verdict.reason not in _NO_DOUBT:
        turn.state = replace(turn.state, doubtful_step=seen.step)
    if verdict.recovered and turn.state.mode is Mode.SHADOW:
        turn.state = replace(turn.state, trip=None)
    if verdict.level is reward.Level.WARN and not verdict.tripped and not going_on:
        turn.note("warning", verdict.reason, f"step {seen.step}: {verdict.reason.value}")
    if verdict.level is not reward.Level.HOLD:
        return None
    if turn.state.trip is None:
        onset = verdict.onset_step if verdict.onset_step is not None else seen.step
        trip(
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
    if not holding.healthy(state):
        return frozenset({reward.Witness.SERVER_UNHEALTHY})
    return frozenset({reward.Witness.SERVERS_HEALTHY}) if state.servers else frozenset()


def logged(turn: Turn, event: RewardLogged) -> None:
    """
    A logged stream judges only a run whose trainer does not report by itself.

    Each launch of such a trainer is an attempt: after a relaunch its steps come again.
    """
    position = turn.state.stream_position if event.position is None else event.position
    turn.state = replace(turn.state, stream_step=event.step, stream_position=position)
    if turn.state.trainer.pid is not None:
        return
    seen = reward.Observation(
        attempt=turn.state.trainer.launches,
        step=event.step,
        value=event.reward,
        metrics=event.metrics,
        witnesses=_witnesses(turn.state),
    )
    _judge(turn, seen)


def trip(
    turn: Turn,
    reason: Reason,
    *,
    kind: str,
    step: int,
    onset: int,
    evidence: tuple[tuple[str, float], ...] = (),
) -> None:
    """No step on this: hold, and look at every server, since a reward alone names no culprit."""
    relapse = turn.state.phase is Phase.HALF_OPEN and reason not in _NO_GARBAGE
    if reason in _BROKEN_WEIGHTS:
        onset -= 1  # the figures are of the step before this batch
    turn.state = replace(
        turn.state,
        trip=Trip(
            reason=reason,
            kind=kind,
            step=step,
            onset_step=onset,
            since=turn.now,
            evidence=evidence,
            relapse=relapse,
        ),
    )
    if reason not in _NO_GARBAGE:
        checkpoints.doubt(turn, onset)
    if turn.state.mode is Mode.SHADOW:
        return
    for server in turn.state.servers:
        recovery.verify(turn, server, reason)


def garbage_steps(state: State, onset_step: int) -> int:
    """Optimizer steps since the onset that may have moved the weights: a gradient of zero moved none."""
    return sum(one.step >= onset_step and one.gradient != 0.0 for one in state.recent)


def settle_trip(turn: Turn) -> None:
    """
    A trip ends when its cause was found and repaired; without a cause a person decides.

    Only now, with every server well, is it known whether the weights have to go back: what infrastructure
    broke is repaired by its repair, unless garbage was committed; and what nothing explains is the policy's.
    """
    state = turn.state
    trip = state.trip
    if trip is None or not holding.healthy(state) or state.rollback is not None or state.relaunch is not None:
        return
    if trip.rolled_back:
        turn.state = replace(state, trip=None)
    elif state.phase is Phase.SHADOW:
        if trip.infra:
            turn.state = replace(state, trip=None)
    elif state.lockout is not None or (trip.kind == "called" and not _goes_on_unheld(state, trip)):
        return
    elif trip.reason is Reason.ROLLOUTS_FAILED and not trip.infra:
        _try_again(turn, trip)
    elif trip.reason is Reason.CALLS_HUNG and not trip.infra:
        call(turn, trip, "the actors, or what they wait for")
    elif _must_go_back(state, trip):
        _go_back(turn, trip)
    elif trip.infra:
        turn.state = replace(state, trip=None)
    else:
        call(turn, trip, "the policy or the reward function")


def _goes_on_unheld(state: State, trip: Trip) -> bool:
    """Without the guard it trains on while a person is waited for: what the config says is due."""
    poisoned = garbage_steps(state, trip.onset_step) >= state.settings.poison_steps
    return state.trainer.pid is None and poisoned and state.settings.on_policy_collapse == "rollback"


def _must_go_back(state: State, trip: Trip) -> bool:
    if trip.reason in _BROKEN_WEIGHTS and garbage_steps(state, trip.onset_step):
        return True
    poisoned = garbage_steps(state, trip.onset_step) >= state.settings.poison_steps
    if trip.infra or (state.trainer.pid is None and trip.kind != "policy"):
        return poisoned or trip.relapse
    # A guard's rollouts are all there and of the right weights, and every server is well: the policy's fault.
    failed_probation = trip.relapse and trip.kind != "policy"
    return failed_probation or state.settings.on_policy_collapse == "rollback"


def _go_back(turn: Turn, trip: Trip) -> None:
    """Roll back, once in an incident; where that may not be, or did not help, a person decides."""
    incident = turn.state.incident
    if incident is not None and incident.rollbacks:
        lock_out(turn, Reason.RELAPSED)
        return
    if rollbacks.begin(turn, trip.onset_step, trip.reason):
        if not trip.infra:
            what = f"{trip.reason.value} since step {trip.onset_step}, and every server is well"
            turn.note("call", trip.reason, f"{what}: going back to before it")
    elif turn.state.lockout is None:
        call(turn, trip, f"{garbage_steps(turn.state, trip.onset_step)} steps were taken on it")


def call(turn: Turn, trip: Trip, why: str) -> None:
    """Hold until a person decides."""
    turn.state = replace(turn.state, trip=replace(trip, kind="called"))
    turn.note(
        "call",
        trip.reason,
        f"{trip.reason.value} since step {trip.onset_step}, and every server is well: {why}; "
        "held until a person decides",
    )


def _try_again(turn: Turn, trip: Trip) -> None:
    state = turn.state
    settings = state.settings
    left = budget.left(
        state.retries, now=turn.now, limit=settings.restart_budget, window_s=settings.restart_window_s
    )
    if left < 1:
        lock_out(turn, trip.reason)
        return
    spent = budget.spend(
        state.retries, now=turn.now, limit=settings.restart_budget, window_s=settings.restart_window_s
    )
    turn.state = replace(state, trip=None, retries=spent)
    turn.note("action", trip.reason, "every server generates: letting the trainer try again")
