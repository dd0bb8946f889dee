"""What the daemon decides, as promises: each test is one sentence about a night."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from stepguardd.core.breaker import Phase
from stepguardd.core.commands import (
    ContinueServer,
    PrepareRollback,
    PublishGate,
    PushWeights,
    RunCanary,
    StartServer,
    StopServer,
)
from stepguardd.core.decide import decide
from stepguardd.core.events import (
    Answer,
    CheckpointSaved,
    DaemonStarted,
    OrderAcknowledged,
    Proc,
    ProcessExited,
    RewardLogged,
    ServerProbed,
    Tick,
    TrainerExited,
    TreeSeen,
)
from stepguardd.core.reasons import Reason
from stepguardd.core.state import GateOrder, Server, ServerState, Settings, Stage
from stepguardd.testing import BrokenPromise, FakeServer, FakeTrainer, Promises, World

PUSH = Settings(push_weights=True)
RESYNC = Settings()
HURRY = Settings(push_weights=True, locked_out_hold_s=200.0, save_timeout_s=300.0)


def recovered(world: World, within_s: float = 120.0) -> bool:
    return world.run(within_s, until=lambda: world.order == "GO")


# ---- a server dies ---------------------------------------------------------------------------------


def test_a_death_holds_the_run_in_the_very_decision_that_took_it_in() -> None:
    world = World()
    commands = world.kill()
    assert isinstance(commands[0], PublishGate)
    assert commands[0].gate.order is GateOrder.HOLD
    assert commands[0].gate.reason == "server_died"
    assert [type(c) for c in commands[1:2]] == [StopServer]


def test_the_gate_is_written_before_the_server_is_ended_and_ended_before_it_is_started() -> None:
    world = World()
    world.kill()
    assert recovered(world)
    kinds = [type(c).__name__ for _, c in world.said if type(c).__name__ not in {"Notify", "PublishGate"}]
    assert kinds == ["StopServer", "StartServer", "RunCanary", "PushWeights", "CompareWeights"]


def test_a_restarted_server_gets_the_weights_by_a_push() -> None:
    world = World(settings=PUSH)
    world.steps(3)
    world.kill()
    assert recovered(world)
    assert world.all(PushWeights)[-1].version == "v3"
    assert world.fake.version == "v3"
    assert "RESYNC" not in world.orders()


def test_a_restarted_server_gets_the_weights_by_a_resync_of_the_trainer() -> None:
    world = World(settings=RESYNC)
    world.steps(3)
    world.kill()
    assert recovered(world)
    assert world.orders() == ["GO", "HOLD", "RESYNC", "HOLD", "GO"]
    assert world.fake.version == "v3"
    assert not world.all(PushWeights)


def test_a_server_that_comes_back_with_the_trainers_version_needs_nothing() -> None:
    world = World(settings=RESYNC)
    world.fake.base_version = world.trainer.version
    world.kill()
    assert recovered(world)
    assert "RESYNC" not in world.orders()
    assert not world.all(PushWeights)


def test_a_resync_without_a_version_to_look_at_is_believed() -> None:
    world = World(FakeServer(name="s", version=None, base_version=None), settings=RESYNC)
    world.kill()
    assert recovered(world)
    assert "RESYNC" in world.orders()


def test_a_resync_that_left_the_wrong_version_is_not_believed() -> None:
    world = World(settings=RESYNC)
    world.kill()
    world.run(60, until=lambda: world.order == "RESYNC")
    generation = world.gate.generation
    world.trainer.listens = False
    world.feed(OrderAcknowledged(generation=generation, order="RESYNC", ok=True))
    world.run(2)
    assert world.order == "HOLD"
    world.run(10)
    assert world.order == "RESYNC"
    assert world.gate.generation > generation


def test_weights_that_never_change_need_no_proof() -> None:
    trainer = FakeTrainer(version=None, handles_resync=False)
    world = World(settings=Settings(weights_fixed=True), trainer=trainer)
    world.kill()
    assert recovered(world)
    assert world.orders() == ["GO", "HOLD", "GO"]


def test_a_push_that_fails_falls_back_to_the_trainer() -> None:
    world = World(settings=PUSH)
    world.fake.can_load = False
    world.kill()
    assert recovered(world)
    assert len(world.all(PushWeights)) == 1
    assert "RESYNC" in world.orders()
    assert any("could not be pushed" in text for text in world.told("call"))


def test_a_push_that_always_fails_is_tried_at_a_pace_then_in_a_new_process_and_ends_locked_out() -> None:
    world = World(settings=PUSH, trainer=FakeTrainer(handles_resync=False))
    world.fake.can_load = False
    world.kill()
    world.run(150)
    assert 50 < len(world.all(PushWeights)) < 130
    assert world.order == "HOLD"
    assert len(world.all(StartServer)) == 2
    world.run(600)
    assert world.state.phase is Phase.LOCKED_OUT
    assert world.gate.reason == "restart_budget_spent"
    assert len(world.all(StartServer)) == 3


def test_a_server_that_loads_again_after_minutes_needs_no_person() -> None:
    world = World(settings=PUSH, trainer=FakeTrainer(handles_resync=False))
    world.fake.can_load = False
    world.kill()
    world.run(180)
    world.fake.can_load = True
    assert recovered(world)
    assert not world.told("locked_out")


def test_a_resync_that_fails_once_is_asked_for_again() -> None:
    world = World(settings=RESYNC, trainer=FakeTrainer(can_resync=False))
    world.kill()
    world.run(
        60, until=lambda: bool(world.told("action")) and "could not re-sync" in world.told("action")[-1]
    )
    assert world.order == "HOLD"
    world.trainer.can_resync = True
    assert recovered(world)
    assert not world.told("locked_out")


@pytest.mark.parametrize("broken", ["can_start", "can_stop", "can_load"])
def test_a_server_with_which_nothing_helps_is_left_out_where_the_others_suffice(broken: str) -> None:
    """Its GPU is gone, say: seven good ones do not wait for a person all night."""
    world = World("a", "b", settings=PUSH, trainer=FakeTrainer(can_resync=False))
    setattr(world.servers["a"], broken, False)
    world.kill("a")
    world.run(900)
    assert any("the others go on without it" in text for text in world.told("call"))
    assert world.state.phase is Phase.CLOSED
    assert world.step()
    setattr(world.servers["a"], broken, True)
    world.ask("restart-server", server="a")
    world.trainer.can_resync = True
    world.run(120, until=lambda: world.server("a").state is ServerState.SERVING)
    assert world.server("a").state is ServerState.SERVING


def test_a_server_left_out_for_its_weights_serves_again_once_the_trainer_has_pushed_them() -> None:
    world = World("a", "b", settings=RESYNC, trainer=FakeTrainer(can_resync=False))
    world.kill("a")
    world.run(120, until=lambda: bool(world.told("call")))
    assert world.server("a").state is ServerState.STALE
    assert world.step()  # and with it new weights on every server
    world.run(10)
    assert world.server("a").state is ServerState.SERVING


def test_a_server_left_out_is_tried_again_once_its_budget_is_whole() -> None:
    """Whatever it was may be over by then; nobody has to come for it."""
    world = World("a", "b", settings=PUSH)
    world.servers["a"].can_start = False
    world.kill("a")
    world.run(300)
    stops = len(world.all(StopServer))
    assert world.server("a").state is ServerState.DEAD
    assert stops == PUSH.restart_budget
    world.servers["a"].can_start = True
    world.run(2 * PUSH.restart_window_s, until=lambda: world.server("a").state is ServerState.SERVING)
    assert world.server("a").state is ServerState.SERVING
    assert len(world.all(StopServer)) == stops + 1


def test_what_a_person_asked_for_rests_on_their_word_and_on_no_evidence() -> None:
    world = World()
    world.fake.frozen = True
    world.run(3)
    world.ask("restart-server", server=world.fake.name)
    assert world.state.incident is not None
    assert world.state.incident.evidence == ("asked for by ada: a test",)


def test_the_last_server_of_a_quorum_locks_the_run_out() -> None:
    world = World("a", "b", settings=PUSH, trainer=FakeTrainer(can_resync=False))
    for name in ("a", "b"):
        world.servers[name].can_start = False
        world.kill(name)
        world.run(300)
    assert world.state.phase is Phase.LOCKED_OUT


def test_weights_pushed_while_the_trainer_went_on_are_pushed_again() -> None:
    """Two servers, one restarted: the run goes on, so the version that was pushed may be old on arrival."""
    world = World("a", "b", settings=PUSH)
    world.steps(2)
    world.servers["a"].push_s = 2.5
    world.kill("a")
    world.run(60, until=lambda: bool(world.all(PushWeights)))
    assert world.order == "GO"
    assert world.step()
    world.servers["a"].version = "v2"
    world.run(60, until=lambda: world.server("a").state is ServerState.SERVING)
    assert [push.version for push in world.all(PushWeights)][-1] == world.trainer.version
    assert world.servers["a"].version == world.trainer.version


def test_a_resync_that_the_trainer_cannot_do_locks_the_run_out() -> None:
    world = World(settings=RESYNC, trainer=FakeTrainer(can_resync=False))
    world.kill()
    world.run(60)
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "resync_failed")


def test_a_trainer_in_a_long_step_is_not_locked_out_for_a_resync_that_it_cannot_hear_yet() -> None:
    world = World(settings=RESYNC)
    world.trainer.listens, world.trainer.phase = False, "TRAIN"
    world.kill()
    world.run(600)
    assert world.order == "RESYNC"
    assert sum("asks for no order" in text for text in world.told("call")) == 1
    world.trainer.listens, world.trainer.phase = True, "ROLLOUT"
    assert recovered(world)


def test_a_trainer_that_stands_at_the_gate_and_does_not_resync_locks_the_run_out() -> None:
    world = World(settings=RESYNC)
    world.trainer.listens, world.trainer.phase = False, "HELD"
    world.kill()
    world.run(200)
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "weights_unproven")


def test_a_server_may_start_before_the_trainer_has_named_any_version() -> None:
    """The first start of all: nobody holds other weights yet, so nothing is there to prove."""
    trainer = FakeTrainer(version=None, handles_resync=False)
    world = World(running=False, trainer=trainer, settings=RESYNC)
    assert world.order == "HOLD"
    assert recovered(world)
    assert world.fake.starts == ["1-start"]
    assert world.server().restarts == 0
    assert world.state.incidents == 0


def test_until_a_restarted_server_has_proven_itself_the_gate_is_held() -> None:
    """At every moment of the recovery: GO only with a server that generates the trainer's version."""
    world = World(settings=PUSH)
    world.steps(2)
    world.fake.load_s, world.fake.canary_s, world.fake.push_s = 20.0, 5.0, 5.0
    world.kill()
    while world.order != "GO":
        assert not (world.fake.generates(world.now) and world.fake.version == "v2") or world.now < 2000
        world.run(0.25)
        assert world.now < 2000
    assert world.fake.generates(world.now)
    assert world.fake.version == "v2"


