"""A prompt that kills the server: who is suspected, who is cleared, and who is quarantined."""

from dataclasses import replace

import pytest

from stepguardd import status
from stepguardd.core.commands import MarkPrompts, StartServer
from stepguardd.core.events import OomKind, OomSeen, Role, RolloutsLost
from stepguardd.core.state import Mode, Settings
from stepguardd.testing import World


def crash(world: World, *lost: str, answered: tuple[str, ...] = ()) -> None:
    """The server dies under these prompts, is repaired, and the guard tells of its loss."""
    began = world.now
    world.run(1)
    world.kill()
    world.run(0.25)
    world.feed(RolloutsLost(attempt=world.trainer.attempt, began=began, lost=lost, answered=answered))
    assert world.run(600, until=lambda: world.order == "GO" or world.state.lockout is not None)


def rungs(world: World) -> list[tuple[tuple[str, str], ...]]:
    """The changed arguments of each start, where there were any."""
    return [start.arguments for start in world.all(StartServer) if start.arguments]


def marks(world: World) -> list[tuple[tuple[str, ...], str | None]]:
    return [(mark.suspects, mark.quarantine) for mark in world.all(MarkPrompts)]


def batch(first: int, count: int = 8) -> list[str]:
    return [f"p{number}" for number in range(first, first + count)]


def test_the_prompt_that_is_alone_at_a_third_crash_is_quarantined_and_told() -> None:
    world = World()
    world.steps(5)
    crash(world, *batch(0))
    assert marks(world) == []
    crash(world, *batch(0))
    assert marks(world) == [(tuple(batch(0)), None)]
    crash(world, "p3")
    assert marks(world)[1:] == [((), "p3")]
    assert any("the prompt p3 kills the server" in text for text in world.told("call"))
    assert world.state.lockout is None
    world.steps(10)
    assert world.state.incident is None


def test_many_suspects_are_found_within_the_budget_of_three_restarts() -> None:
    """Each crash that brings the search further gives its restart back."""
    world = World()
    world.steps(5)
    for lost in (batch(0, 200), batch(0, 200), batch(32, 16), ["p40"]):
        crash(world, *lost)
        assert world.state.lockout is None
    assert marks(world)[-1] == ((), "p40")
    assert len(world.server().budget.spent_at) == 2


def test_a_server_that_dies_under_everybody_ends_locked_out_as_ever() -> None:
    world = World()
    world.steps(5)
    for _ in range(4):
        crash(world, "a", "b", "c")
    assert world.state.lockout is not None


def test_who_was_not_there_again_is_cleared() -> None:
    world = World()
    world.steps(5)
    crash(world, "a", "b", "c")
    crash(world, "b", "c", "d")
    assert marks(world) == [(("b", "c"), None)]


def test_who_was_answered_is_cleared() -> None:
    world = World()
    world.steps(5)
    crash(world, "a", "b", "c")
    crash(world, "a", "b", "c")
    world.feed(RolloutsLost(attempt=0, began=world.now, answered=("a", "c")))
    assert marks(world)[-1] == (("b",), None)
    world.feed(RolloutsLost(attempt=0, began=world.now, answered=("b",)))
    assert marks(world)[-1] == ((), None)
    assert world.told("call") == []


def test_two_crashes_with_nobody_in_common_accuse_nobody() -> None:
    world = World()
    world.steps(5)
    crash(world, "a", "b")
    crash(world, "c", "d")
    assert marks(world) == []


def test_a_single_prompt_is_not_accused_by_two_crashes() -> None:
    """A run that asks for one prompt at a time has it in flight whatever its server dies of."""
    world = World()
    world.steps(5)
    crash(world, "a")
    crash(world, "a")
    assert marks(world) == [(("a",), None)]
    assert world.told("call") == []


def test_a_failure_without_a_crash_accuses_nobody() -> None:
    world = World()
    world.steps(5)
    crash(world, "a", "b")
    for _ in range(3):
        world.feed(RolloutsLost(attempt=0, began=world.now, lost=("a",)))
    assert marks(world) == []


