"""A memory cgroup with a limit, made and removed by root, for the tests of a real kernel kill."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from requirements import require
from stepguard.cgroups import MemoryCgroup

_HIERARCHIES = (
    (1, Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (2, Path("/sys/fs/cgroup"), "memory.max"),
)


@contextmanager
def limited_memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """Yield a cgroup with that limit, in whichever version this machine lets root make one."""
    if os.geteuid() != 0:
        require("oom", "making a memory cgroup needs root")
    cgroup = _make(limit_bytes)
    try:
        yield cgroup
    finally:
        _remove(cgroup.folder)


def _make(limit_bytes: int) -> MemoryCgroup:  # noqa: RET503 - `require` does not return
    name = f"stepguard-test-{os.getpid()}"
    tried = []
    for version, root, limit in _HIERARCHIES:
        folder = root / name
        try:
            folder.mkdir()
        except OSError as refused:
            tried.append(f"{root}: {refused.strerror}")
            continue
        try:
            if not (folder / limit).exists():
                raise FileNotFoundError(2, "no memory controller", str(folder))
            (folder / limit).write_text(str(limit_bytes))
            swap = folder / "memory.swap.max"
            if swap.exists():
                swap.write_text("0")
        except OSError as refused:
            folder.rmdir()
            tried.append(f"{root}: {refused.strerror}")
            continue
        return MemoryCgroup(name=f"/{name}", folder=folder, version=version)
    require("oom", f"no memory cgroup can be made here ({'; '.join(tried)})")


def _remove(folder: Path) -> None:
    """A cgroup is busy until its last process is reaped."""
    for _ in range(100):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"{folder} could not be removed")