def test_a_helper_that_ends_is_no_death_and_the_root_always_is() -> None:
    """A compiler or a tracker comes and goes; killing for that would be a false kill."""
    world = World()
    helper = Proc(pid=5, start_ticks=5, role="child")
    root = Proc(pid=4, start_ticks=4, role="child")
    world.fake.procs = (*world.fake.procs, helper)
    world.feed(TreeSeen(server="s", procs=world.fake.procs))
    world.fake.procs = world.fake.procs[:-1]
    world.feed(ProcessExited(server="s", proc=helper))
    world.feed(TreeSeen(server="s", procs=world.fake.procs))
    assert world.order == "GO"
    assert helper not in world.server().procs

    other = World(running=False)
    other.feed(TreeSeen(server="s", procs=(root, helper)))
    other.feed(ProcessExited(server="s", proc=root))
    assert other.order == "HOLD"


def test_a_vital_process_missing_from_the_tree_is_a_death_that_nobody_saw() -> None:
    world = World()
    world.feed(TreeSeen(server="s", procs=world.fake.procs[:1]))
    assert world.order == "HOLD"
    assert len(world.all(StopServer)) == 1


def test_what_remains_of_a_dead_servers_tree_is_not_its_return() -> None:
    world = World(mode="hold")
    world.kill()
    world.feed(TreeSeen(server="s", procs=world.fake.procs))
    world.run(30)
    assert world.server().state is ServerState.DEAD
    assert world.order == "HOLD"


