"""The evaluation measures what it says: its curves carry their truth, and its bound is the optimum's."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.eval.bounds import delay_quantile
from benchmarks.eval.families import FAULTY, HEALTHY, Batch, Family
from benchmarks.eval.measure import faulty, healthy, quantile

from stepguardd.core.reward import RewardConfig


@pytest.mark.parametrize("family", [*HEALTHY, *FAULTY], ids=lambda family: family.name)
def test_a_curve_is_the_same_for_the_same_seed_and_knows_its_onset(family: Family) -> None:
    curve, again = (family.make(np.random.default_rng([1, 2])) for _ in range(2))
    assert curve.steps == again.steps
    assert repr(curve.values) == repr(again.values)
    assert len(curve.steps) == len(curve.values)
    assert (curve.onset is None) == family.healthy
    if curve.onset is not None:
        assert 50 <= curve.onset < len(curve.values)


def test_the_distribution_of_a_batch_is_the_one_that_it_draws_from() -> None:
    batch = Batch(4, 8, 0.2)
    chances = batch.distribution(0.7, 0.25)
    drawn = batch.draw(np.random.default_rng(3), np.full(20_000, 0.7), np.full(20_000, 0.25)) * batch.rollouts
    counted = np.bincount(drawn.round().astype(int), minlength=33) / 20_000
    assert chances.sum() == pytest.approx(1.0)
    assert np.abs(chances - counted).max() < 0.01


def test_the_bound_of_a_crash_can_be_counted_on_fingers() -> None:
    """All zero has the chance 0.92^32 = 0.07 a step, so a budget of a million needs five or six of them."""
    batch = Batch(32, 1, 0.0)
    dead = batch.distribution(0.0)
    assert delay_quantile(batch.distribution(0.7), dead, 1e6) == 0
    assert delay_quantile(batch.distribution(0.08), dead, 1e6) in {4, 5}
    assert delay_quantile(batch.distribution(0.08), dead, 1e3) < delay_quantile(
        batch.distribution(0.08), dead, 1e9
    )


def test_nothing_is_beaten_that_cannot_be() -> None:
    """The judgement, which has to learn everything, is not quicker than the test that knows it all."""
    family = next(family for family in FAULTY if family.name == "crash_sparse")
    found = faulty(RewardConfig(), family, 9, seed=5)
    curve = family.make(np.random.default_rng([5, 0]))
    assert curve.before is not None
    assert curve.after is not None
    assert quantile(found.holds, 0.5) >= delay_quantile(curve.before, curve.after, 1e6) - 1


def test_a_blind_judgement_fails_the_evaluation() -> None:
    """The evaluation can say no: with a budget that no evidence reaches, every curve is a miss."""
    blind = RewardConfig(
        false_alarm_steps=1e300, warning_alarm_steps=1e300, zero_streak_warn=None, zero_streak_hold=None
    )
    family = next(family for family in FAULTY if family.name == "half_lost")
    assert all(delay is None for delay in faulty(blind, family, 3, seed=5).holds)
    trigger_happy = RewardConfig(warning_alarm_steps=2.0, false_alarm_steps=2.0)
    dense = next(family for family in HEALTHY if family.name == "dense")
    assert healthy(trigger_happy, dense, 3, seed=5).warnings > 3
