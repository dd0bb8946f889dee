"""A person says that they know of an incident: by name, with a reason, and only of one that is open."""

import pytest

from stepguardd.control.contract import Refused
from stepguardd.control.requests import incident_number, refuse_nonsense
from stepguardd.core.commands import Notify
from stepguardd.core.decide import decide
from stepguardd.core.events import Event, OperatorAsked, Proc, ProcessExited, TreeSeen
from stepguardd.core.state import Mode, Server, ServerState, Settings, State, initial

PROC = Proc(pid=7, start_ticks=1, role="scheduler")


def held() -> State:
    """A run held in mode hold, because its one server died."""
    server = Server(name="s", managed=True, state=ServerState.SERVING)
    state = initial(Settings(), Mode.HOLD, (server,))
    events: list[Event] = [
        TreeSeen(server="s", procs=(PROC,)),
        ProcessExited(server="s", proc=PROC, code=-9),
    ]
    for at, event in enumerate(events, 1):
        state, _ = decide(state, event, float(at))
    assert state.incident is not None, "nothing died"
    return state


def test_an_ack_is_kept_with_the_incident_and_told() -> None:
    state, commands = decide(held(), OperatorAsked(verb="ack", who="ann", why="on it"), 3.0)
    assert state.incident is not None
    assert state.incident.known_to == "ann: on it"
    told = [command for command in commands if isinstance(command, Notify)]
    assert [(one.what, one.incident) for one in told] == [("acked", 1)]


def test_an_incident_says_what_spoke_for_it() -> None:
    state = held()
    assert state.incident is not None
    assert state.incident.evidence == (
        "95% sure: the inference server crashed",
        "s's scheduler process (pid 7) ended by signal 9",
    )


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (OperatorAsked(verb="ack", who="ann", why="on it", incident=4), "the open one is 1"),
        (OperatorAsked(verb="ack", who="ann", why=""), "say why"),
    ],
)
def test_an_ack_that_makes_no_sense_is_refused(request_: OperatorAsked, words: str) -> None:
    with pytest.raises(Refused, match=words):
        refuse_nonsense(held(), request_)


def test_without_an_incident_there_is_nothing_to_acknowledge() -> None:
    state = initial(Settings(), Mode.HOLD, ())
    with pytest.raises(Refused, match="no incident is open"):
        refuse_nonsense(state, OperatorAsked(verb="ack", who="ann", why="on it"))


def test_an_incident_is_named_as_people_write_it() -> None:
    assert (incident_number("#3"), incident_number(3), incident_number(None)) == (3, 3, None)
    with pytest.raises(Refused, match="it is a number"):
        incident_number("server_died")
