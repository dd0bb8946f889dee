"""
After a recovery: a few steps under watch, whose rewards must be what they were before the incident.

The reward tests look at each batch by itself. What they cannot see is a run that came back at a lower level
and stays there calmly, as one does with the wrong weights; the comparison here is for that alone, and coarse
on purpose, because a false alarm costs a rollback.
"""

import math
from dataclasses import replace

from . import batches, checkpoints, holding
from .breaker import Phase, Trigger
from .events import StepCommitted
from .reasons import Reason
from .state import REWARDS_KEPT, State, Taken
from .turn import Turn

DEVIATIONS = 4.0
SHARE = 0.3


def stepped(turn: Turn, event: StepCommitted) -> None:
    """A step was committed: on probation it counts down; and it is proof, or none, for checkpoints."""
    state = turn.state
    gradient = event.metrics.get("grad_norm")
    taken = Taken(attempt=event.attempt, step=event.step, reward=event.reward, gradient=gradient)
    turn.state = replace(state, recent=(*state.recent, taken)[-REWARDS_KEPT:])
    sane = all(value is None or math.isfinite(value) for value in (event.reward, gradient))
    well = state.trip is None and event.step != state.doubtful_step
    well = well and state.phase in {Phase.CLOSED, Phase.HALF_OPEN, Phase.SHADOW}
    checkpoints.stepped(turn, event, healthy=sane and well)
    if state.phase is Phase.HALF_OPEN:
        _on_probation(turn, event)


def _on_probation(turn: Turn, event: StepCommitted) -> None:
    state = turn.state
    seen = state.probation_rewards
    if event.reward is not None and math.isfinite(event.reward):
        seen = (*seen, event.reward)[-REWARDS_KEPT:]
    left = max(0, state.probation_left - 1)
    turn.state = replace(state, probation_left=left, probation_rewards=seen)
    if left > 0:
        return
    fallen = shortfall(turn.state)
    if fallen is None:
        holding.to(turn, Trigger.PROVEN)
        return
    onset = event.step - turn.state.settings.probation_steps + 1
    batches.trip(turn, Reason.PROBATION_FAILED, kind="unknown", step=event.step, onset=onset, evidence=fallen)


def shortfall(state: State) -> tuple[tuple[str, float], ...] | None:
    """The figures, when the rewards on probation lie far below those from before; None when all is well."""
    incident, rewards = state.incident, state.probation_rewards
    if incident is None or incident.before is None or not rewards:
        return None
    before, mean = incident.before, sum(rewards) / len(rewards)
    allowed = max(DEVIATIONS * before.deviation, SHARE * abs(before.mean))
    if before.mean - mean <= allowed:
        return None
    return (("before", before.mean), ("on_probation", mean), ("allowed_fall", allowed))
