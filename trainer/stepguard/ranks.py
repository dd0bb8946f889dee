"""
Ranks: rank 0 decides and every rank does the same.

Promise: without a broadcast every call is a pass-through, so that one process pays nothing. With one,
`share` is a collective: the ranks must reach it in the same order, which is why only `admit` and
`before_step` use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

Broadcast = Callable[[Any], Any]
Collect = Callable[[Any], Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """
    One process among the trainer's ranks.

    Args:
        rank: this one.
        world: how many.
        broadcast: takes rank 0's value (None elsewhere), returns it on every rank.
        collect: takes each rank's value, returns all of them, rank by rank.

    """

    rank: int = 0
    world: int = 1
    broadcast: Broadcast | None = None
    collect: Collect | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides."""
        return self.rank == 0

    @property
    def together(self) -> bool:
        """Whether decisions are shared among several ranks."""
        return self.world > 1 and self.broadcast is not None

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if not self.together or self.broadcast is None:
            return value
        shared: T = self.broadcast(value if self.first else None)
        return shared

    def gathered(self, value: T) -> list[T]:
        """Every rank's value; this one's alone where nothing collects."""
        if self.world == 1 or self.collect is None:
            return [value]
        return list(self.collect(value))
