"""
The memory that requests take while they run, so that there can be too little of it.

Two kinds, for the demo's fault `oom`. The host's is real: each running request holds its own pages, and a
cgroup's limit is the kernel's to enforce. A GPU's is a sum, because there is none here: a file says what the
device has and what others took of it, and the scheduler ends with CUDA's own words when it does not suffice.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class OutOfMemoryError(RuntimeError):
    """The pretended GPU is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretendedGpu:
    """
    A GPU that is a file with two numbers of bytes: what it has in all, and what others took of that.

    Args:
        file: read before each forward pass.
        mem_fraction_static: the share of the whole that the server takes at its start.

    """

    file: Path
    mem_fraction_static: float

    def require(self, request_bytes: int, running: int) -> None:
        """See that this many running requests have room; OutOfMemoryError when not."""
        total, taken = (int(word) for word in self.file.read_text(encoding="ascii").split())
        free = total - taken - int(self.mem_fraction_static * total) - (running - 1) * request_bytes
        if free < request_bytes:
            raise OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {_mib(request_bytes)}. GPU 0 has a total capacity of "
                f"{_mib(total)} of which {_mib(max(0, free))} is free."
            )


class RequestMemory:
    """
    What each running request takes.

    Args:
        request_bytes: how much; 0 for nothing at all.
        gpu: where; None for real pages of the host.

    """

    def __init__(self, request_bytes: int = 0, gpu: PretendedGpu | None = None) -> None:
        self._request_bytes = request_bytes
        self._gpu = gpu
        self._held: dict[str, mmap.mmap] = {}

    def hold_for(self, running: Sequence[str]) -> None:
        """
        Hold memory for exactly these requests, by their ids.

        Raises:
            OutOfMemoryError: the pretended GPU is full; on the host the kernel has the word.

        """
        if not self._request_bytes:
            return
        if self._gpu is not None:
            if running:
                self._gpu.require(self._request_bytes, len(running))
            return
        for rid in self._held.keys() - set(running):
            self._held.pop(rid).close()
        for rid in running:
            if rid not in self._held:
                self._held[rid] = _pages(self._request_bytes)


def _pages(size_bytes: int) -> mmap.mmap:
    """Anonymous memory with every page touched: it counts from here, and goes back when it is closed."""
    pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages[:: mmap.PAGESIZE] = b"\1" * len(range(0, size_bytes, mmap.PAGESIZE))
    return pages


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.2f} MiB"
