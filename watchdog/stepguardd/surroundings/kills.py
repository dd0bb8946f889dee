"""The kernel's kills for memory, by whoever tells of them first, and whose they were."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from stepguard.cgroups import MemoryCgroup, memory_cgroup
from stepguard.reports import Memory

from ..core.events import OomKind, OomSeen, Proc, Role
from ..core.surroundings import overlap
from ..oneline import utf8
from ..sources.cgroups import KillCounter, names_are_the_kernels
from ..sources.kmsg import KernelLog, KernelLogError
from ..sources.oom import OomSense
from .owners import Owners

RETRY_S: Final = 60.0


class Kills:
    """The kernel's kills: its log where that can be read, and the counter of each cgroup of the run."""

    def __init__(
        self,
        owners: Owners,
        kernel_log: Callable[[], KernelLog],
        known: Callable[[str, str | None], None],
        proc_dir: Path,
    ) -> None:
        self.seen: int | None = None
        self._proc = proc_dir
        self._owners = owners
        self._open = kernel_log
        self._known = known
        self._kernel_log: KernelLog | None = None
        self._sense: OomSense | None = None
        self._retry_at = 0.0
        self._cgroups: dict[Proc, MemoryCgroup | None] = {}
        self._counters: dict[MemoryCgroup, KillCounter] = {}
        self._identities: dict[MemoryCgroup, int] = {}
        self._of_guard: tuple[int, int] | None = None

    def told_by_guard(self, report: Memory) -> OomSeen | None:
        """
        The kills that nobody here could count.

        A guard that comes new into a cgroup that is known tells of what happened between two guards as well:
        the kill of the trainer before it, perhaps.
        """
        identity, total = report["identity"], report["total"]
        known = self._of_guard
        self._of_guard = (identity, total)
        new = total - known[1] if known is not None and known[0] == identity else report["new"]
        if new <= 0 or identity in self._identities.values():
            return None
        self.seen = (self.seen or 0) + new
        return OomSeen(
            kind=OomKind.CGROUP_COUNTER,
            role=Role.TRAINER,
            cgroup=utf8(report["cgroup"]),
            count=new,
            facts={"counted by": "the trainer's guard"},
        )

    def poll(self, now: float) -> list[OomSeen]:
        """What is new, each with its owner where that is known."""
        kills = self._counted()
        if self._sense is None and now >= self._retry_at:
            self._retry_at = now + RETRY_S
            self._begin()
        if self._sense is not None:
            try:
                told = self._sense.poll()
            except KernelLogError as over:
                self._known("kernel log", str(over))
                self.close()
                told = ()
            self.seen = (self.seen or 0) + sum(kill.count for kill in told)
            kills += [self._with_owner(kill) for kill in told]
        elif self._counters:
            self.seen = (self.seen or 0) + sum(kill.count for kill in kills)
        return kills

    def close(self) -> None:
        """Give the kernel's log back."""
        if self._kernel_log is not None:
            self._kernel_log.close()
        self._kernel_log, self._sense = None, None

    def _with_owner(self, kill: OomSeen) -> OomSeen:
        """Whose it was; a stranger's in a cgroup that none of ours is in, nor in which one of ours is."""
        role, server = self._owners.of(kill.pid)
        ours = [cgroup.name for cgroup in self._cgroups.values() if cgroup is not None]
        stranger = (
            role is Role.UNKNOWN
            and kill.kind is OomKind.KERNEL_CGROUP
            and kill.cgroup is not None
            and bool(ours)
            and names_are_the_kernels(self._proc)
            and not any(overlap(kill.cgroup, name) for name in ours)
        )
        return replace(kill, role=Role.OTHER if stranger else kill.role, server=server)

    def _begin(self) -> None:
        try:
            self._kernel_log = self._open()
        except KernelLogError as refused:
            self._known("kernel log", str(refused))
            return
        self._known("kernel log", None)
        self._sense = OomSense(
            role_of=lambda pid, _name: self._owners.of(pid)[0], kernel_log=self._kernel_log
        )

    def _counted(self) -> list[OomSeen]:
        """New kills in the cgroups of the trees' roots; a cgroup that several share names nobody."""
        roots = self._owners.roots
        self._cgroups = {
            root: self._cgroups[root] if root in self._cgroups else memory_cgroup(root.pid, self._proc)
            for root, _, _ in roots
        }
        inside: dict[MemoryCgroup, set[tuple[Role, str | None]]] = {}
        for root, role, server in roots:
            cgroup = self._cgroups[root]
            if cgroup is not None:
                inside.setdefault(cgroup, set()).add((role, server))
        # One whose last process was killed is read once more: its counter may tell of that very kill.
        kills = []
        for cgroup, counter in self._counters.items():
            owners = inside.get(cgroup, set())
            role, server = next(iter(owners)) if len(owners) == 1 else (Role.UNKNOWN, None)
            sense = OomSense(role_of=lambda _pid, _name: Role.UNKNOWN, counters=[(counter, role)])
            kills += [replace(kill, server=server) for kill in sense.poll()]
        self._counters = {
            cgroup: self._counters[cgroup] if cgroup in self._counters else KillCounter(cgroup)
            for cgroup in inside
        }
        self._identities = {
            cgroup: self._identities[cgroup] if cgroup in self._identities else _inode(cgroup.folder)
            for cgroup in inside
        }
        return kills


def _inode(folder: Path) -> int:
    """The same from inside and outside a container; 0 for a cgroup that is gone."""
    try:
        return folder.stat().st_ino
    except OSError:
        return 0
