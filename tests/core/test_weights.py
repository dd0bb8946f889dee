"""Weights that are not what their label says: seen, told by their own reasons, loaded anew, or held for."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepguardd.core import proof
from stepguardd.core.breaker import Phase
from stepguardd.core.commands import AbortRequests, CompareWeights, PushWeights, StopServer
from stepguardd.core.events import GreedyToken, WeightsLook
from stepguardd.core.reasons import Reason
from stepguardd.core.state import Settings
from stepguardd.testing import FakeServer, FakeTrainer, World

PUSH = Settings(push_weights=True)


def recovered(world: World, within_s: float = 120.0) -> bool:
    return world.run(within_s, until=lambda: world.order == "GO")


# ---- a version that goes back ----------------------------------------------------------------------


def test_a_version_that_goes_back_within_an_attempt_is_an_incident_of_its_own() -> None:
    world = World(settings=PUSH)
    world.steps(3)
    world.fake.version = "v1"
    assert world.run(10, until=lambda: world.order == "HOLD")
    assert world.state.incident is not None
    assert world.state.incident.reason is Reason.VERSION_WENT_BACK
    assert any("from version v3 to v1" in text for text in world.told("call"))
    assert recovered(world)
    assert world.fake.version == "v3"
    assert not world.all(StopServer), "nothing is restarted for it"


def test_it_holds_a_run_with_servers_enough() -> None:
    """Nobody knows since when, nor who else has them."""
    world = World("a", "b", "c", settings=PUSH)
    world.steps(3)
    world.servers["b"].version = "v2"
    assert world.run(10, until=lambda: world.order == "HOLD")
    assert world.gate.reason == "version_went_back"
    assert recovered(world)


def test_it_is_told_once_also_where_the_trainer_itself_went_back() -> None:
    """Then the server is current, and the run goes on; a person still has to know."""
    world = World(settings=PUSH)
    world.steps(3)
    world.trainer.version = world.fake.version = "v2"
    world.run(30)
    assert world.order == "GO"
    assert sum("went back" in text for text in world.told("call")) == 1


def test_a_rollback_goes_back_and_is_no_such_incident() -> None:
    world = World(settings=PUSH, target=(1, "/checkpoints/1"))
    world.steps(3)
    world.ask("rollback", before_step=2)
    assert world.run(60, until=lambda: world.trainer.attempt == 1)
    world.fake.version = world.trainer.version
    world.run(30)
    assert not any("went back" in text for text in world.told("call"))


def test_a_relaunched_trainer_counts_from_its_checkpoint() -> None:
    trainer = FakeTrainer(managed=True)
    world = World(settings=Settings(push_weights=True, trainer_managed=True), trainer=trainer)
    world.steps(3)
    world.kill_trainer()
    assert world.run(120, until=lambda: bool(trainer.starts))
    world.trainer.version = world.fake.version = "v1"
    world.run(30)
    assert not any("went back" in text for text in world.told("call"))


def test_what_a_dead_trainer_pushed_is_no_version_of_its_successor() -> None:
    """The server serves it until the successor pushes for the first time, often while the run goes on."""
    trainer = FakeTrainer(managed=True)
    world = World(settings=Settings(push_weights=True, trainer_managed=True), trainer=trainer)
    world.steps(3)
    world.kill_trainer()
    assert world.run(120, until=lambda: bool(trainer.starts))
    world.run(30)
    for world.trainer.version, world.fake.version in (("v0", "v0"), ("v1", "v3")):
        world.run(5)
    world.trainer.version = world.fake.version = "v2"
    world.run(10)
    newest = world.state.servers[0].newest
    assert newest is not None
    assert newest.version == "v2"
    assert not any("went back" in text for text in world.told("call"))


def test_an_unnamed_version_and_other_names_are_never_older() -> None:
    world = World(settings=Settings(push_weights=True, max_staleness=9))
    world.steps(3)
    for name in ("default", "w2", "v3"):
        world.fake.version = name
        world.see_probe()
        world.see_probe()
    assert not any("went back" in text for text in world.told("call"))


def test_a_server_that_starts_again_counts_anew() -> None:
    world = World(FakeServer(name="s", base_version="v0"), settings=PUSH)
    world.steps(3)
    world.kill()
    assert recovered(world)
    world.run(10)
    assert not any("went back" in text for text in world.told("call"))


@given(st.text(max_size=12), st.text(max_size=12))
def test_of_two_versions_at_most_one_is_older(one: str, other: str) -> None:
    assert not (proof.older(one, other) and proof.older(other, one))
    assert not proof.older(one, one)


def test_versions_are_compared_as_numbers() -> None:
    assert proof.older("v9", "v10")
    assert proof.older("step_007", "step_8")
    assert not proof.older("10", "9")
    assert not proof.older("a1", "b2")
    assert not proof.older("base", "9")
    assert not proof.older("1" * 30, "2" * 30), "too long for a number: a name"


# ---- weights that are not what they say ------------------------------------------------------------


def test_a_checksum_that_differs_between_replicas_is_an_incident_of_its_own() -> None:
    """A restarted replica that says the right version and has other weights is found before it serves."""
    world = World("a", "b", "c", settings=PUSH)
    world.steps(2)
    world.servers["a"].wrong_loads = 1
    world.kill("a")
    assert world.run(60, until=lambda: world.order == "HOLD")
    assert world.gate.reason == "checksum_differs"
    assert world.state.incident is not None
    assert world.state.incident.reason is Reason.CHECKSUM_DIFFERS
    assert recovered(world)
    anew = [push.server for push in world.all(PushWeights) if push.anew]
    assert anew[:1] == ["a"], "its weights are loaded anew, whatever version it says"
    assert "b" in anew or "c" in anew, "and those of the one that it was compared with"
    assert world.servers["a"].weights is None


def test_replicas_that_still_differ_lock_the_run_out() -> None:
    world = World("a", "b", settings=PUSH)
    world.steps(2)
    world.servers["a"].wrong_loads = 1000
    world.kill("a")
    assert world.run(300, until=lambda: world.state.lockout is not None)
    assert world.state.lockout is not None
    assert world.state.lockout.reason is Reason.CHECKSUM_DIFFERS
    assert world.order == "HOLD"
    world.run(60)
    assert world.state.phase is Phase.LOCKED_OUT, "and stay so until a person comes"
    assert 1 <= len([push for push in world.all(PushWeights) if push.anew]) <= 3


def test_without_checksums_the_answers_of_two_replicas_are_compared() -> None:
    world = World(FakeServer(name="a", sums=False), FakeServer(name="b", sums=False), settings=PUSH)
    world.steps(2)
    world.servers["a"].wrong_loads = 1
    world.kill("a")
    assert world.run(60, until=lambda: world.gate.reason == "answer_differs")
    assert recovered(world)


def test_an_answer_that_was_learned_at_the_proof_exposes_a_wrong_model_later() -> None:
    """One server, killed twice at one version: the second time the folder holds another model."""
    world = World(settings=PUSH)
    world.steps(2)
    world.kill()
    assert recovered(world)
    assert [known.version for known in world.state.answers] == ["v2"]
    world.fake.wrong_loads = 1
    world.kill()
    assert world.run(60, until=lambda: world.gate.reason == "answer_differs")
    assert any("does not answer as v2 did" in text for text in world.told("call"))
    assert recovered(world)
    assert world.fake.weights is None


def test_a_version_that_was_never_seen_is_believed() -> None:
    world = World(settings=PUSH)
    world.steps(2)
    world.kill()
    assert recovered(world)
    assert len(world.all(CompareWeights)) == 1
    assert not world.told("call")


def test_what_cannot_be_learned_holds_nobody_up() -> None:
    """A server that the trainer pauses for its update answers nothing, and is no suspect for that."""
    world = World(settings=Settings())
    world.steps(2)
    world.kill()
    assert world.run(60, until=lambda: bool(world.all(CompareWeights)))
    world.fake.paused = True
    assert recovered(world)
    assert world.state.answers == ()


def test_a_persons_word_ends_it_and_what_was_known_is_forgotten() -> None:
    world = World(settings=PUSH)
    world.steps(2)
    world.kill()
    assert recovered(world)
    world.fake.wrong_loads = 1000
    world.kill()
    assert world.run(300, until=lambda: world.state.lockout is not None)
    assert world.gate.reason == "answer_differs"
    world.ask("resume")
    assert recovered(world)
    assert world.state.answers == ()


# ---- how answers are compared ----------------------------------------------------------------------


def said(*tokens: tuple[int, float | None]) -> tuple[GreedyToken, ...]:
    return tuple(GreedyToken(token=token, log_prob=log_prob) for token, log_prob in tokens)


def test_rounding_is_no_difference_and_a_near_tie_is_not_either() -> None:
    known = said((5, -1.20), (9, -0.69), (3, -2.0))
    assert not proof.disagree(said((5, -1.21), (9, -0.70), (3, -2.03)), known)
    assert not proof.disagree(said((5, -1.20), (8, -0.70), (77, -5.0)), known), "after a tie all is free"


def test_other_likelihoods_are_other_weights_and_so_are_other_tokens_without_them() -> None:
    known = said((5, -1.20), (9, -0.69))
    assert proof.disagree(said((5, -1.60), (9, -0.69)), known)
    assert proof.disagree(said((6, None), (9, None)), known)
    assert not proof.disagree(said((5, None), (9, None)), known)


def test_checksums_of_weights_that_are_split_differently_say_nothing() -> None:
    own = WeightsLook(server="a", version="v1", checksum="1", layout="tp1")
    peer = WeightsLook(server="b", version="v1", checksum="2", layout="tp2")
    assert proof.contradiction(own, peer, None) is None


def test_a_replica_that_went_on_meanwhile_says_nothing() -> None:
    own = WeightsLook(server="a", version="v1", checksum="1", layout="x")
    peer = WeightsLook(server="b", version="v2", checksum="2", layout="x")
    assert proof.contradiction(own, peer, None) is None


# ---- a trainer that reaches no guard call ----------------------------------------------------------

RESYNC = Settings(stall_floor_s=300.0, stall_ceiling_s=600.0)


def unheard(**trainer: object) -> World:
    """A run whose restarted server waits for the RESYNC of a trainer that hears nothing."""
    settings = replace(RESYNC, trainer_managed=bool(trainer.get("managed")))
    fake = FakeServer(name="s", load=8)
    world = World(fake, settings=settings, trainer=FakeTrainer(**trainer))  # type: ignore[arg-type]
    world.steps(2)
    world.trainer.listens, world.trainer.phase = False, "ROLLOUT"
    world.kill()
    assert world.run(60, until=lambda: world.order == "RESYNC")
    return world


def test_a_trainer_that_waits_for_a_stale_server_is_failed_fast_and_re_syncs_it() -> None:
    """Its requests hang or are retried for as long as nobody ends them: no guard call, and no RESYNC."""
    world = unheard()
    world.trainer.waits_for = "s"
    assert recovered(world, within_s=30.0)
    assert world.all(AbortRequests)
    assert not world.told("call")
    assert not world.told("locked_out")


def test_requests_are_ended_at_a_pace_and_of_the_stale_server_alone() -> None:
    world = unheard()
    world.run(20)
    ends = [at for at, command in world.said if isinstance(command, AbortRequests)]
    assert all(later - at >= 2.0 for at, later in pairwise(ends))
    assert 5 <= len(ends) <= 12
    world.trainer.phase = "SYNC"
    world.run(2)
    before = len(world.all(AbortRequests))
    world.run(20)
    assert len(world.all(AbortRequests)) == before, "what it asks now may be its push"


def test_nothing_is_ended_where_nothing_runs_or_the_daemon_only_looks_on() -> None:
    world = unheard()
    world.fake.load = world.fake.running = 0
    world.run(2)
    before = len(world.all(AbortRequests))
    world.run(20)
    assert len(world.all(AbortRequests)) == before
    looking_on = World(settings=RESYNC, mode="shadow")
    looking_on.steps(2)
    looking_on.fake.version = "base"
    looking_on.run(60)
    assert not looking_on.all(AbortRequests)


@pytest.mark.parametrize("managed", [True, False])
def test_the_wait_for_a_trainer_that_hears_nothing_ends_in_a_relaunch_or_locked_out(managed: bool) -> None:
    world = unheard(managed=managed)
    stands_still(world)
    limit_s = world.state.settings.stall_ceiling_s
    world.run(limit_s - 60.0)
    assert world.order == "RESYNC", "a long step is no hang"
    assert sum("asks for no order" in text for text in world.told("call")) == 1
    if managed:
        assert world.run(300, until=lambda: bool(world.trainer.starts))
        assert any("has reached no guard call for 10 min" in text for text in world.told("action"))
        assert recovered(world)
    else:
        world.run(300)
        assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "weights_unproven")


def test_a_trainer_that_moves_and_hears_nothing_has_twice_the_time() -> None:
    world = unheard()
    world.run(1.5 * world.state.settings.stall_ceiling_s)
    assert world.order == "RESYNC"
    world.run(world.state.settings.stall_ceiling_s)
    assert world.state.phase is Phase.LOCKED_OUT


def test_where_the_others_suffice_the_run_goes_on_without_the_server() -> None:
    world = World("a", "b", settings=RESYNC)
    world.steps(2)
    world.trainer.listens = False
    world.kill("a")
    stands_still(world)
    world.run(world.state.settings.stall_ceiling_s + 300.0)
    assert any("the others go on without it" in text for text in world.told("call"))
    assert world.order == "GO"


@pytest.mark.parametrize("managed", [True, False])
def test_a_rollback_that_a_deaf_trainer_never_hears_of_ends_too(managed: bool) -> None:
    world = World(settings=replace(RESYNC, trainer_managed=managed), trainer=FakeTrainer(managed=managed))
    world.steps(3)
    world.trainer.listens = False
    world.ask("rollback", before_step=2)
    assert world.run(30, until=lambda: world.order == "ROLLBACK")
    stands_still(world)
    world.run(world.state.settings.stall_ceiling_s - 60.0)
    assert world.order == "ROLLBACK"
    if managed:
        assert world.run(300, until=lambda: bool(world.trainer.starts))
        assert world.trainer.starts[-1].target_step == 1
    else:
        world.run(300)
        assert (world.state.phase, world.gate.reason) == (Phase.LOCKED_OUT, "rollback_failed")


def stands_still(world: World) -> None:
    """Its main thread makes no progress any more; its heartbeat may go on."""
    world.trainer.stuck = True
