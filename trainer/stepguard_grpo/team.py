"""
The ranks of a data-parallel run, over gloo: each rolls out its share of the groups, gradients are averaged.

Promise: for one process every call is a pass-through and torch.distributed is not touched. Rank 0 alone talks
to the server, logs and saves; the others wait for it at `barrier`. A rank that dies breaks its connections,
and the collective that the others wait in raises on them at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

T = TypeVar("T")

TIMEOUT = timedelta(seconds=300)


@dataclass(frozen=True, slots=True)
class Team:
    """
    One rank among all.

    Args:
        rank: this one.
        world: how many.

    """

    rank: int = 0
    world: int = 1

    @classmethod
    def from_env(cls) -> Team:
        """Join the ranks that RANK and WORLD_SIZE name, as torchrun sets them; alone without."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        dist.init_process_group("gloo", timeout=TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the rank that talks to the others' world."""
        return self.rank == 0

    def share_of(self, items: Sequence[T], group_of: Sequence[int]) -> list[T]:
        """What of the items falls to this rank: whole groups."""
        return [item for item, group in zip(items, group_of, strict=True) if group % self.world == self.rank]

    def average(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Each gradient becomes the mean over the ranks."""
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def of_first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        first: T = box[0]
        return first

    def all(self, value: T) -> list[T]:
        """Every rank's value."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()
