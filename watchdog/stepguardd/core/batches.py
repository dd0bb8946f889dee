"""
The verdict on a batch before its optimizer step, and on a logged stream after it.

A batch may be refused without a look at its reward; a reward that trips holds the run until a cause is found.
"""

from dataclasses import replace

from . import budget, fleet, holding, recovery, reward, rollbacks
from .breaker import Phase
from .commands import PublishGate
from .events import (
    BatchReported,
    RewardLogged,
)
from .reasons import Reason
from .state import (
    REWARDS_KEPT,
    Mode,
    ServerState,
    State,
    Trip,
)
from .turn import Turn


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
    in_a_row = trainer.refused_in_a_row + 1 if event.refused is not None else 0
    if (
        in_a_row >= state.settings.max_refused_batches
        and holding.healthy(turn.state)
        and turn.state.trip is None
    ):
        _trip(turn, Reason.ROLLOUTS_FAILED, kind="unknown", step=event.step, onset=event.step)
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


def _refusal(turn: Turn, event: BatchReported) -> Reason | None:
    """Why a batch is refused without a look at its reward."""
    state = turn.state
    if event.refused is not None:
        known = {reason.value for reason in (Reason.STALE_WEIGHTS, Reason.NO_GROUP)}
        return Reason(event.refused) if event.refused in known else Reason.FAILED_FRACTION
    if event.attempt < state.trainer.attempt:
        return Reason.OLD_ATTEMPT
    if holding.why_down(state) is not None:
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
    if not holding.healthy(state):
        return frozenset({reward.Witness.SERVER_UNHEALTHY})
    return frozenset({reward.Witness.SERVERS_HEALTHY}) if state.servers else frozenset()


def logged(turn: Turn, event: RewardLogged) -> None:
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
        rollbacks.begin(turn, onset, reason)


def settle_trip(turn: Turn) -> None:
    """A trip ends when its cause was found and repaired; without a cause a person decides."""
    state = turn.state
    trip = state.trip
    if trip is None or not holding.healthy(state) or state.rollback is not None:
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