def test_a_server_brought_back_by_somebody_else_is_proven_before_it_serves() -> None:
    world = World(FakeServer(name="s", managed=False), settings=RESYNC)
    world.steps(2)
    world.kill(role="server")
    world.fake.procs = ()
    world.feed(TreeSeen(server="s", procs=()))
    assert world.order == "HOLD"
    assert not world.all(StopServer)
    world.fake.spawn(world.now)
    assert recovered(world)
    assert world.all(RunCanary)
    assert world.fake.version == "v2"
    assert "RESYNC" in world.orders()


def test_another_server_in_the_old_ones_place_is_proven_even_if_nobody_saw_the_old_one_end() -> None:
    world = World(FakeServer(name="s", managed=False), settings=RESYNC)
    world.steps(2)
    world.fake.spawn(world.now)
    world.feed(TreeSeen(server="s", procs=world.fake.procs))
    assert world.order == "HOLD"
    assert recovered(world)
    assert world.fake.version == "v2"


def test_a_server_that_is_loading_when_the_daemon_comes_gets_its_start_timeout() -> None:
    """Its port is closed for minutes: a cold start, and no reason to kill."""
    fake = FakeServer(name="s", load_s=300.0)
    world = World(fake, running=False, settings=replace(PUSH, start_timeout_s=400.0))
    world.run(1)
    assert fake.starts == ["1-start"]
    fresh = World(running=False, settings=replace(PUSH, start_timeout_s=400.0))
    fresh.servers["s"] = fake
    fresh.said.clear()
    fresh.state = replace(
        fresh.state, servers=(Server(name="s", managed=True, since=fresh.now),), gate=fresh.state.gate
    )
    fresh.feed(TreeSeen(server="s", procs=fake.procs))
    assert recovered(fresh, 400)
    assert fake.starts == ["1-start"]
    assert not fresh.all(StopServer)


def test_a_start_that_fails_is_tried_again_with_growing_waits_until_the_budget_is_spent() -> None:
    settings = replace(PUSH, backoff_jitter=0.0, backoff_first_s=10.0)
    world = World(settings=settings)
    world.fake.can_start = False
    world.kill()
    world.run(300)
    starts = [at for at, command in world.said if isinstance(command, StartServer)]
    gaps = [round(b - a) for a, b in pairwise(starts)]
    assert len(starts) == settings.restart_budget
    assert [10 <= gap <= 12 for gap in gaps[:1]] == [True]
    assert gaps[1] >= 2 * 10
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "restart_budget_spent")


def test_the_budget_holds_over_a_restart_of_the_daemon() -> None:
    world = World()
    world.fake.can_start = False
    world.kill()
    for _ in range(10):
        world.run(20)
        world.restart_daemon()
    assert len(world.all(StopServer)) == 3
    assert world.state.phase is Phase.LOCKED_OUT


def test_what_left_the_window_may_be_spent_again() -> None:
    world = World(settings=replace(PUSH, restart_window_s=900.0))
    for _ in range(6):
        world.kill()
        assert recovered(world, 700)
        world.run(500)
    assert world.state.phase is not Phase.LOCKED_OUT
    assert world.server().restarts == 6


def test_a_server_that_never_came_up_does_not_serve_because_a_person_resumed() -> None:
    world = World(settings=replace(PUSH, restart_budget=1, start_timeout_s=30.0))
    world.fake.load_s = 10_000.0
    world.kill()
    world.run(60)
    assert world.state.phase is Phase.LOCKED_OUT
    world.ask("resume")
    assert world.order == "HOLD"
    world.run(10)
    assert world.order == "HOLD"


def test_after_a_lockout_a_person_who_resumes_gets_another_restart() -> None:
    world = World(settings=replace(PUSH, restart_budget=1))
    world.fake.can_start = False
    world.kill()
    world.run(30)
    assert world.state.phase is Phase.LOCKED_OUT
    world.fake.can_start = True
    world.ask("resume")
    assert recovered(world)


def test_a_server_that_will_not_end_calls_a_person() -> None:
    world = World()
    world.fake.can_stop = False
    world.kill()
    world.run(5)
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "stop_failed")
    assert any("would not end" in text for text in world.told("call"))


def test_a_server_that_answers_and_does_not_generate_is_restarted_again() -> None:
    world = World()
    world.fake.can_generate = False
    world.kill()
    world.run(70)
    canaries = len(world.all(RunCanary))
    assert len(world.all(StopServer)) >= 2
    assert canaries < 80  # at a pace, not at every tick
    assert world.order == "HOLD"


# ---- a server stops, hangs, spins ------------------------------------------------------------------


def test_a_stopped_server_is_woken_first_and_not_restarted_where_that_helps() -> None:
    world = World()
    world.fake.stopped = True
    world.run(2.5)
    assert len(world.all(ContinueServer)) == 1
    assert recovered(world)
    assert not world.all(StopServer)
    assert world.all(RunCanary)


