"""What follows a repair: rewards as before, or the next remedy; and what a rollback is for, and what not."""

from dataclasses import replace

from stepguardd.core.batches import garbage_steps
from stepguardd.core.breaker import Phase
from stepguardd.core.commands import PrepareRollback
from stepguardd.core.events import CheckpointSaved, CheckpointVetted, StepCommitted
from stepguardd.core.ledger import proven
from stepguardd.core.state import Settings, Taken
from stepguardd.testing import World

ROLLBACK = Settings(push_weights=True, on_policy_collapse="rollback")


def committed(world: World, reward: float, gradient: float | None = 0.4) -> None:
    """A step that was taken, whatever the verdict on its batch."""
    trainer = world.trainer
    trainer.step += 1
    metrics = {} if gradient is None else {"grad_norm": gradient}
    world.feed(StepCommitted(attempt=trainer.attempt, step=trainer.step, reward=reward, metrics=metrics))


def on_probation() -> World:
    world = World(target=(20, "/c/20"))
    for _ in range(30):
        assert world.step(0.7)
    world.kill()
    assert world.run(60, until=lambda: world.order == "GO")
    assert world.state.phase is Phase.HALF_OPEN
    return world


def test_rewards_as_before_the_incident_end_the_probation() -> None:
    world = on_probation()
    for _ in range(3):
        committed(world, 0.68)
    assert world.state.phase is Phase.CLOSED


def test_rewards_far_below_those_from_before_re_open_and_roll_back() -> None:
    world = on_probation()
    for _ in range(3):
        committed(world, 0.3)
    assert world.state.phase is Phase.OPEN
    assert world.gate.reason == "probation_failed"
    world.run(20, until=lambda: world.order == "GO")
    assert world.all(PrepareRollback)[0].before_step == 31


def test_a_relapse_after_its_rollback_locks_the_run_out() -> None:
    world = on_probation()
    for _ in range(3):
        committed(world, 0.3)
    world.run(20, until=lambda: world.order == "GO")
    for _ in range(3):
        committed(world, 0.2)
    world.run(5)
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "relapsed")


def collapsed(settings: Settings) -> World:
    """The reward is gone, every server is well, and no rollout failed."""
    world = World(target=(20, "/c/20"), settings=settings)
    world.steps(30)
    assert not world.batch(0.0)
    world.run(10)
    return world


def test_a_policy_that_collapsed_is_held_and_a_person_called() -> None:
    world = collapsed(Settings(push_weights=True))
    assert world.order == "HOLD"
    assert not world.all(PrepareRollback)
    assert any("the policy or the reward function" in text for text in world.told("call"))


def test_a_policy_that_collapsed_is_rolled_back_where_the_config_says_so_and_told_of() -> None:
    world = collapsed(ROLLBACK)
    assert world.all(PrepareRollback)
    assert world.trainer.attempt == 1
    assert world.told("call")


def test_garbage_with_a_gradient_of_zero_moved_no_weight() -> None:
    """All rewards of a group alike: no advantage, no gradient. Unknown is not zero."""
    world = World()
    taken = [
        Taken(attempt=0, step=step, reward=0.0, gradient=g) for step, g in ((5, 0.0), (6, 0.1), (7, None))
    ]
    state = replace(world.state, recent=tuple(taken))
    assert garbage_steps(state, 5) == 2
    assert garbage_steps(state, 7) == 1


def test_infrastructure_that_cost_no_step_rolls_nothing_back() -> None:
    world = World(target=(20, "/c"))
    world.steps(30)
    world.kill()
    assert world.run(60, until=lambda: world.order == "GO")
    world.steps(3)
    assert not world.all(PrepareRollback)


def test_a_gradient_that_is_not_a_number_takes_the_step_back() -> None:
    world = World(target=(20, "/c/20"))
    world.steps(30)
    committed(world, 0.7, float("nan"))
    assert not world.batch(0.7)
    assert world.run(20, until=lambda: world.trainer.attempt == 1)
    assert world.all(PrepareRollback)[0].before_step == 31
    assert world.run(20, until=lambda: world.order == "GO")
    world.steps(4)
    assert world.state.phase is Phase.CLOSED


# ---- the ledger --------------------------------------------------------------------------------------


def saved(world: World) -> None:
    step = world.trainer.step
    world.feed(CheckpointSaved(attempt=world.trainer.attempt, step=step, path=f"/c/{step}"))
    world.feed(
        CheckpointVetted(
            attempt=world.trainer.attempt,
            step=step,
            verdict="good",
            finding="whole",
            reason="complete",
            size_bytes=1,
        )
    )


def proven_steps(world: World) -> list[int]:
    return [row.step for row in world.state.checkpoints if proven(row)]


def test_a_checkpoint_is_proven_by_five_healthy_steps() -> None:
    world = World()
    world.steps(3)
    saved(world)
    world.steps(4)
    assert proven_steps(world) == []
    world.steps(1)
    assert proven_steps(world) == [3]


def test_a_checkpoint_saved_inside_an_incident_is_never_proven() -> None:
    world = World()
    world.steps(6)
    world.kill()
    assert world.run(60, until=lambda: world.order == "GO")
    world.steps(1)
    saved(world)  # on probation, which is part of the incident
    world.steps(9)
    assert proven_steps(world) == []
    saved(world)
    world.steps(5)
    assert proven_steps(world) == [16]


def test_what_was_saved_since_the_onset_is_doubted_for_good() -> None:
    world = World(settings=Settings(push_weights=True))
    world.steps(20)
    saved(world)
    world.steps(10)
    world.trainer.step = 18
    assert not world.batch(0.0)
    world.run(5)
    world.ask("resume")
    assert [row.inside for row in world.state.checkpoints] == [True]


def test_a_rollback_marks_what_it_set_aside() -> None:
    world = World(target=(10, "/c/10"))
    for _ in range(3):
        world.steps(10)
        saved(world)
    world.steps(5)
    world.ask("rollback", before_step=20)
    assert world.run(30, until=lambda: world.order == "GO")
    assert [(row.step, row.set_aside) for row in world.state.checkpoints] == [
        (10, False),
        (20, True),
        (30, True),
    ]
