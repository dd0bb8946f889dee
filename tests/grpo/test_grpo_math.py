"""The objective: who is in the baseline, and what a gradient follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepguard_grpo import task
from stepguard_grpo.grpo import Member, advantages, backward, live_mask, log_probs, to_tensors
from stepguard_grpo.model import BOS, SEP, load_policy, write_base_model

REWARDS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=2, max_size=8)


def member(reward: float, group_id: int = 0, output: tuple[int, ...] = (1, 2)) -> Member:
    return Member(group_id=group_id, prompt=(BOS, 5, SEP), output_ids=output, reward=reward)


@given(first=REWARDS, second=REWARDS)
def test_advantages_are_relative_to_the_own_group(first: list[float], second: list[float]) -> None:
    together = advantages([member(r, 0) for r in first] + [member(r, 1) for r in second])
    alone = advantages([member(r, 0) for r in first])
    assert together[: len(first)] == alone
    assert sum(alone) == pytest.approx(0.0, abs=1e-6)
    if len(set(first)) == 1:
        assert alone == [0.0] * len(first)
    else:
        order = sorted(range(len(first)), key=lambda index: first[index])
        assert [alone[index] for index in order] == sorted(alone)


def test_a_masked_member_moves_no_baseline() -> None:
    """A failed rollout scored 0 would push the others up; left out, it does not."""
    live = [member(0.5), member(1.0)]
    assert advantages(live) != advantages([*live, member(0.0)])[:2]
    assert live_mask([0, 0, 0], [True, True, False]) == [True, True, False]


def test_a_group_with_fewer_than_two_live_members_is_dropped() -> None:
    assert live_mask([0, 0, 1, 1], [True, False, True, True]) == [False, False, True, True]
    assert live_mask([0, 0], [False, False]) == [False, False]


@pytest.fixture(scope="module")
def policy(base_model: Path) -> object:
    return load_policy(base_model)


def test_padding_changes_no_log_probability(policy: object) -> None:
    short, long = member(1.0, output=(1,)), member(0.0, output=(1, 2, 3, 4))
    alone, _ = log_probs(policy, to_tensors([short]))  # type: ignore[arg-type]
    together, _ = log_probs(policy, to_tensors([short, long]))  # type: ignore[arg-type]
    torch.testing.assert_close(together[0, : alone.shape[1]], alone[0], atol=1e-6, rtol=0)


def test_the_gradient_raises_what_did_better_than_its_group(base_model: Path) -> None:
    policy = load_policy(base_model)
    batch = to_tensors([member(1.0, output=(1,)), member(0.0, output=(2,))])
    before, _ = log_probs(policy, batch)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    backward(policy, batch, before.detach(), clip=0.2, max_grad_norm=1.0)
    optimizer.step()
    after, _ = log_probs(policy, batch)
    assert after[0, 2] > before[0, 2]
    assert after[1, 2] < before[1, 2]


def test_a_ratio_outside_the_clip_stops_pulling(base_model: Path) -> None:
    policy = load_policy(base_model)
    batch = to_tensors([member(1.0, output=(1,)), member(0.0, output=(2,))])
    now, _ = log_probs(policy, batch)
    # As if the update had already gone far the way that each advantage points.
    old = now.detach() - torch.tensor([[1.0], [-1.0]])
    stats = backward(policy, batch, old, clip=0.2, max_grad_norm=1.0)
    assert stats.grad_norm == 0.0
    assert stats.clip_ratio == 1.0


def test_a_batch_where_all_agree_has_no_gradient(base_model: Path) -> None:
    policy = load_policy(base_model)
    batch = to_tensors([member(0.0, output=(1,)), member(0.0, output=(2,))])
    old, _ = log_probs(policy, batch)
    assert backward(policy, batch, old.detach(), clip=0.2, max_grad_norm=1.0).grad_norm == 0.0


def test_an_empty_batch_has_no_loss() -> None:
    with pytest.raises(ValueError, match="live member"):
        to_tensors([])


@given(seed=st.integers(0, 1000), step=st.integers(1, 1000))
def test_batches_are_a_function_of_seed_and_step(seed: int, step: int) -> None:
    first = task.batch(seed=seed, step=step, groups=2, group_size=3)
    assert first == task.batch(seed=seed, step=step, groups=2, group_size=3)
    assert first != task.batch(seed=seed, step=step + 1, groups=2, group_size=3)
    assert [request.group_id for request in first] == [0, 0, 0, 1, 1, 1]
    assert len({request.sampling_seed for request in first}) == 6
    assert len({request.prompt for request in first[:3]}) == 1


def test_the_score_is_the_share_of_right_tokens() -> None:
    assert task.score((1, 2, 3, 4), (1, 2, 3, 4)) == 1.0
    assert task.score((1, 9, 3), (1, 2, 3, 4)) == 0.5
    assert task.score((), (1, 2, 3, 4)) == 0.0


def test_base_models_are_equal_byte_for_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_base_model(tmp_path / name, seed)
    first, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == same
    assert first != other