def test_a_stopped_server_holds_the_run_within_two_samples() -> None:
    world = World()
    at = world.now
    world.fake.stopped = True
    world.run(10, until=lambda: world.order == "HOLD")
    assert world.now - at <= 1.25


def test_a_stopped_server_that_does_not_wake_is_restarted_only_after_kill_after_s() -> None:
    world = World()
    world.fake.stopped, world.fake.cont_helps = True, False
    world.run(10, until=lambda: world.order == "HOLD")
    held_at = world.now
    world.run(200, until=lambda: bool(world.all(StopServer)))
    assert 60 <= world.now - held_at <= 62
    assert recovered(world)


def test_a_process_stopped_for_one_sample_is_nobodys_business() -> None:
    """A debugger that looks at a stack."""
    world = World()
    world.fake.stopped = True
    world._sample()
    world.fake.stopped = False
    world.run(5)
    assert world.orders() == ["GO"]


def test_no_token_and_no_cpu_is_a_deadlock_within_ten_seconds() -> None:
    world = World()
    world.fake.frozen, world.fake.busy = True, False
    at = world.now
    world.run(60, until=lambda: world.order == "HOLD")
    assert 8 <= world.now - at <= 10
    assert world.gate.reason == "server_hung"


def test_a_parent_that_answers_probes_does_not_hide_a_deadlock() -> None:
    world = World()
    world.fake.frozen, world.fake.busy = True, False
    at = world.now
    while world.order == "GO" and world.now - at < 60:
        world.fake.cpu_s += 0.01 * 0.25  # a hundredth of a core
        world.run(0.25)
    assert world.now - at <= 10
    assert world.gate.reason == "server_hung"


def test_no_token_with_a_busy_cpu_may_be_a_long_prefill_and_takes_longer() -> None:
    world = World()
    world.fake.frozen = True
    at = world.now
    world.run(100, until=lambda: world.order == "HOLD")
    assert 40 <= world.now - at <= 45
    assert world.gate.reason == "server_spinning"


def test_a_hang_that_ends_by_itself_is_proven_and_costs_no_restart() -> None:
    world = World()
    world.fake.frozen, world.fake.busy = True, False
    world.run(30, until=lambda: world.order == "HOLD")
    world.fake.frozen = False
    assert recovered(world)
    assert not world.all(StopServer)
    assert world.all(RunCanary)


def test_a_hang_that_lasts_is_ended_after_kill_after_s() -> None:
    world = World()
    world.fake.frozen, world.fake.busy = True, False
    world.run(30, until=lambda: world.order == "HOLD")
    held_at = world.now
    world.run(300, until=lambda: bool(world.all(StopServer)))
    assert world.now - held_at >= 60
    assert recovered(world)


def test_three_failed_probes_hold_and_an_answer_lets_go_without_a_restart() -> None:
    world = World()
    world.fake.listens = False
    world.run(2)
    assert world.order == "GO"
    world.run(3)
    assert (world.order, world.gate.reason) == ("HOLD", "server_unreachable")
    world.fake.listens = True
    assert recovered(world)
    assert not world.all(StopServer)


def test_a_paused_server_is_neither_held_for_nor_killed_before_its_lease_ends() -> None:
    world = World(settings=replace(PUSH, planned_lease_s=600.0))
    world.fake.paused, world.fake.running, world.fake.busy = True, 8, False
    world.run(590)
    assert world.server().state is ServerState.PLANNED
    assert world.orders() == ["GO"]
    world.run(20)
    assert (world.order, world.gate.reason) == ("HOLD", "paused_too_long")
    assert not world.all(StopServer)
    world.run(200, until=lambda: bool(world.all(StopServer)))
    assert recovered(world)


def test_a_planned_server_that_answers_late_is_excused_and_one_that_is_gone_is_not() -> None:
    world = World()
    world.fake.paused = True
    world.run(3)
    for _ in range(10):
        world.feed(ServerProbed(server="s", ready=Answer.TIMEOUT, model_info=Answer.TIMEOUT))
    assert world.order == "GO"
    for _ in range(3):
        world.feed(ServerProbed(server="s", ready=Answer.REFUSED, model_info=Answer.REFUSED))
    assert world.order == "HOLD"


def test_a_paused_server_that_goes_on_is_serving_again() -> None:
    world = World()
    world.fake.paused = True
    world.run(30)
    world.fake.paused = False
    world.run(3)
    assert world.server().state is ServerState.SERVING
    assert world.orders() == ["GO"]


# ---- wrong weights ---------------------------------------------------------------------------------


def test_a_server_with_other_weights_is_re_synced_and_not_restarted() -> None:
    world = World(settings=RESYNC)
    world.steps(5)
    world.fake.version = "base"
    assert world.run(10, until=lambda: world.order != "GO")
    assert recovered(world)
    assert world.fake.version == "v5"
    assert not world.all(StopServer)
    assert world.state.incident is not None
    assert world.state.incident.resyncs == 1


def test_a_version_that_differs_for_the_moment_of_an_update_is_no_stale_server() -> None:
    world = World(settings=RESYNC)
    for number in range(20):
        world.trainer.version = f"u{number}"
        world.see_trainer()
        world.run(1.0)
        world.fake.version = f"u{number}"
        world.run(1.0)
    assert world.orders() == ["GO"]


def test_outside_of_rollouts_a_version_is_not_compared() -> None:
    world = World(settings=RESYNC)
    world.trainer.phase = "SYNC"
    world.see_trainer()
    world.fake.version = "base"
    world.run(30)
    assert world.orders() == ["GO"]


def test_a_batch_with_stale_rollouts_names_the_servers_at_once() -> None:
    world = World(settings=RESYNC)
    world.steps(2)
    world.fake.version = "base"
    assert not world.batch(failed=40, refused="stale_weights")
    assert world.order != "GO"
    assert recovered(world)
    assert world.fake.version == "v2"


