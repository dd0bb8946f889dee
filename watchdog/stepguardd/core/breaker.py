"""
The breaker: which phase the run is in, and the only ways from one to another.

The table is the whole of it: a pair that is not in it raises, because a phase changed by an unforeseen
trigger is a bug to find, not a case to guess.
"""

from enum import Enum

from .invariants import InvariantError


class Phase(Enum):
    """The breaker's phases. The first three are the classic ones."""

    CLOSED = "closed"  # the run goes on
    OPEN = "open"  # the trainer is held
    HALF_OPEN = "half_open"  # on probation: the run goes on, and one relapse re-opens
    SHADOW = "shadow"  # everything is judged, nothing is held
    FORCED_OPEN = "forced_open"  # a person holds the trainer
    LOCKED_OUT = "locked_out"  # the budget is spent: held until a person decides


class Trigger(Enum):
    """What may move the breaker."""

    TRIP = "trip"  # something holds the run
    REPAIRED = "repaired"  # nothing holds it any more
    PROVEN = "proven"  # probation was passed
    GIVE_UP = "give_up"  # no budget left for another remedy
    PAUSE = "pause"  # a person holds
    RELEASE = "release"  # a person lets go
    SHADOW_ON = "shadow_on"
    SHADOW_OFF = "shadow_off"


TABLE: dict[tuple[Phase, Trigger], Phase] = {
    (Phase.CLOSED, Trigger.TRIP): Phase.OPEN,
    (Phase.CLOSED, Trigger.PAUSE): Phase.FORCED_OPEN,
    (Phase.CLOSED, Trigger.GIVE_UP): Phase.LOCKED_OUT,
    (Phase.CLOSED, Trigger.SHADOW_ON): Phase.SHADOW,
    (Phase.OPEN, Trigger.REPAIRED): Phase.HALF_OPEN,
    (Phase.OPEN, Trigger.PAUSE): Phase.FORCED_OPEN,
    (Phase.OPEN, Trigger.GIVE_UP): Phase.LOCKED_OUT,
    (Phase.OPEN, Trigger.SHADOW_ON): Phase.SHADOW,
    (Phase.HALF_OPEN, Trigger.TRIP): Phase.OPEN,
    (Phase.HALF_OPEN, Trigger.PROVEN): Phase.CLOSED,
    (Phase.HALF_OPEN, Trigger.PAUSE): Phase.FORCED_OPEN,
    (Phase.HALF_OPEN, Trigger.GIVE_UP): Phase.LOCKED_OUT,
    (Phase.HALF_OPEN, Trigger.SHADOW_ON): Phase.SHADOW,
    (Phase.SHADOW, Trigger.SHADOW_OFF): Phase.CLOSED,
    (Phase.SHADOW, Trigger.PAUSE): Phase.FORCED_OPEN,
    (Phase.FORCED_OPEN, Trigger.RELEASE): Phase.OPEN,
    (Phase.FORCED_OPEN, Trigger.GIVE_UP): Phase.LOCKED_OUT,
    (Phase.LOCKED_OUT, Trigger.RELEASE): Phase.OPEN,
}


def move(phase: Phase, trigger: Trigger) -> Phase:
    """
    The phase after a trigger.

    Raises:
        InvariantError: the table has no such pair.

    """
    try:
        return TABLE[phase, trigger]
    except KeyError:
        raise InvariantError(f"the breaker cannot {trigger.value} while {phase.value}") from None
