"""
Too little memory for the demo's server, from a moment on: the fault `oom`.

Where this machine lets us make a memory cgroup the shortage is real: the server runs in one, its limit is
lowered to what half of the requests at a time need, and the kernel kills. Elsewhere a GPU is pretended, of
which others take their share, and the server ends with CUDA's own line.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

REQUEST_BYTES: Final = 2 << 20
REQUESTS: Final = 64
_ROOM_FOR: Final = 48  # more than half of the requests, fewer than all
_GPU_BYTES: Final = 2 << 30
_HIERARCHIES: Final = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)


class Shortage(Protocol):
    """One way to let a server run short."""

    @property
    def kind(self) -> str:
        """What it is, for people."""

    def command(self, command: list[str]) -> list[str]:
        """The server's command, so that it can run short."""

    def ready(self) -> None:
        """The server is up, and has had nothing to do yet."""

    def begin(self) -> bool:
        """Let it run short from now on; False where it has to be tried again in a moment."""

    def close(self) -> None:
        """Remove what was made, once the server has ended."""


class CgroupShortage:
    """
    A memory cgroup whose limit is lowered.

    Args:
        folder: the cgroup.
        limit: the file of its limit.

    """

    def __init__(self, folder: Path, limit: Path) -> None:
        self._folder = folder
        self._limit = limit
        self._idle_bytes = 0
        self.kind = f"a kernel kill in the memory cgroup {folder}"

    def command(self, command: list[str]) -> list[str]:
        """Enter the cgroup, then become the server."""
        enter = 'echo $$ > "$0" && exec "$@"'
        command = [*command, "--request-bytes", str(REQUEST_BYTES)]
        return ["/bin/sh", "-c", enter, str(self._folder / "cgroup.procs"), *command]

    def ready(self) -> None:
        """What it holds when idle; pages of files are not counted: the kernel takes them back by itself."""
        with suppress(OSError):
            rows = (line.split() for line in (self._folder / "memory.stat").read_text().splitlines())
            figures = {name: int(value) for name, value in rows}
            self._idle_bytes = figures.get("anon", figures.get("rss", 0))

    def begin(self) -> bool:
        """Version 1 refuses a limit below what is in use at the moment: then between two batches."""
        try:
            self._limit.write_text(str(self._idle_bytes + _ROOM_FOR * REQUEST_BYTES))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """A cgroup is busy until its last process is reaped."""
        for _ in range(100):
            try:
                self._folder.rmdir()
            except OSError:
                time.sleep(0.05)
            else:
                return


class GpuShortage:
    """
    A pretended GPU of which others take a share.

    Args:
        file: where its figures stand.
        why: why nothing better can be had here.

    """

    def __init__(self, file: Path, why: str) -> None:
        self._file = file
        self.kind = f"a pretended GPU and CUDA's own line, since {why}"
        self._write(taken=0)

    def command(self, command: list[str]) -> list[str]:
        """Have it look at the file."""
        flags = ["--request-bytes", str(REQUEST_BYTES), "--pretended-gpu", str(self._file)]
        return [*command, *flags, "--mem-fraction-static", "0.8"]

    def ready(self) -> None:
        """There is nothing to learn."""

    def begin(self) -> bool:
        """Others take what all requests together would need beside four fifths of it."""
        self._write(taken=_GPU_BYTES // 5 - _ROOM_FOR * REQUEST_BYTES)
        return True

    def close(self) -> None:
        """The file is the run's."""

    def _write(self, taken: int) -> None:
        following = self._file.with_suffix(".new")
        following.write_text(f"{_GPU_BYTES} {taken}\n")
        following.replace(self._file)


def shortage(name: str, folder: Path) -> Shortage:
    """
    The best that this machine offers.

    Args:
        name: of the run, for a cgroup of its own.
        folder: where files may be made.

    """
    tried = []
    for root, limit in _HIERARCHIES:
        cgroup = root / f"stepguard-{name}-{os.getpid()}"
        try:
            cgroup.mkdir()
        except OSError as refused:
            tried.append(f"{root}: {refused.strerror}")
            continue
        try:
            (cgroup / limit).read_text()
            for swapping in (cgroup / "memory.swap.max", cgroup / "memory.swappiness"):
                if swapping.exists():
                    swapping.write_text("0")
        except OSError as refused:
            cgroup.rmdir()
            tried.append(f"{root}: {refused.strerror}")
            continue
        return CgroupShortage(cgroup, cgroup / limit)
    return GpuShortage(folder / "gpu", f"no memory cgroup can be made here ({'; '.join(tried)})")