def test_a_stale_batch_in_mode_hold_with_a_dead_server_is_only_refused() -> None:
    world = World(mode="hold")
    world.kill()
    assert not world.batch(failed=64, refused="stale_weights")
    assert world.server().state is ServerState.DEAD


# ---- batches ---------------------------------------------------------------------------------------


def test_a_batch_that_overlapped_an_outage_is_refused_whatever_its_reward() -> None:
    world = World()
    began = world.now
    world.kill()
    assert recovered(world)
    assert not world.batch(0.99, began=began)
    assert world.gate.reason == "outage"
    assert world.batch(began=world.now)


def test_a_batch_asked_for_during_an_outage_is_refused() -> None:
    world = World()
    world.kill()
    assert not world.batch()


def test_a_batch_of_zeros_after_a_healthy_baseline_is_refused_on_that_very_batch() -> None:
    world = World()
    world.steps(30)
    assert not world.batch(0.0)
    assert world.gate.reason == "reward_collapse"
    assert world.order == "HOLD"


def test_a_reward_that_is_no_number_is_refused() -> None:
    world = World()
    world.steps(30)
    assert not world.batch(math.nan)
    assert world.order == "HOLD"


def test_a_collapse_with_every_server_well_is_the_policys_and_waits_for_a_person() -> None:
    world = World()
    world.steps(30)
    assert not world.batch(0.0)
    assert len(world.all(RunCanary)) == 1
    world.run(600)
    assert world.order == "HOLD"
    assert not world.all(StopServer)
    assert sum("the policy or the reward function" in text for text in world.told("call")) == 1
    world.ask("resume")
    assert world.order == "GO"


def test_a_collapse_that_a_repair_explains_is_let_go_by_that_repair() -> None:
    world = World()
    world.steps(30)
    world.fake.can_generate = False
    assert not world.batch(0.0)
    world.run(80, until=lambda: bool(world.all(StopServer)))
    world.fake.can_generate = True
    assert recovered(world)
    assert not any("the policy" in text for text in world.told("call"))


def test_three_refused_batches_in_a_row_hold_until_every_server_has_generated() -> None:
    world = World()
    world.steps(10)
    for _ in range(2):
        assert not world.batch(failed=30, refused="failed_fraction")
        assert world.order == "GO"
    assert not world.batch(failed=30, refused="failed_fraction")
    assert (world.order, len(world.all(RunCanary))) == ("HOLD", 1)
    assert recovered(world)


def test_refused_batches_that_go_on_end_locked_out() -> None:
    world = World()
    for _ in range(4):
        for _ in range(3):
            world.batch(failed=30, refused="failed_fraction")
        world.run(5)
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "rollouts_failed")


def test_a_good_batch_ends_the_count_of_refused_ones() -> None:
    world = World()
    for _ in range(10):
        world.batch(failed=30, refused="failed_fraction")
        world.batch(failed=30, refused="failed_fraction")
        assert world.batch()
    assert world.orders() == ["GO"]


def test_a_batch_is_judged_once_and_told_again_when_asked_again() -> None:
    world = World()
    assert world.batch()
    before = world.state
    world.trainer.batch -= 1
    assert world.batch(0.0, failed=64)
    assert world.state == before


def test_a_batch_of_an_older_attempt_is_void() -> None:
    world = World()
    world.trainer.attempt = 2
    world.see_trainer()
    assert not world.batch(attempt=1)
    assert world.gate.reason == "old_attempt"


# ---- rollback --------------------------------------------------------------------------------------


def poisoned(world: World) -> None:
    """Some zeros get through before they are seen, and come from a server that lost its weights."""
    world.steps(30)
    world.fake.version = "base"
    world.run(1.5)
    first_bad = world.trainer.step - 5
    world.trainer.step = first_bad
    assert not world.batch(0.0)


def test_garbage_that_was_committed_is_rolled_back_before_the_run_goes_on() -> None:
    world = World(target=(20, "/checkpoints/20"))
    poisoned(world)
    world.run(60, until=lambda: world.order == "ROLLBACK")
    assert len(world.all(PrepareRollback)) == 1
    assert (world.gate.target_step, world.gate.target_path) == (20, "/checkpoints/20")
    assert recovered(world)
    assert world.orders()[-3:].index("GO") == 2
    assert world.trainer.attempt == 1
    assert world.fake.version == world.trainer.version
    assert world.state.incident is not None
    assert world.state.incident.rollbacks == 1


def test_without_a_checkpoint_to_go_back_to_a_person_is_called() -> None:
    world = World(target=None)
    poisoned(world)
    world.run(5)
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "no_checkpoint")


def test_a_rollback_that_a_standing_trainer_does_not_do_locks_the_run_out() -> None:
    world = World(target=(20, "/c"))
    poisoned(world)
    world.trainer.listens, world.trainer.phase = False, "HELD"
    world.run(700)
    assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "rollback_failed")


def test_a_relapse_on_probation_rolls_back() -> None:
    world = World(target=(20, "/c"))
    world.steps(30)
    world.kill()
    assert recovered(world)
    assert world.state.phase is Phase.HALF_OPEN
    assert not world.batch(0.0)
    world.run(10)
    assert world.all(PrepareRollback)


def test_probation_ends_after_its_steps_and_with_it_the_incident() -> None:
    world = World()
    world.steps(5)
    world.kill()
    assert recovered(world)
    world.steps(2)
    assert world.state.phase is Phase.HALF_OPEN
    world.steps(1)
    assert world.state.phase is Phase.CLOSED
    assert world.state.incident is None
    assert world.state.last_incident is not None
    assert world.told("resolved")


