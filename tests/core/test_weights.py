"""Weights that are not what their label says: seen, told by their own reasons, loaded anew, or held for."""

from hypothesis import given
from hypothesis import strategies as st

from stepguardd.core import proof
from stepguardd.core.breaker import Phase
from stepguardd.core.commands import CompareWeights, PushWeights, StopServer
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
