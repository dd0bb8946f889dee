"""A trainer that dies is started again from what is proven; one that finished is left in peace."""

from dataclasses import replace

import pytest

from stepguardd.core import relaunch
from stepguardd.core.breaker import Phase
from stepguardd.core.commands import PrepareRollback, StartServer, StartTrainer, StopTrainer
from stepguardd.core.events import Tick, TrainerExited, TrainerTree
from stepguardd.core.reasons import Reason
from stepguardd.core.state import Launch, Mode, Settings
from stepguardd.core.turn import Turn
from stepguardd.testing import FakeTrainer, World

MANAGED = Settings(push_weights=True, trainer_managed=True, relaunch_budget=50, backoff_first_s=0.5)


def managed(settings: Settings = MANAGED, *, mode: str = "act", **trainer: object) -> World:
    """A run whose trainer Stepguard starts, some steps on."""
    fake = replace(FakeTrainer(managed=True), **trainer)  # type: ignore[arg-type]
    world = World(settings=settings, trainer=fake, mode=mode, target=(4, "/c/4"))
    world.steps(6)
    return world


def back(world: World) -> bool:
    return world.run(120, until=lambda: world.order == "GO" and not world.trainer.dead)


def test_a_trainer_that_is_killed_is_started_again_from_the_newest_proven_checkpoint() -> None:
    world = managed()
    world.kill_trainer()
    assert world.order == "HOLD"
    assert back(world)
    kinds = [type(c) for _, c in world.said if isinstance(c, StopTrainer | PrepareRollback | StartTrainer)]
    assert kinds == [StopTrainer, PrepareRollback, StartTrainer]
    assert world.all(PrepareRollback)[0].before_step is None
    assert (world.trainer.starts[0].target_step, world.trainer.starts[0].target_path) == (4, "/c/4")
    world.steps(3)
    assert world.state.phase is Phase.CLOSED
    assert world.state.last_incident is not None
    assert world.state.last_incident.relaunches == 1


@pytest.mark.parametrize(("code", "goodbye"), [(0, None), (None, "finished"), (1, "finished"), (-15, None)])
def test_a_trainer_that_finished_or_was_told_to_end_is_neither_started_again_nor_called_about(
    code: int | None, goodbye: str | None
) -> None:
    world = managed()
    world.kill_trainer(code, goodbye=goodbye)
    world.run(60)
    assert not world.all(StartTrainer)
    assert not world.told("call")
    assert len(world.told("finished")) == 1
    assert world.order == "GO"


def test_a_goodbye_after_an_error_is_a_death() -> None:
    world = managed()
    world.kill_trainer(None, goodbye="failed")
    assert back(world)
    assert len(world.trainer.starts) == 1


def test_three_relaunches_without_a_committed_step_lock_the_run_out() -> None:
    world = managed()
    for _ in range(3):
        world.kill_trainer()
        assert back(world)
    world.kill_trainer()
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "relaunch_budget_spent")
    assert len(world.trainer.starts) == 3


def test_a_step_between_them_lets_relaunches_go_on_until_the_window_is_spent() -> None:
    world = managed(replace(MANAGED, relaunch_budget=5))
    for _ in range(5):
        world.kill_trainer()
        assert back(world)
        world.steps(1)
    world.kill_trainer()
    assert world.gate.reason == "relaunch_budget_spent"


def test_the_batch_in_which_it_dies_twice_is_skipped() -> None:
    world = managed()
    for _ in range(2):
        while world.trainer.step < 6:
            world.steps(1)
        world.kill_trainer()
        assert back(world)
    assert [start.skip_steps for start in world.trainer.starts] == [(), (7,)]
    assert any(
        "died twice in the batch of step 7, which is skipped" in text for text in world.told("warning")
    )