def test_a_rollback_that_the_page_orders_already_is_not_ordered_twice() -> None:
    """The daemon died between the page and its row: the next one waits for the answer to that order."""
    world = World()
    world.steps(30)
    world.ask("rollback", before_step=20)
    before = world.state
    assert before.rollback is not None
    assert before.rollback.generation is None
    assert world.run(60, until=lambda: world.order == "ROLLBACK")
    ordered = world.gate
    world.restart_daemon(lost=before)
    assert (world.order, world.gate.generation) == ("ROLLBACK", ordered.generation)
    assert world.gate.target_step == ordered.target_step
    assert world.run(120, until=lambda: world.order == "GO")
    assert world.orders().count("ROLLBACK") == 1
    assert world.trainer.attempt == 1


def test_a_trainer_that_ends_takes_its_rollback_with_it() -> None:
    world = World(target=(20, "/c"))
    world.trainer.listens = False
    world.ask("rollback", before_step=10)
    world.target = (5, "/c")
    world.ask("rollback", before_step=10)
    world.run(2)
    world.feed(TrainerExited(pid=world.trainer.pid, code=-9))
    assert world.state.rollback is None


# ---- nobody comes ----------------------------------------------------------------------------------


def locked_out(world: World) -> float:
    world.fake.can_stop = False
    world.kill()
    world.run(2)
    assert world.state.phase is Phase.LOCKED_OUT
    return world.now


def test_after_locked_out_hold_s_the_trainer_saves_and_then_stops() -> None:
    world = World(settings=HURRY)
    locked_out(world)
    world.run(190)
    assert world.order == "HOLD"
    world.run(20)
    assert world.orders()[-3:] == ["HOLD", "SAVE", "STOP"]
    assert world.trainer.stopped


def test_a_trainer_that_cannot_save_is_stopped_at_once() -> None:
    world = World(settings=HURRY, trainer=FakeTrainer(handles_save=False))
    locked_out(world)
    world.run(250)
    assert world.orders()[-2:] == ["HOLD", "STOP"]


def test_a_save_that_failed_or_takes_too_long_does_not_keep_the_gpus_burning() -> None:
    failing = World(settings=HURRY, trainer=FakeTrainer(can_save=False))
    locked_out(failing)
    failing.run(250)
    assert failing.orders()[-2:] == ["SAVE", "STOP"]
    assert any("could not save" in text for text in failing.told("action"))

    silent = World(settings=HURRY)
    silent.trainer.listens = False
    locked_out(silent)
    silent.run(250)
    assert silent.order == "SAVE"
    silent.run(300)
    assert silent.order == "STOP"


def test_an_old_acknowledgement_does_not_count_as_saved() -> None:
    world = World(settings=HURRY)
    world.trainer.listens = False
    locked_out(world)
    world.run(250)
    world.feed(OrderAcknowledged(generation=world.gate.generation - 1, order="SAVE", ok=True))
    assert world.order == "SAVE"


def test_a_person_who_resumes_in_time_stops_the_clock() -> None:
    world = World(settings=HURRY)
    locked_out(world)
    world.run(100)
    world.fake.can_stop = True
    world.ask("resume")
    assert recovered(world)
    world.run(400)
    assert "STOP" not in world.orders()
    assert "SAVE" not in world.orders()


# ---- modes -----------------------------------------------------------------------------------------


def test_mode_shadow_neither_holds_nor_acts_and_tells_what_it_would() -> None:
    world = World(mode="shadow")
    world.steps(30)
    assert world.batch(0.0)
    world.kill()
    world.run(300)
    assert world.orders() == ["GO"]
    assert world.told("would") == [
        "would refuse the batch of step 31 in mode hold",
        "would hold the trainer in mode hold",
        "would restart s in mode act",
    ]
    assert not world.all(StopServer) + world.all(PushWeights) + world.all(ContinueServer)


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({"stopped": True}, ["s is stopped: would send SIGCONT in mode act", "would restart s in mode act"]),
        ({"frozen": True, "busy": False}, ["would restart s in mode act"]),
        ({"version": "base"}, ["would load version v2 into s in mode hold"]),
    ],
)
def test_mode_shadow_tells_each_thing_that_it_would_do_once(
    trouble: dict[str, object], said: list[str]
) -> None:
    world = World(mode="shadow", settings=replace(PUSH, max_staleness=9))
    world.steps(2)
    for name, value in trouble.items():
        setattr(world.fake, name, value)
    world.run(600)
    assert world.orders() == ["GO"]
    assert sorted(world.told("would")) == sorted(["would hold the trainer in mode hold", *said])


def test_mode_hold_holds_and_never_restarts_or_rolls_back() -> None:
    world = World(mode="hold", target=(20, "/c"))
    poisoned(world)
    world.run(10)
    world.kill()
    world.run(600)
    assert world.order == "HOLD"
    assert not world.all(StopServer) + world.all(PrepareRollback)
    assert any("would roll back" in text for text in world.told("would"))


def test_in_mode_hold_a_stopped_server_is_not_woken_but_seen_to_wake() -> None:
    world = World(mode="hold")
    world.fake.stopped = True
    world.run(30)
    assert world.order == "HOLD"
    assert not world.all(ContinueServer)
    world.fake.stopped = False
    assert recovered(world)


def test_a_mode_set_to_act_restarts_what_is_dead() -> None:
    world = World(mode="hold")
    world.kill()
    world.run(60)
    world.ask("mode", mode="act")
    assert recovered(world)


def test_a_mode_set_to_shadow_lets_go_and_one_set_back_holds_again() -> None:
    world = World(mode="hold")
    world.kill()
    world.ask("mode", mode="shadow")
    assert world.order == "GO"
    world.ask("mode", mode="hold")
    assert world.order == "HOLD"


def test_a_mode_that_does_not_exist_changes_nothing() -> None:
    world = World()
    for mode in ("", "ACT", "\ud800", None):
        world.ask("mode", mode=mode)
    assert world.state.mode.value == "act"


# ---- people ----------------------------------------------------------------------------------------


