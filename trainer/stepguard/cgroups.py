"""
Memory cgroups: which one a process is in, and how often the kernel has killed in it.

Both versions: `memory.events` of version 2, `memory.oom_control` of version 1. Needs no privilege, and names
the right cgroup, but not the victim. Promises that what cannot be read is None, never 0, and that nothing in
here raises.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_MOUNT_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCgroup:
    """A memory cgroup: its name as the kernel spells it, its folder, and its version."""

    name: str
    folder: Path
    version: int

    @property
    def events_file(self) -> Path:
        """The file that counts kills."""
        return self.folder / ("memory.events" if self.version == 2 else "memory.oom_control")


def memory_cgroup(pid: int, proc: Path = Path("/proc")) -> MemoryCgroup | None:
    """Find the memory cgroup of a process; None where it is gone, or no memory cgroup is mounted here."""
    try:
        groups = (proc / str(pid) / "cgroup").read_text(encoding="utf-8", errors="replace")
        mounts = (proc / "self" / "mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return find_memory_cgroup(groups, mounts)


def find_memory_cgroup(groups: str, mounts: str) -> MemoryCgroup | None:
    """
    Combine /proc/PID/cgroup with /proc/self/mountinfo.

    Version 1 wins where its memory controller is mounted: in hybrid set-ups version 2 has no memory
    controller.
    """
    names: dict[int, str] = {}
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if "memory" in controllers.split(","):
            names[1] = name
        elif number == "0" and not controllers:
            names[2] = name
    for version in (1, 2):
        if version not in names:
            continue
        for root, point in _memory_mounts(mounts, version):
            inside = _below(names[version], root)
            if inside is not None:
                return MemoryCgroup(name=names[version], folder=Path(point) / inside, version=version)
    return None


def _memory_mounts(mounts: str, version: int) -> list[tuple[str, str]]:
    """List root and mount point of each mounted hierarchy of that version that may hold memory."""
    found = []
    for line in mounts.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == ("cgroup2" if version == 2 else "cgroup") and (
            version == 2 or "memory" in kind[2].split(",")
        ):
            found.append((_unescaped(fields[3]), _unescaped(fields[4])))
    return found


def _unescaped(path: str) -> str:
    return _MOUNT_ESCAPE.sub(lambda escape: chr(int(escape[1], 8)), path)


def _below(name: str, root: str) -> str | None:
    """Return the path below what is mounted; None where it lies outside, as it can in a container."""
    if ".." in name.split("/"):
        return None
    if root == "/":
        return name.lstrip("/")
    if name == root or name.startswith(root + "/"):
        return name[len(root) :].lstrip("/")
    return None


def kill_count(cgroup: MemoryCgroup) -> int | None:
    """Read how often the kernel has killed for memory in this cgroup; None where that is not known."""
    try:
        text = cgroup.events_file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return parse_kills(text)


def parse_kills(text: str) -> int | None:
    """Read `oom_kill` out of either version's file."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == "oom_kill" and value.isascii() and value.isdigit() and len(value) < 20:
            return int(value)
    return None


class OwnKills:
    """
    The kills in the cgroup of this very process, for a daemon that lives in another and cannot see them.

    Args:
        proc: the proc file system.

    Attributes:
        cgroup: the cgroup; None where there is none to be seen.
        identity: the inode of its folder: unlike its name the same from inside and outside a container.
        total: kills so far, None while they are not known.

    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self.cgroup = memory_cgroup(os.getpid(), proc)
        self.identity: int | None = None
        self.total: int | None = None
        self._told: int | None = None

    def look(self) -> int | None:
        """The kills that are not `told` yet, at first 0; None while there is nothing to tell."""
        if self.cgroup is None:
            return None
        total = kill_count(self.cgroup)
        if total is None:
            return None
        try:
            self.identity = self.cgroup.folder.stat().st_ino
        except OSError:
            return None
        self.total = total
        if self._told is None:
            return 0
        return total - self._told if total > self._told else None

    def told(self) -> None:
        """What was looked at last is known to the daemon."""
        self._told = self.total