def test_without_a_guard_the_batch_cannot_be_skipped_and_that_is_said() -> None:
    world = World(settings=MANAGED, trainer=FakeTrainer(managed=True), target=(4, "/c/4"))
    world.state = replace(world.state, trainer=replace(world.state.trainer, pid=None, committed_step=6))
    for _ in range(2):
        world.feed(TrainerExited(pid=world.state.trainer.procs[0].pid, code=-9))
        world.trainer.dead = True
        world.run(5, until=lambda: world.state.relaunch is None)
        world.state = replace(world.state, trainer=replace(world.state.trainer, pid=None, committed_step=6))
    assert any("cannot be skipped" in text for text in world.told("warning"))
    assert not any(start.skip_steps for start in world.trainer.starts)


def test_a_rank_that_ends_while_the_others_wait_is_a_death_after_a_grace() -> None:
    world = managed()
    world.feed(TrainerExited(pid=4711, rank=3))
    world.run(20)
    assert not world.all(StopTrainer)
    world.run(15, until=lambda: bool(world.all(StopTrainer)))
    assert world.gate.reason == "rank_lost"
    assert back(world)


def test_a_rank_that_ends_while_steps_go_on_is_none() -> None:
    world = managed()
    world.feed(TrainerExited(pid=4711, rank=3))
    world.run(20)
    world.steps(1)
    world.run(60)
    assert not world.all(StopTrainer)


def test_a_hung_trainer_is_ended_and_started_again() -> None:
    world = managed()
    turn = Turn(world.state, Tick(), world.now)
    relaunch.hung(turn, Reason.RANK_LOST, "no progress for an hour")
    assert turn.state.relaunch is not None
    assert [type(command) for command in turn.commands] == [StopTrainer]


def test_a_trainer_that_will_not_end_locks_the_run_out() -> None:
    world = managed(can_stop=False)
    world.kill_trainer()
    world.run(5)
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "stop_failed")


def test_a_trainer_that_does_not_start_is_tried_again_and_then_given_up() -> None:
    world = managed(can_start=False)
    world.kill_trainer()
    world.run(60)
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "relaunch_budget_spent")


def test_with_nothing_good_to_start_from_a_person_is_called() -> None:
    world = managed()
    world.target = None
    world.kill_trainer()
    world.run(5)
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "no_checkpoint")


def test_a_lockout_for_a_dead_trainer_is_ended_by_a_person_with_a_new_budget() -> None:
    world = managed(can_start=False)
    world.kill_trainer()
    world.run(60)
    world.trainer.can_start = True
    world.ask("resume")
    assert back(world)


@pytest.mark.parametrize("mode", ["hold", "shadow"])
def test_only_in_mode_act_is_a_trainer_started_again(mode: str) -> None:
    world = managed(mode=mode)
    world.kill_trainer()
    world.run(30)
    assert not world.all(StartTrainer)
    assert any("in mode act" in text for text in world.told("would"))


def test_a_trainer_that_is_nobody_elses_is_started_first_once_the_servers_serve() -> None:
    world = World(settings=MANAGED, trainer=FakeTrainer(managed=True, dead=True, version=None))
    assert world.state.relaunch is not None or world.trainer.starts
    assert world.run(30, until=lambda: bool(world.trainer.starts))
    assert world.trainer.starts[0].target_step is None
    world.run(10)
    assert world.order == "GO"
    assert world.state.incidents == 0


def test_a_death_that_no_daemon_saw_is_found_at_the_next_look() -> None:
    world = managed()
    world.trainer.dead = True
    world.feed(TrainerTree(procs=()))
    assert back(world)
    assert len(world.trainer.starts) == 1


@pytest.mark.parametrize("stage", list(Launch))
def test_a_daemon_that_comes_back_finishes_the_relaunch_and_starts_no_second_trainer(stage: Launch) -> None:
    world = managed(replace(MANAGED, backoff_first_s=5.0))
    world.kill_trainer()
    if stage is Launch.BACKOFF:  # the second relaunch waits
        assert back(world)
        world.kill_trainer()
    assert world.run(
        30, until=lambda: world.state.relaunch is not None and world.state.relaunch.stage is stage
    )
    started = len(world.all(StartTrainer))
    world.restart_daemon()
    assert back(world)
    intents = [start.intent for start in world.trainer.starts]
    assert len(intents) == len(set(intents))
    assert len(world.all(StartTrainer)) == (started if stage in {Launch.START, Launch.UP} else started + 1)