def test_a_person_pauses_and_resumes() -> None:
    world = World()
    world.ask("pause")
    assert (world.order, world.gate.reason) == ("HOLD", "operator_pause")
    world.run(900)
    assert world.order == "HOLD"
    world.ask("resume")
    assert world.order == "GO"


def test_a_pause_is_no_incident_and_is_told_again_when_it_lasts() -> None:
    """Whoever paused knows; nobody else is called. A pause that was forgotten burns GPUs."""
    world = World()
    world.ask("pause")
    assert (world.state.incident, world.state.incidents) == (None, 0)
    for _ in range(9):
        world.now += 3599
        world.run(1)
    assert world.told("person")[1:] == [
        "still paused after 4 h, by ada: a test",
        "still paused after 8 h, by ada: a test",
    ]
    world.ask("resume")
    assert world.order == "GO"
    assert world.told("opened") == []


@pytest.mark.parametrize("mode", ["hold", "act"])
def test_trouble_under_a_pause_is_an_incident_once_only_it_holds_the_run(mode: str) -> None:
    world = World(mode=mode)
    world.steps(3)
    world.ask("pause")
    world.kill()
    assert world.told("opened") == []
    world.ask("resume")
    assert world.order == "HOLD"
    assert world.state.incident is not None
    assert world.state.incident.server == "s"
    assert len(world.told("opened")) == 1


def test_a_pause_outlives_a_restart_of_the_daemon() -> None:
    world = World()
    world.ask("pause")
    world.restart_daemon()
    world.run(60)
    assert (world.order, world.gate.reason) == ("HOLD", "operator_pause")


def test_a_server_that_dies_under_a_pause_is_repaired_and_the_pause_stays() -> None:
    world = World()
    world.ask("pause")
    world.kill()
    world.run(60)
    assert world.server().state is ServerState.SERVING
    assert world.order == "HOLD"


def test_a_person_may_restart_a_server_in_any_mode_and_beyond_the_budget() -> None:
    for mode in ("shadow", "hold", "act"):
        world = World(mode=mode)
        for _ in range(5):
            world.ask("restart-server", server="s")
            world.run(60, until=lambda world=world: world.server().state is ServerState.SERVING)
        assert len(world.fake.starts) == 6, mode


def test_a_persons_rollback_is_done_in_mode_hold_too() -> None:
    world = World(mode="hold", target=(3, "/c/3"))
    world.steps(6)
    world.ask("rollback", before_step=5)
    assert recovered(world)
    assert world.trainer.attempt == 1
    assert world.trainer.step == 3


def test_a_persons_rollback_in_mode_shadow_is_answered_and_leaves_nothing_waiting() -> None:
    world = World(mode="shadow")
    world.ask("rollback", before_step=5)
    assert world.state.rollback is None
    assert any("mode shadow" in text for text in world.told("call"))


def test_a_rollback_that_the_trainer_was_told_of_survives_a_resume() -> None:
    """Else the trainer goes back, and the servers are never told."""
    world = World(settings=RESYNC, target=(3, "/c/3"))
    world.steps(6)
    world.trainer.listens = False
    world.ask("rollback", before_step=5)
    world.run(5)
    world.ask("resume")
    assert world.order == "ROLLBACK"
    world.trainer.listens = True
    assert recovered(world)
    assert world.fake.version == world.trainer.version


def test_a_persons_rollback_without_a_step_goes_before_the_incident() -> None:
    world = World(target=(20, "/c"))
    world.steps(30)
    world.batch(0.0)
    world.run(5)
    world.ask("rollback")
    assert world.all(PrepareRollback)[-1].before_step == 31


def test_an_unknown_request_is_told_and_changes_nothing() -> None:
    world = World()
    world.ask("dance")
    assert world.orders() == ["GO"]
    assert any("dance" in text for text in world.told("person"))


# ---- several servers -------------------------------------------------------------------------------


def test_one_dead_server_of_two_is_fenced_off_and_the_run_goes_on() -> None:
    world = World("a", "b")
    world.steps(3)
    world.kill("a")
    assert world.order == "GO"
    assert world.step()
    assert world.run(60, until=lambda: world.server("a").state is ServerState.SERVING)
    assert world.orders() == ["GO"]
    assert len(world.servers["a"].starts) == 2
    assert len(world.servers["b"].starts) == 1


def test_both_of_two_dead_hold_and_the_first_one_back_lets_go() -> None:
    world = World("a", "b")
    world.servers["b"].load_s = 100.0
    world.kill("a")
    world.kill("b")
    assert world.order == "HOLD"
    assert recovered(world, 60)
    assert world.server("b").state is not ServerState.SERVING


def test_two_servers_share_one_resync() -> None:
    world = World("a", "b", settings=RESYNC)
    world.steps(2)
    world.kill("a")
    world.kill("b")
    assert recovered(world)
    world.run(10)
    assert {fake.version for fake in world.servers.values()} == {"v2"}


# ---- the daemon's own death ------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 3.5, 4.0])
def test_a_daemon_killed_in_the_midst_of_a_recovery_ends_it_with_one_start(after_s: float) -> None:
    world = World(settings=PUSH)
    world.steps(2)
    world.kill()
    world.run(after_s)
    world.restart_daemon()
    assert recovered(world)
    assert len(world.fake.starts) == 2
    assert world.server().restarts == 1
    assert world.fake.version == "v2"


def test_a_hold_that_the_journal_cannot_explain_is_kept_until_every_server_has_generated() -> None:
    """The page says HOLD, the row that says why was lost: the scheduler is dead, the parent still answers."""
    world = World()
    healthy = world.state
    world.fake.can_generate = False
    world.kill()
    world.fake.procs = (world.fake.procs[0],)
    world.fake.starts[:] = world.fake.starts[:1]
    generation = world.gate.generation
    world._due.clear()
    world.state = replace(healthy, servers=(replace(healthy.servers[0], procs=world.fake.procs),))
    world.promises = Promises()
    world.state = replace(world.state, gate=replace(world.state.gate))
    commands = world.feed(DaemonStarted(gate_order="HOLD", gate_generation=generation))
    assert commands[0].gate.order is GateOrder.HOLD  # type: ignore[union-attr]
    assert world.gate.generation > generation
    world.run(30)
    assert world.order == "HOLD"
    world.fake.can_generate = True
    assert recovered(world)
    assert world.state.incidents == 0


