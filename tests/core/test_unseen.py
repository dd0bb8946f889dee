"""What is not known of servers is said, with what is lost by it, and never before it was looked for."""

from stepguardd import status
from stepguardd.core.state import Settings
from stepguardd.testing import FakeServer, World


def told(world: World) -> dict[str, str]:
    return status.unseen(world.state)


def test_a_server_that_offers_everything_has_nothing_unseen() -> None:
    world = World("s")
    world.run(60)
    assert told(world) == {}


def test_nothing_is_unseen_before_it_was_looked_for() -> None:
    assert told(World(FakeServer(name="s", lacks=frozenset({"health", "metrics"})), running=False)) == {}


def test_what_a_server_does_not_offer_is_named_with_what_is_lost_by_it() -> None:
    lacks = frozenset({"ready", "metrics", "server_info", "loads", "health"})
    world = World(FakeServer(name="s", lacks=lacks))
    world.run(60)
    found = told(world)
    assert list(found) == ["/ready", "/metrics", "/server_info", "/v1/loads", "/health"]
    assert all(text.startswith("not offered by s: ") for text in found.values())
    assert "--enable-metrics" in found["/metrics"]


def test_processes_of_another_machine_are_named_as_unseen() -> None:
    world = World(FakeServer(name="s", visible=False, managed=False))
    world.run(10)
    assert list(told(world)) == ["processes"]


def test_of_a_thousand_servers_three_are_named() -> None:
    fakes = [FakeServer(name=f"s{index}", lacks=frozenset({"metrics"})) for index in range(100)]
    world = World(*fakes, settings=Settings(push_weights=True))
    world.run(2)
    assert told(world)["/metrics"].startswith("not offered by s0, s1, s2 and 97 more: ")
