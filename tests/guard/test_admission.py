"""The local verdict: what failed is outside, and never a zero among the others."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepguard.admission import (
    Refusal,
    Spread,
    Tally,
    Verdict,
    group_advantages,
    judge,
    leaves,
    refusal,
    shaped,
    total,
)
from stepguard.isolation import Aborted

BAD = Aborted(ValueError())


def refused(outcomes: list[Any], max_failed_fraction: float = 0.1, **options: Any) -> Refusal | None:
    return refusal(judge(outcomes, **options).tally, max_failed_fraction)


def test_a_batch_without_failures_is_admitted_whole() -> None:
    verdict = judge(
        ["a", "b"], rewards=[0.0, 1.0], group_ids=[1, 1], weight_versions=[5, "5"], announced=["4", "5"]
    )
    assert verdict == Verdict(
        tally=Tally(
            ok=2,
            failed=0,
            stale=0,
            kept=2,
            lone=0,
            dropped_groups=0,
            rewards=Spread.of([0.0, 1.0]),
            weight_versions=Counter({"5": 2}),
        ),
        mask=(True, True),
        rewards=(0.0, 1.0),
        group_ids=(1, 1),
    )
    assert refusal(verdict.tally, 0.1) is None


def test_the_fuse_blows_above_the_fraction_and_not_at_it() -> None:
    assert refused(["a"] * 9 + [BAD]) is None
    assert refused(["a"] * 17 + [BAD] * 2) is Refusal.FAILED_FRACTION
    assert refused([BAD] * 4, 1.0) is Refusal.NO_GROUP
    assert refused([BAD, "a"], 1.0) is None


def test_an_empty_batch_is_refused() -> None:
    assert refused([]) is Refusal.EMPTY
    assert refused([[], []]) is Refusal.EMPTY


def test_a_failed_member_never_counts_whatever_its_reward_says() -> None:
    verdict = judge(["a", BAD, "c"], rewards=[1.0, 0.0, 0.5])
    assert verdict.mask == (True, False, True)
    assert verdict.rewards == (1.0, None, 0.5)
    assert verdict.tally.rewards.stats() == {"mean": 0.75, "std": 0.25, "min": 0.5, "max": 1.0}


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, "a lot", "1.0", object()])
def test_a_reward_that_is_none_is_a_failure_and_not_a_zero(nothing: object) -> None:
    verdict = judge(["a", "b", "c"], rewards=[1.0, nothing, 1.0])
    assert verdict.mask == (True, False, True)
    assert verdict.tally.failed == 1
    assert verdict.tally.rewards.mean == 1.0


def test_rollouts_of_other_weights_than_the_newest_are_failures() -> None:
    versions = ["187"] * 8 + ["186", "default"]
    options = {"weight_versions": versions, "announced": ["185", "186", "187"]}
    verdict = judge(["a"] * 10, **options)
    assert verdict.mask == (True,) * 8 + (False, False)
    assert verdict.tally.stale == 2
    assert verdict.tally.weight_versions == {"187": 8, "186": 1, "default": 1}
    assert refused(["a"] * 10, **options) is Refusal.STALE_WEIGHTS
    assert refused(["a"] * 10, max_staleness=1, **options) is None
    assert judge(["a"] * 10, max_staleness=1, **options).mask == (True,) * 9 + (False,)


def test_an_unknown_version_is_not_stale_and_neither_is_any_before_the_first_announcement() -> None:
    assert refused(["a"] * 2, weight_versions=[None, "7"], announced=["7"]) is None
    assert refused(["a"] * 2, weight_versions=["x", "y"], announced=[]) is None


def test_failures_outweigh_staleness_in_the_reason() -> None:
    options = {"weight_versions": ["1"] * 10, "announced": ["2"]}
    assert refused([BAD] * 5 + ["a"] * 5, **options) is Refusal.FAILED_FRACTION
    assert refused([BAD] + ["a"] * 9, **options) is Refusal.STALE_WEIGHTS


def test_a_group_left_with_one_live_member_is_dropped() -> None:
    verdict = judge(["a", BAD, "c", "d"], group_ids=["x", "x", "y", "y"])
    assert verdict.mask == (False, False, True, True)
    assert (verdict.tally.dropped_groups, verdict.tally.lone, verdict.tally.ok) == (1, 1, 3)


def test_a_group_that_never_had_more_than_one_member_stays() -> None:
    assert judge(["a", "b"], group_ids=[1, 2]).mask == (True, True)


def test_a_batch_of_which_no_group_is_left_is_refused() -> None:
    assert refused(["a", BAD] * 2, 0.5, group_ids=[1, 1, 2, 2]) is Refusal.NO_GROUP


def test_lists_at_the_top_level_are_groups() -> None:
    verdict = judge([["a", BAD], ["c", ["d", "e"]]], rewards=[[1, 0], [1, [0, 1]]])
    assert verdict.group_ids == (0, 0, 1, 1, 1)
    assert verdict.mask == (False, False, True, True, True)


def test_one_entry_for_each_top_level_item_counts_for_its_members() -> None:
    verdict = judge([["a", "b"], "c"], group_ids=["x", "x"], weight_versions=["1", "2"], announced=["2"])
    assert verdict.group_ids == ("x", "x", "x")
    assert verdict.tally.stale == 2


def test_a_sequence_that_fits_neither_is_an_error_of_use_that_names_it() -> None:
    with pytest.raises(ValueError, match="rewards has 3 entries for a batch of 2"):
        judge(["a", "b"], rewards=[1, 2, 3])


def test_tensors_are_welcome() -> None:
    class Tensor:
        def tolist(self) -> list[list[float]]:
            return [[1.0, 0.5]]

    assert judge(["a", "b"], rewards=Tensor()).rewards == (1.0, 0.5)


def test_the_mask_stays_divisible_over_ranks_without_leaving_anyone_alone() -> None:
    groups = [1, 1, 1, 2, 2, 3, 3]
    assert judge(["a"] * 7, group_ids=groups, divisible_by=2).mask == (
        True,
        True,
        False,
        True,
        True,
        True,
        True,
    )
    assert judge(["a"] * 7, group_ids=groups, divisible_by=4).tally.kept == 4
    assert refused(["a"] * 3, divisible_by=4) is Refusal.NOT_DIVISIBLE
    assert judge(["a"] * 3, divisible_by=0).tally.kept == 3


def test_advantages_are_relative_to_the_live_members_of_the_group() -> None:
    got = group_advantages([1.0, 0.0, 0.0, 0.5], [1, 1, 1, 2], [True, True, False, True], epsilon=0.0)
    assert got == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2), 0.0, 0.0])
    assert group_advantages([1.0, 0.0], [1, 1], [True, True], scale=False) == [0.5, -0.5]
    assert group_advantages([1.0, 1.0], [1, 1], [True, True]) == [0.0, 0.0]


def test_tallies_add_up_over_ranks() -> None:
    left = judge(["a", BAD], rewards=[1.0, 0.0], weight_versions=["1", "1"], announced=["1"]).tally
    right = judge(["a", "b"], rewards=[0.0, 0.5], weight_versions=["1", "0"], announced=["1"]).tally
    both = total([left, right])
    assert (both.ok, both.failed, both.stale, both.kept) == (2, 2, 1, 2)
    assert both.rewards.stats() == {"mean": 0.5, "std": 0.5, "min": 0.0, "max": 1.0}
    assert both.weight_versions == {"1": 3, "0": 1}


values = st.floats(-100, 100)


@settings(max_examples=100)
@given(st.lists(values), st.lists(values))
def test_spreads_add_up_as_if_they_had_been_one(left: list[float], right: list[float]) -> None:
    both = (Spread.of(left) + Spread.of(right)).stats()
    if not left + right:
        assert both is None
        return
    assert both is not None
    assert float(both["mean"]) == pytest.approx(statistics.fmean(left + right), abs=1e-9)
    assert float(both["std"]) == pytest.approx(statistics.pstdev(left + right), abs=1e-6)


members = st.lists(
    st.tuples(st.booleans(), values, st.integers(0, 4), st.sampled_from(["1", "2", None])),
    min_size=1,
    max_size=24,
)


@settings(max_examples=200)
@given(
    members,
    st.integers(1, 4),
    st.lists(st.one_of(values, st.none(), st.just(math.nan)), min_size=24, max_size=24),
)
def test_failed_members_never_change_the_others(
    batch: list[tuple[bool, float, int, str | None]], divisible_by: int, noise: list[float | None]
) -> None:
    """Whatever reward a failed member carries: mask, statistics and advantages of the others stay."""
    outcomes = ["live" if live else BAD for live, *_ in batch]
    groups = [group for _, _, group, _ in batch]
    versions = [version for *_, version in batch]

    def judged(rewards: list[float | None]) -> tuple[Verdict, list[float]]:
        verdict = judge(
            outcomes,
            group_ids=groups,
            rewards=rewards,
            weight_versions=versions,
            announced=["1"],
            divisible_by=divisible_by,
        )
        assert verdict.rewards is not None
        return verdict, group_advantages(verdict.rewards, groups, verdict.mask)

    clean, advantages = judged([reward if live else None for live, reward, *_ in batch])
    noisy, noisy_advantages = judged([r if live else noise[i] for i, (live, r, *_) in enumerate(batch)])
    assert noisy == clean
    assert noisy_advantages == advantages
    kept = [index for index, counts in enumerate(clean.mask) if counts]
    alone = group_advantages([batch[i][1] for i in kept], [groups[i] for i in kept], [True] * len(kept))
    assert [advantages[i] for i in kept] == alone
    assert all(advantages[i] == 0.0 for i in range(len(batch)) if i not in kept)


@settings(max_examples=200)
@given(members, st.integers(1, 6))
def test_the_mask_has_no_more_than_the_live_and_no_lone_ones(batch: list[Any], divisible_by: int) -> None:
    outcomes = ["live" if live else BAD for live, *_ in batch]
    groups = [group for _, _, group, _ in batch]
    verdict = judge(outcomes, group_ids=groups, divisible_by=divisible_by)
    assert len(verdict.mask) == len(batch)
    assert all(outcome == "live" for outcome, counts in zip(outcomes, verdict.mask, strict=True) if counts)
    assert sum(verdict.mask) % divisible_by == 0
    size = Counter(groups)
    kept = Counter(group for group, counts in zip(groups, verdict.mask, strict=True) if counts)
    assert all(count != 1 or size[group] == 1 for group, count in kept.items())


nests = st.recursive(st.booleans(), lambda inner: st.lists(inner, max_size=4), max_leaves=16).filter(
    lambda nest: isinstance(nest, list)
)


@settings(max_examples=100)
@given(nests)
def test_the_shape_is_kept(nest: list[Any]) -> None:
    outcomes = shaped(["live" if live else BAD for live in leaves(nest)], nest)
    mask = shaped(judge(outcomes).mask, outcomes)
    assert shaped(list(leaves(mask)), nest) == mask
    assert sum(leaves(mask)) <= sum(leaves(nest))
