"""
A trainer's ranks over a CPU group of torch.distributed, for `Guard.from_env(**over_gloo())`.

Promise: a group of its own on the gloo back-end, so that a held rank has no NCCL operation outstanding. What
travels are the guard's own small values. A rank that dies breaks its connections, and the call fails on the
others at once; one whose whole machine is lost is found out by `timeout_s`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypedDict

from stepguard.ranks import Broadcast, Collect


class Collectives(TypedDict, total=False):
    """What `Guard.from_env` takes; empty for a single process."""

    broadcast: Broadcast
    collect: Collect


def over_gloo(*, timeout_s: float = 1800.0) -> Collectives:
    """
    Broadcast and collect over a new gloo group of all ranks; every rank calls this, at the same point.

    Args:
        timeout_s: how long a rank waits for the others. Held ranks meet once a second whatever it is, so it
            only has to outlast the longest step of the slowest rank.

    Returns:
        The keyword arguments; none where torch.distributed is not initialised or has one rank.

    """
    import torch.distributed as dist  # noqa: PLC0415 - no training environment has to have it

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    world = dist.get_world_size()

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=group)
        return box[0]

    def collect(value: Any) -> list[Any]:
        values: list[Any] = [None] * world
        dist.all_gather_object(values, value, group=group)
        return values

    return {"broadcast": broadcast, "collect": collect}
