"""A trainer without the guard is held by its requests: its servers are paused, never for good."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from stepguardd.core.commands import ContinueGeneration, PauseGeneration, PushWeights, RunCanary
from stepguardd.core.state import Halted, Settings
from stepguardd.testing import FakeServer, FakeTrainer, World

BOUND_S = Settings().request_timeout_s / 2


def unguarded(*servers: str | FakeServer, settings: Settings | None = None, mode: str = "act") -> World:
    world = World(*servers, settings=settings or Settings(), mode=mode, trainer=FakeTrainer(guarded=False))
    for _ in range(30):
        assert world.log()
    return world


def waiting(world: World) -> bool:
    """Whether no server generates for the trainer."""
    return not any(fake.generates(world.now) for fake in world.servers.values())


def test_a_pause_by_a_person_lets_its_requests_wait_until_they_let_go() -> None:
    world = unguarded("a", "b")
    world.ask("pause")
    assert world.run(5, until=lambda: waiting(world))
    assert not world.log()
    assert any("has no guard" in text and "150 s" in text for text in world.told("action"))
    world.ask("resume")
    assert world.run(5, until=lambda: not waiting(world) and not world.state.halts)
    assert all(not fake.paused for fake in world.servers.values())
    assert world.log()


def test_a_reward_that_is_gone_holds_it_once_every_server_has_generated() -> None:
    world = unguarded()
    assert world.run(60, until=lambda: not world.log(0.0))
    assert world.state.trip is not None
    first_pause = next(at for at, command in world.said if isinstance(command, PauseGeneration))
    canary = [at for at, command in world.said if isinstance(command, RunCanary)]
    assert canary[-1] < first_pause
    assert world.fake.paused


def test_the_servers_left_in_an_outage_wait_until_the_quorum_is_back() -> None:
    world = unguarded("a", "b", settings=Settings(quorum=1.0, backoff_first_s=0.0))
    world.kill("a")
    assert world.run(5, until=lambda: world.servers["b"].paused)
    assert world.run(60, until=lambda: world.order == "GO" and not world.servers["b"].paused)
    world.run(5)
    assert not world.servers["a"].paused
    assert world.log()


def test_it_ends_before_the_requests_time_out_and_is_not_begun_again() -> None:
    world = unguarded("a", "b")
    world.ask("pause")
    assert world.run(5, until=lambda: waiting(world))
    assert not world.run(BOUND_S - 10, until=lambda: not waiting(world))
    assert world.run(20, until=lambda: all(fake.generates(world.now) for fake in world.servers.values()))
    assert world.order == "HOLD"
    world.run(300)
    assert len(world.all(PauseGeneration)) == 2
    assert sum("goes on although the run is held" in text for text in world.told("call")) == 1
    world.ask("resume")
    world.run(5)
    assert world.state.halts == ()


def test_another_hold_begins_its_own_time() -> None:
    world = unguarded()
    world.ask("pause")
    world.run(BOUND_S + 10)
    world.ask("resume")
    world.run(5)
    world.ask("pause")
    assert world.run(5, until=lambda: waiting(world))


def test_a_pause_of_the_trainers_own_that_ends_ends_ours_too() -> None:
    """It pauses for new weights and continues: nobody fights it for that."""
    world = unguarded()
    world.ask("pause")
    assert world.run(5, until=lambda: world.fake.paused)
    world.run(20)
    world.fake.paused = False
    world.run(30)
    assert not world.fake.paused
    assert len(world.all(PauseGeneration)) == 1
    assert any("somebody else continued" in text for text in world.told("call"))


def test_a_pause_of_somebody_elses_is_theirs_to_end() -> None:
    world = unguarded()
    world.fake.paused = True
    world.run(5)
    world.ask("pause")
    world.run(10)
    world.ask("resume")
    world.run(10)
    assert world.fake.paused
    assert not world.all(PauseGeneration)
    assert not world.all(ContinueGeneration)


def test_a_server_that_dies_while_it_is_paused_is_proven_and_not_left_paused() -> None:
    world = unguarded("a", "b", settings=Settings(backoff_first_s=0.0))
    world.ask("pause")
    assert world.run(5, until=lambda: waiting(world))
    world.kill("a")
    assert world.run(60, until=lambda: world.server("a").usable and world.server("a").restarts == 1)
    world.ask("resume")
    assert world.run(10, until=lambda: not world.state.halts)
    assert not any(fake.paused for fake in world.servers.values())


def test_a_daemon_that_comes_back_pauses_no_server_under_repair() -> None:
    world = unguarded("a", "b")
    world.ask("pause")
    assert world.run(5, until=lambda: waiting(world))
    world.kill("a")
    assert world.run(5, until=lambda: world.state.servers[0].repair is not None)
    before = len(world.all(PauseGeneration))
    world.restart_daemon()
    assert world.state.servers[0].repair is not None
    world.run(1)
    assert [pause.server for pause in world.all(PauseGeneration)[before:]] == ["b"]


def test_a_server_that_does_not_answer_is_let_go_as_soon_as_it_does() -> None:
    world = unguarded("a", "b")
    world.ask("pause")
    assert world.run(5, until=lambda: waiting(world))
    world.servers["a"].can_pause = False
    world.ask("resume")
    world.run(7)
    assert world.servers["a"].paused
    assert 2 <= len(world.all(ContinueGeneration)) <= 6
    world.servers["a"].can_pause = True
    assert world.run(5, until=lambda: not world.servers["a"].paused)


def test_a_server_that_cannot_be_paused_is_told_and_left_alone() -> None:
    world = unguarded()
    world.fake.can_pause = False
    world.ask("pause")
    world.run(3)
    world.fake.can_pause = True
    world.run(10)
    assert not world.fake.paused
    assert any("could not be paused" in text for text in world.told("action"))
    assert len(world.all(PauseGeneration)) == 1


def lost_at_the_pause(world: World) -> None:
    world.ask("pause")


def lost_in_the_pause(world: World) -> None:
    world.ask("pause")
    assert world.run(5, until=lambda: world.fake.paused)


def lost_at_its_end(world: World) -> None:
    lost_in_the_pause(world)
    world.ask("resume")


@pytest.mark.parametrize("lost", [lost_at_the_pause, lost_in_the_pause, lost_at_its_end])
def test_a_daemon_that_dies_forgets_no_pause(lost: Callable[[World], None]) -> None:
    world = unguarded()
    lost(world)
    world.restart_daemon()
    world.run(5)
    if world.order == "HOLD":
        assert world.fake.paused
        world.ask("resume")
    assert world.run(5, until=lambda: not world.fake.paused and not world.state.halts)
    assert world.log()


def test_a_daemon_that_ended_well_lifted_it_and_the_next_one_pauses_again() -> None:
    world = unguarded()
    lost_in_the_pause(world)
    world.fake.paused = False
    world.restart_daemon()
    assert world.run(3, until=lambda: world.fake.paused)
    assert not any(halt.over for halt in world.state.halts)


def test_the_time_is_of_the_hold_and_not_of_the_daemon() -> None:
    world = unguarded()
    lost_in_the_pause(world)
    world.run(BOUND_S - 20)
    world.restart_daemon()
    assert world.run(30, until=lambda: not world.fake.paused)
    assert [halt.stage for halt in world.state.halts] == [Halted.LIFTED]


def test_a_trainer_with_the_guard_is_held_by_its_page_alone() -> None:
    world = World()
    world.steps(3)
    world.ask("pause")
    world.run(10)
    assert not world.all(PauseGeneration)


def test_a_guard_that_comes_ends_the_pause() -> None:
    world = unguarded()
    lost_in_the_pause(world)
    world.trainer.guarded = True
    assert world.run(5, until=lambda: not world.fake.paused)
    assert world.order == "HOLD"


def test_in_shadow_a_person_alone_may_hold_it() -> None:
    world = unguarded(mode="shadow")
    assert not world.run(20, until=lambda: not world.log(0.0))
    assert world.state.trip is not None
    assert not world.all(PauseGeneration)
    world.ask("pause")
    assert world.run(5, until=lambda: waiting(world))


def test_where_the_config_says_never_nothing_is_paused() -> None:
    world = unguarded(settings=Settings(request_timeout_s=0.0))
    world.ask("pause")
    world.run(10)
    assert world.order == "HOLD"
    assert not world.all(PauseGeneration)


def test_a_run_of_which_no_trainer_is_known_is_left_alone() -> None:
    world = World(trainer=FakeTrainer(guarded=False))
    world.ask("pause")
    world.run(10)
    assert not world.all(PauseGeneration)


def test_weights_are_never_pushed_into_a_server_that_is_paused_for_it() -> None:
    """Two loads at once into a paused server kill it; Promises looks at each push."""
    world = unguarded("a", "b", settings=Settings(push_weights=True, quorum=1.0, backoff_first_s=0.0))
    world.kill("a")
    assert world.run(60, until=lambda: world.order == "GO")
    assert world.all(PauseGeneration)
    assert world.run(5, until=lambda: not any(fake.paused for fake in world.servers.values()))


def test_weights_that_nothing_proves_are_told_after_a_restart() -> None:
    """Its restarted server serves the base model; what it holds itself, nobody says."""
    world = unguarded("a", "b", settings=Settings(backoff_first_s=0.0))
    newest = world.trainer.version
    world.kill("a")
    assert world.run(60, until=lambda: world.server("a").usable and world.server("a").restarts == 1)
    (told,) = [text for text in world.told("call") if "nothing proves it" in text]
    assert "a serves version base" in told
    assert f"the others serve {newest}" in told
    assert not any("proven current" in text for text in world.told("action"))


def test_a_first_start_and_weights_that_never_change_are_no_such_news() -> None:
    world = unguarded(settings=Settings(weights_fixed=True, backoff_first_s=0.0))
    world.kill()
    assert world.run(60, until=lambda: world.server().usable and world.server().restarts == 1)
    assert not any("nothing proves it" in text for text in world.told("call"))


PUSH = Settings(push_weights=True, backoff_first_s=0.0)


def restarted(world: World, name: str) -> bool:
    return world.run(60, until=lambda: world.server(name).usable and world.server(name).restarts == 1)


@pytest.mark.parametrize("names", [("a", "b"), ("a",)])
def test_a_restarted_server_gets_the_newest_weights_that_were_served(names: tuple[str, ...]) -> None:
    """The trainer names no version as its own; what rollouts were generated with stands for it."""
    world = unguarded(*names, settings=PUSH)
    newest = world.trainer.version
    world.kill("a")
    assert restarted(world, "a")
    assert [push.version for push in world.all(PushWeights)] == [newest]
    assert world.servers["a"].version == newest
    assert not world.told("call")
    assert any("with the newest that was served" in text for text in world.told("action"))


def test_weights_that_do_not_load_are_told_and_not_waited_for() -> None:
    world = unguarded("a", "b", settings=PUSH)
    world.servers["a"].can_load = False
    world.kill("a")
    assert restarted(world, "a")
    assert len(world.all(PushWeights)) == 1
    assert any("could not be pushed" in text for text in world.told("call"))
    assert any("nothing proves it" in text for text in world.told("call"))
    assert not world.told("locked_out")


def without_versions(*, weights: str) -> World:
    """Two servers of which every process says `default`; the one that is killed comes back with weights."""
    world = unguarded("a", "b", settings=replace(PUSH, push_weights=False))
    for fake in world.servers.values():
        fake.version = fake.base_version = "default"
        fake.weights = "trained"
    world.run(3)
    world.kill("a")
    assert world.run(60, until=lambda: len(world.servers["a"].starts) == 2)
    world.servers["a"].weights = weights
    assert restarted(world, "a")
    return world


def test_the_weights_of_another_server_expose_those_of_a_restarted_one() -> None:
    """Where nobody names versions, both say the same: the base model beside the trained one."""
    (told,) = [text for text in without_versions(weights="base").told("call") if "after its restart" in text]
    assert "a and b both say default, with checksums" in told


def test_the_same_weights_as_another_servers_are_no_news() -> None:
    world = without_versions(weights="trained")
    assert not world.told("call")
    assert any("with the newest that was served" in text for text in world.told("action"))


def test_weights_that_are_not_what_they_are_called_are_loaded_anew() -> None:
    """The push said the right version and brought another model: once more, and then it is told."""
    world = unguarded("a", "b", settings=PUSH)
    world.servers["a"].wrong_loads = 1
    world.kill("a")
    assert restarted(world, "a")
    assert [push.anew for push in world.all(PushWeights)] == [False, True]
    assert world.servers["a"].weights is None
    assert not world.told("locked_out")
