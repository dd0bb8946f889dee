"""Too many of the trainer's calls hung at once: held and told, with nothing killed and nothing taken back."""

from stepguardd.core.commands import PrepareRollback, StopServer, StopTrainer
from stepguardd.core.events import CallsHung
from stepguardd.core.state import Settings
from stepguardd.testing import World


def hung(world: World, *, attempt: int = 0) -> None:
    world.feed(CallsHung(attempt=attempt, what="sandbox", failed=40, calls=200))


def test_the_run_is_held_at_once_and_a_person_called_when_every_server_is_well() -> None:
    world = World()
    world.steps(10)
    hung(world)
    assert (world.order, world.gate.reason) == ("HOLD", "calls_hung")
    world.run(20)
    assert world.order == "HOLD"
    (called,) = world.told("call")
    assert called.startswith("calls_hung since step 10")
    assert any("40 of 200 calls (sandbox)" in text for text in world.told("action"))
    assert world.state.incident is not None
    assert "hung calls 40, calls 200" in world.state.incident.evidence
    assert not world.all(StopServer) + world.all(PrepareRollback) + world.all(StopTrainer)


def test_a_person_lets_go() -> None:
    world = World()
    world.steps(10)
    hung(world)
    world.run(20)
    world.ask("resume")
    assert world.order == "GO"
    world.steps(5)
    assert world.state.incident is None


def test_weights_never_go_back_for_it_whatever_the_config_says() -> None:
    world = World(settings=Settings(push_weights=True, on_policy_collapse="rollback"))
    world.steps(30)
    hung(world)
    world.run(60)
    assert not world.all(PrepareRollback)


def test_a_server_that_was_the_cause_ends_it_with_its_own_repair() -> None:
    world = World()
    world.steps(10)
    world.fake.can_generate = False
    hung(world)
    world.run(80, until=lambda: bool(world.all(StopServer)))
    assert world.all(StopServer)
    world.fake.can_generate = True
    assert world.run(120, until=lambda: world.order == "GO")
    assert not any(text.startswith("calls_hung") for text in world.told("call"))


def test_in_shadow_it_is_told_and_nothing_more() -> None:
    world = World(mode="shadow")
    world.steps(10)
    hung(world)
    assert world.order == "GO"
    assert any("would hold" in text for text in world.told("would"))


def test_word_of_an_attempt_that_is_over_holds_nothing() -> None:
    world = World()
    world.trainer.attempt = 1
    world.see_trainer()
    hung(world, attempt=0)
    assert world.order == "GO"
