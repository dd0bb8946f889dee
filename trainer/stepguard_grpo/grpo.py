"""
Group-relative policy optimisation: advantages, the clipped objective, one update.

Promise: a masked trajectory is in no mean, no standard deviation and no loss. It does not know where rollouts
come from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stepguard_grpo.model import PAD

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One trajectory in the loss."""

    group_id: int
    prompt: tuple[int, ...]
    output_ids: tuple[int, ...]
    reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """A batch as tensors, rows being trajectories padded on the right."""

    input_ids: torch.Tensor  # int64 [rows, length]
    output_mask: torch.Tensor  # float32 [rows, length - 1]; 1 where the *next* token was generated
    advantages: torch.Tensor  # float32 [rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStats:
    """What one backward pass was like."""

    loss: float
    entropy: float
    clip_ratio: float
    grad_norm: float


def live_mask(group_ids: Sequence[int], alive: Sequence[bool]) -> list[bool]:
    """`alive`, less the members of groups left with fewer than two: a lone reward has no baseline."""
    count: dict[int, int] = defaultdict(int)
    for group_id, lives in zip(group_ids, alive, strict=True):
        count[group_id] += lives
    return [lives and count[group_id] >= 2 for group_id, lives in zip(group_ids, alive, strict=True)]


def advantages(members: Sequence[Member]) -> list[float]:
    """Each reward less its group's mean, over its group's standard deviation (0.0 where all agree)."""
    rewards: dict[int, list[float]] = defaultdict(list)
    for member in members:
        rewards[member.group_id].append(member.reward)
    result = []
    for member in members:
        group = rewards[member.group_id]
        mean = sum(group) / len(group)
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in group) / len(group))
        result.append((member.reward - mean) / (deviation + 1e-4) if deviation > 0 else 0.0)
    return result


def to_tensors(members: Sequence[Member]) -> Tensors:
    """Pad and mask; ValueError for an empty batch."""
    if not members:
        raise ValueError("a batch without a live member has no loss")
    length = max(len(member.prompt) + len(member.output_ids) for member in members)
    ids = torch.full((len(members), length), PAD, dtype=torch.int64)
    mask = torch.zeros((len(members), length - 1), dtype=torch.float32)
    for row, member in enumerate(members):
        start, end = len(member.prompt), len(member.prompt) + len(member.output_ids)
        ids[row, :end] = torch.tensor(member.prompt + member.output_ids)
        mask[row, start - 1 : end - 1] = 1.0
    return Tensors(
        input_ids=ids, output_mask=mask, advantages=torch.tensor(advantages(members), dtype=torch.float32)
    )


def log_probs(policy: LlamaForCausalLM, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each next token and the entropy there, both [rows, length - 1]."""
    logits = policy(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
    scores = torch.log_softmax(logits, dim=-1)
    chosen = scores.gather(-1, batch.input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return chosen, -(scores.exp() * scores).sum(-1)


def backward(
    policy: LlamaForCausalLM,
    batch: Tensors,
    old: torch.Tensor,
    *,
    clip: float,
    max_grad_norm: float,
    average: Callable[[Iterable[torch.nn.Parameter]], None] = lambda parameters: None,
) -> LossStats:
    """
    Fill the gradients of the clipped objective against the log-probabilities `old` [rows, length - 1].

    `average` makes them the mean over the ranks, before their norm is clipped.
    """
    new, entropy = log_probs(policy, batch)
    tokens = batch.output_mask.sum()
    ratio = torch.exp(new - old)
    gain = batch.advantages.unsqueeze(-1)
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    loss = -(surrogate * batch.output_mask).sum() / tokens
    loss.backward()
    average(policy.parameters())
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    clipped = ((ratio - 1).abs() > clip).float()
    return LossStats(
        loss=loss.item(),
        entropy=((entropy.detach() * batch.output_mask).sum() / tokens).item(),
        clip_ratio=((clipped * batch.output_mask).sum() / tokens).item(),
        grad_norm=float(norm),
    )
