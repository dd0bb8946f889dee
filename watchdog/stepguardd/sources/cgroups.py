"""
Memory cgroups over time: kills since the last look, an alarm at the next one; and PSI, the share of time in
which processes waited for memory.

Which cgroup a process is in and what its counter says is `stepguard.cgroups`, which the guard reads as well.
"""

import os
import re
import select
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stepguard.cgroups import MemoryCgroup, kill_count

_PSI = re.compile(r"(some|full) avg10=([\d.]{1,9}) avg60=([\d.]{1,9}) avg300=([\d.]{1,9}) total=(\d{1,19})")


_OF_THE_MACHINE = 0xEFFFFFFB
"""The inode of the kernel's first cgroup namespace (PROC_CGROUP_INIT_INO in linux/proc_ns.h)."""


def names_are_the_kernels(proc: Path) -> bool:
    """Whether this process sees cgroups by the names that the kernel's log uses: a container may not."""
    try:
        return (proc / "self/ns/cgroup").stat().st_ino == _OF_THE_MACHINE
    except OSError:
        return False


class KillCounter:
    """How many kills are new since the last look at one cgroup."""

    def __init__(self, cgroup: MemoryCgroup) -> None:
        """Take the present count as the beginning; kills from before are not reported."""
        self.cgroup = cgroup
        self._last = kill_count(cgroup)

    def new_kills(self) -> int:
        """
        Count the kills since the last call.

        0 while the count cannot be read: a cgroup that comes back is counted from what it says then.
        """
        count = kill_count(self.cgroup)
        if count is None:
            return 0
        before, self._last = self._last, count
        return max(0, count - before) if before is not None else 0


class KillAlarm:
    """
    A descriptor that becomes readable when something happens to a cgroup's memory, so that nobody has to
    poll.

    Version 2 offers a priority event on `memory.events`, version 1 an eventfd. Raises OSError where the
    kernel refuses; then a poll a second does as well.
    """

    def __init__(self, cgroup: MemoryCgroup) -> None:
        self._epoll = select.epoll()
        self._fds: list[int] = []
        self._event: int | None = None
        try:
            if cgroup.version == 2:
                watched = self._own(os.open(cgroup.events_file, os.O_RDONLY | os.O_CLOEXEC))
                self._epoll.register(watched, select.EPOLLPRI)
            else:
                watched = self._own(os.open(cgroup.events_file, os.O_RDONLY | os.O_CLOEXEC))
                self._event = self._own(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
                (cgroup.folder / "cgroup.event_control").write_text(
                    f"{self._event} {watched}", encoding="ascii"
                )
                self._epoll.register(self._event, select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor for a selector or an event loop."""
        return self._epoll.fileno()

    def clear(self) -> None:
        """Take note of the alarm, so that the next one is a new one."""
        if self._event is not None:
            with suppress(BlockingIOError):
                os.eventfd_read(self._event)
            return
        for fd in self._fds:
            os.pread(fd, 4096, 0)  # reading the file is what arms its priority event again
        self._epoll.poll(0)

    def close(self) -> None:
        """Give the descriptors back."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._epoll.close()

    def _own(self, fd: int) -> int:
        self._fds.append(fd)
        return fd


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """PSI: the percentage of time in which some, or all, processes waited for memory, over 10 s and 60 s."""

    some_10s: float
    some_60s: float
    full_10s: float
    full_60s: float


def memory_pressure(cgroup: MemoryCgroup | None = None, *, proc: Path = Path("/proc")) -> Pressure | None:
    """Read the pressure of a version 2 cgroup, else of the machine; None where it is not kept."""
    file = proc / "pressure" / "memory"
    if cgroup is not None and cgroup.version == 2:
        file = cgroup.folder / "memory.pressure"
    try:
        return parse_pressure(file.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return None


def parse_pressure(text: str) -> Pressure | None:
    """Read the two lines of a pressure file; None where they are not all there."""
    try:
        lines = {kind: (float(avg10), float(avg60)) for kind, avg10, avg60, _, _ in _PSI.findall(text)}
    except ValueError:
        return None
    if lines.keys() != {"some", "full"}:
        return None
    some, full = lines["some"], lines["full"]
    return Pressure(some_10s=some[0], some_60s=some[1], full_10s=full[0], full_60s=full[1])


def pressure_warning(
    pressure: Pressure | None, *, some_10s_max: float = 20.0, full_10s_max: float = 5.0
) -> str | None:
    """Say that memory is short, before anything is killed; None while it is not, or not known."""
    if pressure is None or (pressure.some_10s <= some_10s_max and pressure.full_10s <= full_10s_max):
        return None
    return (
        f"memory is short: in the last 10 s some processes waited for it {pressure.some_10s:.0f} % "
        f"and all of them {pressure.full_10s:.0f} % of the time"
    )
