"""
Whether the GPUs have their memory back after a server was ended: a driver frees it some time after the death.

A start into memory that is not free yet ends in an out-of-memory error that nobody caused. What counts is
memory that no living process accounts for, so that a trainer on the same GPU may hold its own share. What
the driver does not tell is unknown, and nothing is waited for because of it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

from .. import clock, proc
from ..core.events import GpuBaseline
from ..sources.nvml import Gpu

LEFT_BYTES_MAX: Final = 512 << 20
"""What a driver keeps for itself comes and goes with its clients (NVRx allows as much)."""

SETTLED_S: Final = 5.0
FALL_BYTES: Final = 16 << 20
LOOK_INTERVAL_S: Final = 0.25

Living = Callable[[int], bool]
"""Whether a pid is of a process of this machine, as it is seen from here."""

Look = Callable[[], Awaitable[Sequence[Gpu] | None]]
"""The GPUs by a look that begins now; None where they cannot be seen."""


def baseline(gpus: Sequence[Gpu] | None, living: Living = proc.exists) -> tuple[GpuBaseline, ...]:
    """What is to be there again after a stop. The server that it is for must not run yet."""
    known = ((gpu.index, _unclaimed(gpu, living)) for gpu in gpus or ())
    return tuple(GpuBaseline(gpu=index, unclaimed_bytes=size) for index, size in known if size is not None)


def _unclaimed(gpu: Gpu, living: Living) -> int | None:
    """What no living process accounts for."""
    if gpu.used_bytes is None or gpu.processes is None:
        return None
    held = [process.used_bytes for process in gpu.processes if living(process.pid)]
    if None in held:
        return None
    return max(0, gpu.used_bytes - sum(size for size in held if size is not None))


class Release:
    """
    What is still held, look by look.

    Args:
        ended: the pids of the server.
        before: the GPUs as they were before its start; empty where that is unknown.
        running: a look from when it still ran; None without one.
        living: whether a pid lives.

    """

    def __init__(
        self,
        ended: Collection[int],
        before: Sequence[GpuBaseline],
        running: Sequence[Gpu] | None,
        living: Living = proc.exists,
    ) -> None:
        self._living = living
        self._ended = frozenset(ended)
        self._before = {one.gpu: one.unclaimed_bytes for one in before}
        self._theirs = {gpu.index for gpu in running or () if self._of(gpu)}
        self._lowest: dict[int, tuple[int, float]] = {}

    def held(self, gpus: Sequence[Gpu], now: float) -> str | None:
        """What is held still, in words; None when all of it came back, and where that cannot be known."""
        left = [text for gpu in gpus if (text := self._left(gpu, now)) is not None]
        return "; ".join(left) or None

    def _of(self, gpu: Gpu) -> list[int]:
        return [process.pid for process in gpu.processes or () if process.pid in self._ended]

    def _left(self, gpu: Gpu, now: float) -> str | None:
        dead = self._of(gpu)
        if dead:
            self._theirs.add(gpu.index)
            return f"GPU {gpu.index} still holds memory of pid {dead[0]}, which was ended"
        unclaimed, before = _unclaimed(gpu, self._living), self._before.get(gpu.index)
        if unclaimed is None or before is None:
            return None
        excess = unclaimed - before
        if excess <= LEFT_BYTES_MAX or not (gpu.index in self._theirs or self._falling(gpu, unclaimed, now)):
            return None
        return f"GPU {gpu.index} holds {_gib(excess)} GiB more than before its start, of no living process"

    def _falling(self, gpu: Gpu, unclaimed: int, now: float) -> bool:
        """
        Whether memory still comes back, on a GPU of which nobody can say whether it was the server's.

        In a container with its own pid namespace NVML's pids are of nobody here, or none are listed.
        """
        lowest = self._lowest.get(gpu.index)
        if lowest is None or unclaimed < lowest[0] - FALL_BYTES:
            lowest = self._lowest[gpu.index] = (unclaimed, now)
        return now - lowest[1] < SETTLED_S


async def given_back(release: Release, look: Look, *, timeout_s: float) -> str | None:
    """Wait until the memory is back; what is held still when time is up, in words."""
    deadline = clock.monotonic() + timeout_s
    while True:
        gpus = await look()
        now = clock.monotonic()
        held = None if gpus is None else release.held(gpus, now)
        if held is None:
            return None
        if now >= deadline:
            return f"{held}, {timeout_s:g} s after it was ended"
        await asyncio.sleep(min(LOOK_INTERVAL_S, deadline - now))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
