"""The first look at a server whose pause has just ended: its requests have waited, and that was no hang."""

from stepguardd.core.events import Answer, ServerProbed, Tick
from stepguardd.core.state import ServerState
from stepguardd.testing import World


def test_requests_that_waited_through_a_pause_are_no_hang_when_it_ends() -> None:
    world = World()
    world.fake.paused, world.fake.running, world.fake.busy = True, 8, False
    world.run(30)
    tokens = world.server().tokens
    continued = ServerProbed(
        server="s", ready=Answer.OK, model_info=Answer.OK, metrics=Answer.OK, running=3, tokens=tokens
    )
    world.feed(continued)
    world.feed(Tick())
    assert world.server().state is ServerState.SERVING
    assert world.order == "GO"
