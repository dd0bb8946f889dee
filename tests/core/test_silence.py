"""Silence that is no death, and life that is none: who is asked what, when, and what is made of it."""

from dataclasses import replace
from itertools import pairwise

import pytest

from stepguardd.control.contract import Refused
from stepguardd.control.requests import refuse_nonsense
from stepguardd.core.commands import RunCanary, StopServer
from stepguardd.core.events import (
    Answer,
    GenerationAsked,
    OperatorAsked,
    RequestsFailed,
    SchedulerAsked,
    ServerProbed,
)
from stepguardd.core.state import ServerState, Settings
from stepguardd.testing import FakeServer, FakeTrainer, World

COLOCATED = Settings(push_weights=True, colocated=True)


def at_work(settings: Settings | None = None, **fake: object) -> World:
    server = FakeServer(name="s", **{"load": 8, **fake})  # type: ignore[arg-type]
    world = World(server, settings=settings or Settings(push_weights=True))
    world.run(5)
    return world


def enter(world: World, phase: str) -> None:
    world.trainer.phase = phase
    world.see_trainer()


# ---- announced by a person -------------------------------------------------------------------------


def test_an_announced_silence_holds_nothing_until_it_ends_and_then_counts_anew() -> None:
    world = at_work()
    world.ask("plan-server", server="s", for_s=100.0)
    world.fake.mute, world.fake.busy = True, False
    world.run(99)
    assert (world.order, world.server().state) == ("GO", ServerState.PLANNED)
    assert world.run(20, until=lambda: world.order == "HOLD")
    assert world.gate.reason == "server_unreachable"


def test_an_announcement_lets_go_of_a_hold_for_soft_evidence() -> None:
    world = at_work()
    world.fake.mute, world.fake.busy = True, False
    assert world.run(30, until=lambda: world.order == "HOLD")
    world.ask("plan-server", server="s", for_s=300.0)
    assert world.order == "GO"
    world.run(200)
    assert not world.all(StopServer)


def test_an_announcement_can_be_taken_back_and_is_no_longer_than_a_day() -> None:
    world = at_work()
    world.ask("plan-server", for_s=1e9)
    until = world.server().planned_until
    assert until is not None
    assert until - world.now <= 86_400.0
    world.ask("plan-server", for_s=0.0)
    assert world.server().state is ServerState.SERVING


def test_a_death_is_no_silence_whoever_announced_it() -> None:
    world = at_work()
    world.ask("plan-server", for_s=300.0)
    world.kill()
    assert (world.order, world.gate.reason) == ("HOLD", "server_died")


def test_a_silence_that_makes_no_sense_is_refused_by_name() -> None:
    world = at_work()
    asked = OperatorAsked(verb="plan-server", who="ada", why="", server="nobody", for_s=60.0)
    with pytest.raises(Refused, match="no server 'nobody'"):
        refuse_nonsense(world.state, asked)
    world.kill()
    with pytest.raises(Refused, match="is restarting"):
        refuse_nonsense(world.state, replace(asked, server="s"))


# ---- announced by the trainer's phase --------------------------------------------------------------


def test_a_weight_update_ends_with_its_phase_and_outlasts_no_lease() -> None:
    world = at_work(Settings(push_weights=True, planned_lease_s=120.0))
    enter(world, "SYNC")
    assert world.server().state is ServerState.PLANNED
    enter(world, "ROLLOUT")
    assert world.server().state is ServerState.SERVING
    enter(world, "SYNC")
    world.fake.frozen, world.fake.busy = True, False
    world.run(119)
    assert world.order == "GO"
    world.run(3)
    assert (world.order, world.gate.reason) == ("HOLD", "paused_too_long")


def test_outside_of_a_colocated_run_a_server_has_to_live_while_the_trainer_trains() -> None:
    world = at_work()
    enter(world, "TRAIN")
    world.fake.listens = False
    assert world.run(10, until=lambda: world.order == "HOLD")


def test_a_colocated_server_that_was_woken_during_training_is_proven_when_the_rollouts_begin() -> None:
    world = at_work(COLOCATED)
    enter(world, "TRAIN")
    world.fake.stopped = True
    assert world.run(5, until=lambda: world.order == "HOLD")
    assert world.run(10, until=lambda: world.order == "GO")
    world.run(30)
    assert not world.all(RunCanary)
    enter(world, "ROLLOUT")
    assert world.order == "HOLD"
    assert world.run(10, until=lambda: world.order == "GO")
    assert len(world.all(RunCanary)) == 1
    assert world.server().state is ServerState.SERVING


def test_a_colocated_server_that_died_during_training_is_restarted_and_tried_there() -> None:
    world = at_work(COLOCATED)
    enter(world, "TRAIN")
    world.kill()
    assert world.run(60, until=lambda: world.order == "GO")
    assert world.all(RunCanary)


def test_without_a_guard_to_name_the_phase_a_colocated_server_is_never_asked_for_a_token() -> None:
    world = World(FakeServer(name="s"), settings=COLOCATED)
    world.state = replace(world.state, trainer=replace(world.state.trainer, pid=None))
    world.see_trainer = lambda: None  # type: ignore[method-assign]
    world.run(300)
    assert not [what for _, _, what in world.asked if what == "token"]


# ---- asked for a token -----------------------------------------------------------------------------