def test_a_rollback_of_a_trainer_that_cannot_reload_in_place_is_a_relaunch() -> None:
    world = managed(handles_rollback=False)
    world.ask("rollback", before_step=5)
    assert back(world)
    assert [c.before_step for c in world.all(PrepareRollback)] == [5]
    assert "ROLLBACK" not in world.orders()
    assert world.trainer.step == 4
    assert world.state.incident is not None
    assert (world.state.incident.rollbacks, world.state.incident.relaunches) == (1, 1)


def test_a_trainer_that_dies_in_its_rollback_is_relaunched_from_before_the_same_step() -> None:
    world = managed()
    world.trainer.listens = False
    world.ask("rollback", before_step=5)
    world.run(2)
    assert world.order == "ROLLBACK"
    world.kill_trainer()
    assert back(world)
    assert [c.before_step for c in world.all(PrepareRollback)] == [5, 5]


def test_in_a_lockout_a_dead_trainer_stays_dead() -> None:
    world = managed(can_resync=False, handles_resync=True)
    world.target = None
    world.ask("mode", mode="act")
    world.kill_trainer()
    world.run(5)
    assert world.state.lockout is not None
    starts = len(world.all(StartTrainer))
    world.feed(TrainerExited(pid=world.trainer.pid, code=-9))
    world.run(60)
    assert len(world.all(StartTrainer)) == starts
    assert world.state.mode is Mode.ACT


def without_a_way(**settings: object) -> World:
    """Weights go over NCCL from the trainer's start, and it has no on_resync."""
    changed = replace(MANAGED, push_weights=False, **settings)  # type: ignore[arg-type]
    return managed(changed, handles_resync=False)


def test_a_new_trainer_brings_its_weights_to_a_restarted_server_where_the_old_one_cannot() -> None:
    world = without_a_way()
    world.kill()
    assert back(world)
    assert not world.told("locked_out")
    assert (len(world.all(StartServer)), len(world.trainer.starts)) == (1, 1)
    assert world.trainer.starts[0].target_step == 4
    assert any("gets its weights from the new trainer" in text for text in world.told("action"))
    world.steps(3)
    assert world.state.phase is Phase.CLOSED
    incident = world.state.last_incident
    assert incident is not None
    assert (incident.restarts, incident.relaunches) == (1, 1)


def test_a_trainer_that_can_bring_its_weights_is_not_ended_for_them() -> None:
    world = managed(replace(MANAGED, push_weights=False), handles_resync=True)
    world.kill()
    assert back(world)
    assert "RESYNC" in world.orders()
    assert not world.trainer.starts


def test_weights_that_are_old_for_a_while_end_no_trainer() -> None:
    """They are pushed by the trainer itself, a little later than it says so."""
    world = without_a_way()
    world.trainer.version = "v1"
    world.see_trainer()
    world.run(20)
    assert not world.all(StopTrainer)


def test_where_the_trainer_is_not_ours_to_start_such_a_server_locks_the_run_out() -> None:
    world = World(settings=Settings(), trainer=FakeTrainer(handles_resync=False))
    world.steps(6)
    world.kill()
    world.run(400, until=lambda: world.state.lockout is not None)
    assert world.gate.reason == "weights_unproven"
    assert not world.all(StopTrainer)


def test_in_mode_hold_a_trainer_is_not_ended_for_its_weights_nor_talked_about_at_each_look() -> None:
    world = managed(replace(MANAGED, push_weights=False), mode="hold", handles_resync=False)
    world.kill()
    world.fake.spawn(world.now)
    world.run(60)
    assert world.order == "HOLD"
    assert not world.all(StopTrainer)
    assert len(world.told("would")) < 5