def test_an_unexplained_hold_with_nothing_known_waits_for_every_servers_first_token() -> None:
    world = World(FakeServer(name="far", managed=False, version=None), running=False)
    world.feed(DaemonStarted(gate_order="HOLD", gate_generation=9, judged_batch=4))
    world.run(2)
    assert (world.order, world.gate.reason) == ("HOLD", "reconciling")
    world.fake.spawn(world.now)
    assert recovered(world)
    assert world.all(RunCanary)
    assert world.gate.judged_batch == 4


def test_a_server_that_runs_under_an_unexplained_hold_generates_before_the_hold_ends() -> None:
    """The journal is gone, the page says HOLD, the server answers: that proves no weights and no life."""
    world = World(FakeServer(name="s", managed=False, can_generate=False), running=False)
    world.fake.spawn(world.now - 60)
    world.fake.version = world.trainer.version
    world.feed(DaemonStarted(gate_order="HOLD", gate_generation=9))
    world.feed(TreeSeen(server="s", procs=world.fake.procs))
    world.run(20)
    assert (world.order, world.gate.reason) == ("HOLD", "reconciling")
    world.fake.can_generate = True
    assert recovered(world)


def test_generations_and_judged_batches_never_go_back_over_restarts() -> None:
    world = World()
    world.steps(3)
    early = world.state
    world.steps(3)
    world.ask("pause")
    world.restart_daemon(lost=early)
    assert world.order == "HOLD"
    assert world.gate.judged_batch == 6


def test_a_hold_that_the_journal_does_explain_ends_as_the_journal_says() -> None:
    world = World()
    world.kill()
    world.run(1)
    world.restart_daemon()
    assert not world.state.reconciling
    assert recovered(world)


# ---- the rest --------------------------------------------------------------------------------------


def test_a_logged_stream_judges_only_a_run_whose_trainer_does_not_report() -> None:
    world = World()
    world.steps(20)
    for step in range(30):
        world.feed(RewardLogged(step=step, reward=0.0))
    assert world.orders() == ["GO"]


def test_checkpoints_that_were_reported_are_remembered_newest_last() -> None:
    world = World()
    for step in range(100):
        world.feed(CheckpointSaved(attempt=0, step=step, path=f"/c/{step}"))
    assert [saved.step for saved in world.state.checkpoints] == list(range(36, 100))


def test_the_same_inputs_give_the_same_outputs() -> None:
    """Two runs of one story, and each decision asked twice."""

    def story() -> World:
        world = World("a", "b", settings=RESYNC)
        world.steps(5)
        world.kill("a")
        world.kill("b")
        world.run(30)
        world.batch(0.0)
        world.run(30)
        return world

    one, two = story(), story()
    assert one.said == two.said
    assert one.state == two.state
    assert decide(one.state, Tick(), one.now + 5) == decide(one.state, Tick(), one.now + 5)


def test_an_outcome_that_nobody_waits_for_changes_nothing() -> None:
    world = World()
    before = world.state
    world._end("99-start", True, procs=(Proc(pid=1, start_ticks=1, role="server"),))
    assert world.state == before


def test_the_outcome_of_an_effect_that_was_overtaken_is_not_taken_for_a_newer_ones() -> None:
    """A canary under way when the server died ends during the stop, and says nothing about it."""
    world = World()
    world.fake.stop_s = 10.0
    world.ask("restart-server", server="s")
    world.run(30, until=lambda: bool(world.all(RunCanary)))
    canary = world.all(RunCanary)[-1]
    world._due.clear()
    world.kill()
    before = world.server()
    assert before.repair is not None
    assert before.repair.stage is Stage.STOP
    for ok in (True, False):
        world._end(canary.intent, ok)
        assert world.server() == before


def test_an_acknowledgement_of_an_older_generation_changes_nothing() -> None:
    world = World(settings=RESYNC)
    world.trainer.listens = False
    world.kill()
    world.run(30, until=lambda: world.order == "RESYNC")
    before = world.state
    world.feed(OrderAcknowledged(generation=world.gate.generation - 1, order="RESYNC", ok=True))
    assert world.state == before


def test_the_promises_can_be_broken() -> None:
    """A state that says GO with a dead server is seen."""
    world = World()
    dead = replace(world.server(), state=ServerState.DEAD)
    wrong = replace(world.state, servers=(dead,))
    with pytest.raises(BrokenPromise, match="GO with 1 of 1"):
        Promises().after(world.state, Tick(), wrong, (), world.now)
    higher = replace(world.state, gate=replace(world.gate, generation=7))
    with pytest.raises(BrokenPromise, match="not written"):
        Promises().after(world.state, Tick(), higher, (), world.now)
    waiting = replace(world.server(), state=ServerState.RESTARTING, repair=None)
    with pytest.raises(BrokenPromise):
        Promises().after(world.state, Tick(), replace(world.state, servers=(waiting,)), (), world.now)
    assert Stage.STOP.value == "stop"
    assert Reason.OK.value == "ok"


def test_a_warning_about_the_reward_is_told_once_and_not_at_every_step() -> None:
    world = World()
    for step in range(40):
        world.step(0.5 + 0.01 * (step % 5))
    before = len(world.told("warning"))
    for _ in range(60):
        world.step(0.5)
    told = world.told("warning")[before:]
    assert len(told) == 1, told
    assert "reward_stuck" in told[0]
