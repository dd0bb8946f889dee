"""The breaker moves as its table says, and in no other way."""

from itertools import product

import pytest

from stepguardd.core.breaker import TABLE, Phase, Trigger, move
from stepguardd.core.invariants import InvariantError

# Written out by hand, so that a change of the table is a change of a promise.
PROMISED = {
    "closed": {"trip": "open", "pause": "forced_open", "give_up": "locked_out", "shadow_on": "shadow"},
    "open": {"repaired": "half_open", "pause": "forced_open", "give_up": "locked_out", "shadow_on": "shadow"},
    "half_open": {
        "trip": "open",
        "proven": "closed",
        "pause": "forced_open",
        "give_up": "locked_out",
        "shadow_on": "shadow",
    },
    "shadow": {"shadow_off": "closed", "pause": "forced_open"},
    "forced_open": {"release": "open", "give_up": "locked_out"},
    "locked_out": {"release": "open"},
}


@pytest.mark.parametrize(("phase", "trigger"), list(product(Phase, Trigger)))
def test_every_pair_is_in_the_table_or_raises(phase: Phase, trigger: Trigger) -> None:
    promised = PROMISED[phase.value].get(trigger.value)
    if promised is None:
        with pytest.raises(InvariantError, match=f"cannot {trigger.value} while {phase.value}"):
            move(phase, trigger)
    else:
        assert move(phase, trigger) is Phase(promised)


def test_no_phase_is_a_trap_and_every_phase_can_be_reached() -> None:
    """From each phase a person, or a repair, leads back to CLOSED; and each is reached from CLOSED."""
    leads = {phase: {to for (of, _), to in TABLE.items() if of is phase} for phase in Phase}

    def reach(start: Phase) -> set[Phase]:
        seen, todo = {start}, [start]
        while todo:
            new = leads[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    assert reach(Phase.CLOSED) == set(Phase)
    assert all(Phase.CLOSED in reach(phase) for phase in Phase)


def test_all_sequences_of_triggers_stay_in_the_table() -> None:
    """All sequences of up to six triggers (299,592), counted by the phases that they lead to."""
    ends = {Phase.CLOSED: 1}
    legal = illegal = 0
    for _ in range(6):
        after: dict[Phase, int] = {}
        for phase, ways in ends.items():
            for trigger in Trigger:
                try:
                    to = move(phase, trigger)
                except InvariantError:
                    illegal += ways
                    assert (phase, trigger) not in TABLE
                    continue
                legal += ways
                assert TABLE[phase, trigger] is to
                after[to] = after.get(to, 0) + ways
        ends = after
    assert legal > 500
    assert illegal > legal
    assert set(ends) == set(Phase)