def test_an_idle_server_is_asked_for_a_token_each_half_minute_and_a_busy_one_never() -> None:
    idle = World(FakeServer(name="s"))
    idle.run(300)
    times = [at for at, _, what in idle.asked if what == "token"]
    assert len(times) >= 8
    assert all(later - earlier >= 30.0 for earlier, later in pairwise(times))
    busy = at_work()
    busy.run(300)
    assert busy.asked == []


@pytest.mark.parametrize("phase", ["TRAIN", "REWARD", "SYNC", "EVAL", "CHECKPOINT", "UNKNOWN"])
def test_no_token_is_asked_for_outside_of_the_rollouts(phase: str) -> None:
    world = World(FakeServer(name="s"), trainer=FakeTrainer(phase=phase))
    world.run(200)
    assert not [what for _, _, what in world.asked if what == "token"]


def test_what_was_asked_before_a_pause_says_nothing_about_the_server_after_it() -> None:
    world = World(FakeServer(name="s"))
    world.fake.paused = True
    world.run(3)
    world.fake.paused = False
    world.run(3)
    for _ in range(4):
        world.feed(GenerationAsked(server="s", answer=Answer.UNAVAILABLE, waited_s=20.0))
    assert world.order == "GO"


def test_an_answer_at_once_is_a_stubs_and_shows_no_life() -> None:
    world = World(FakeServer(name="s"))
    world.run(10)
    shown = world.server().generated_at
    world.feed(GenerationAsked(server="s", answer=Answer.OK, waited_s=0.003))
    assert world.server().generated_at == shown
    world.feed(GenerationAsked(server="s", answer=Answer.OK, waited_s=1.01))
    assert world.server().generated_at == world.now


def test_ready_says_no_after_a_failed_health_check_and_that_is_no_pause() -> None:
    world = World(FakeServer(name="s", waited_for=False))
    world.run(10)
    world.fake.frozen = True
    assert world.run(200, until=lambda: world.server().failed_health == 1)
    world.run(5)
    assert world.server().endpoints.ready is Answer.UNAVAILABLE
    assert world.server().state is ServerState.SERVING
    world.fake.frozen = False
    world.run(60)
    assert (world.order, world.server().state) == ("GO", ServerState.SERVING)
    assert world.server().endpoints.ready is Answer.OK


# ---- the trainer's own requests --------------------------------------------------------------------


def test_a_streak_of_failed_requests_has_every_server_generate_and_no_one_restarted_for_it() -> None:
    world = World("a", "b")
    world.feed(RequestsFailed(attempt=0, in_a_row=8, error="ConnectError"))
    assert (world.order, world.gate.reason) == ("HOLD", "requests_failed")
    assert world.run(10, until=lambda: world.order == "GO")
    assert {canary.server for canary in world.all(RunCanary)} == {"a", "b"}
    assert not world.all(StopServer)


def test_a_streak_is_looked_into_again_when_it_has_doubled_and_not_before() -> None:
    world = World("s")
    for count in (8, 9, 15, 16, 17, 31, 32):
        world.feed(RequestsFailed(attempt=0, in_a_row=count))
        world.run(5)
    assert len(world.all(RunCanary)) == 3
    world.feed(RequestsFailed(attempt=0, in_a_row=0))
    world.feed(RequestsFailed(attempt=0, in_a_row=8))
    assert len(world.all(RunCanary)) == 4


def test_failed_requests_and_failed_probes_are_counted_apart() -> None:
    world = World("s")
    world.fake.listens = False
    world.run(1.0)
    world.feed(RequestsFailed(attempt=0, in_a_row=7))
    assert world.order == "GO"
    assert world.server().failed_probes in {1, 2}
    assert world.state.trainer.failed_requests == 7


def test_requests_of_an_older_attempt_say_nothing() -> None:
    world = World("s", trainer=FakeTrainer(attempt=2))
    world.feed(RequestsFailed(attempt=1, in_a_row=64))
    assert world.order == "GO"


# ---- what is offered -------------------------------------------------------------------------------


def test_an_endpoint_that_was_never_there_is_no_evidence_and_one_that_is_gone_is() -> None:
    none = Answer.NOT_OFFERED
    world = World(FakeServer(name="s", lacks=frozenset({"ready"})))
    world.run(60)
    assert world.order == "GO"
    for _ in range(3):
        world.feed(ServerProbed(server="s", ready=none, model_info=none, metrics=none))
    assert world.order == "HOLD"


def test_a_scheduler_that_nobody_doubts_is_not_condemned_by_a_late_answer() -> None:
    world = at_work()
    world.feed(SchedulerAsked(server="s", info=Answer.TIMEOUT, loads=Answer.OK, waited_s=100.0))
    world.run(5)
    assert world.order == "GO"


# ---- what must not hide a hang ---------------------------------------------------------------------


def test_a_turning_scheduler_excuses_no_waiting_requests_where_ready_would_have_told_of_a_pause() -> None:
    world = at_work(can_generate=False, busy=False)
    world.run(10)
    assert world.asked, "the scheduler was asked, and answered"
    assert (world.order, world.gate.reason) == ("HOLD", "server_hung")


def test_a_lost_round_of_metrics_is_no_token_and_hides_no_hang() -> None:
    world = at_work()
    world.fake.frozen, world.fake.busy = True, False
    began = world.now
    while world.order == "GO" and world.now - began < 60:
        world.feed(ServerProbed(server="s", ready=Answer.OK, model_info=Answer.OK, metrics=Answer.TIMEOUT))
        world.run(2.0)
    assert world.now - began <= 12
    assert world.gate.reason == "server_hung"