def test_a_crash_for_want_of_memory_accuses_nobody() -> None:
    world = World()
    world.steps(5)
    for _ in range(3):
        world.feed(OomSeen(kind=OomKind.CUDA_RUN, role=Role.SERVER, server=world.server().name))
        crash(world, "a", "b")
    assert marks(world) == []


def test_without_leave_to_act_it_is_only_said() -> None:
    world = World(mode=Mode.HOLD)
    world.steps(5)
    for lost in (("a", "b"), ("a", "b"), ("a",)):
        began = world.now
        world.run(1)
        world.kill()
        world.feed(RolloutsLost(attempt=0, began=began, lost=lost))
        world.fake.spawn(world.now)
        world.run(30)
    assert marks(world) == []
    assert any("would send them apart" in text for text in world.told("would"))
    assert any("would quarantine" in text for text in world.told("would"))


def test_a_daemon_that_comes_back_marks_the_suspects_again() -> None:
    world = World(settings=replace(Settings(), push_weights=True))
    world.steps(5)
    crash(world, "a", "b")
    crash(world, "a", "b")
    world.said.clear()
    world.restart_daemon()
    assert marks(world) == [(("a", "b"), None)]


@pytest.mark.parametrize("third", [batch(0), ["p3"]])
def test_the_deaths_of_a_hunt_are_not_taken_for_want_of_memory(third: list[str]) -> None:
    world = World()
    world.steps(5)
    for lost in (batch(0), batch(0), third):
        crash(world, *lost)
    assert len(world.all(StartServer)) == 3
    assert rungs(world) == []


def test_a_death_that_no_suspect_explains_may_be_want_of_memory() -> None:
    world = World()
    world.steps(5)
    crash(world, "a", "b")
    crash(world, "c", "d")
    assert rungs(world) == [(("--max-running-requests", "32"),)]


def test_memory_that_is_seen_to_run_out_in_a_hunt_takes_its_rung() -> None:
    world = World()
    world.steps(5)
    crash(world, *batch(0))
    crash(world, *batch(0))
    world.feed(OomSeen(kind=OomKind.CUDA_RUN, role=Role.SERVER, server=world.server().name))
    crash(world, *batch(0))
    assert len(rungs(world)) == 1


def test_the_batches_of_a_hunt_are_explained_by_its_outages() -> None:
    """The guard refuses each of them itself; three in a row are otherwise a trouble of their own."""
    world = World(settings=replace(Settings(), max_refused_batches=2))
    world.steps(5)
    for lost in (batch(0, 200), batch(0, 200), batch(32, 16)):
        began = world.now
        crash(world, *lost)
        assert not world.batch(failed=20, refused="failed_fraction", began=began)
        assert world.gate.reason == "outage"
        assert (world.state.trip, world.order) == (None, "GO")


def test_one_server_of_four_that_dies_explains_the_batches_that_fail_by_it() -> None:
    world = World("a", "b", "c", "d", settings=replace(Settings(), max_refused_batches=2))
    world.steps(5)
    for _ in range(3):
        began = world.now
        world.run(1)
        world.kill("a")
        world.feed(RolloutsLost(attempt=0, began=began, lost=tuple(batch(0))))
        assert world.run(600, until=lambda: world.server("a").usable)
        assert not world.batch(failed=20, refused="failed_fraction", began=began)
        assert (world.state.trip, world.order) == (None, "GO")


def test_the_status_names_suspects_and_who_is_withheld() -> None:
    world = World()
    world.steps(5)
    crash(world, *batch(0, 200))
    assert status.prompts(world.state, []) is None
    crash(world, *batch(0, 200))
    told = status.prompts(world.state, ["p900"])
    assert told is not None
    assert (told["crashes"], told["suspected"], told["withheld"]) == (2, 200, 1)
    assert (told["suspects"], told["quarantine"]) == (batch(0, 16), ["p900"])
