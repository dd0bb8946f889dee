"""
What goes on around the run, live: logs, kills for memory, GPUs and memory pressure, as events of the core.

Promises that none of it ever ends the daemon or keeps it waiting: a source that fails is unknown, said in one
line when that begins, and asked again. Files are read in a thread of their own, since a disk may stall.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from stepguard.cgroups import MemoryCgroup, memory_cgroup
from stepguard.reports import Memory

from . import clock, proc, senses
from .config import Config
from .control.contract import GpuDict, HostDict, LogDict
from .core.events import (
    Event,
    GpuTrouble,
    GpuTroubled,
    LogRead,
    LogSeen,
    MemoryPressed,
    OomKind,
    OomSeen,
    Proc,
    Role,
)
from .core.state import State
from .core.surroundings import overlap
from .oneline import utf8
from .sources.cgroups import (
    KillCounter,
    Pressure,
    memory_pressure,
    names_are_the_kernels,
    pressure_warning,
)
from .sources.gpu import GpuSense, Headroom, strangers
from .sources.kmsg import JOURNALD, KMSG, KernelLog, KernelLogError, open_kernel_log
from .sources.logs import LogError, LogFollower, LogMatch
from .sources.nvml import Gpu, Xid
from .sources.oom import OomSense, oom_in_log

log = logging.getLogger("stepguardd")

INTERVAL_S: Final = 0.5
FRESH_INTERVAL_S: Final = 0.01
ABSENT_MAX_S: Final = 4.0
RETRY_S: Final = 60.0
DEAD_KNOWN_FOR_S: Final = 60.0
"""So long after it was last in a tree a pid still tells whose it was; later it may be another process."""
FILLING_AGAIN_S: Final = 1800.0
POSITION_KEPT_EACH_BYTES: Final = 4 * 1024 * 1024
"""So far into a log that says nothing its position is kept anew: a restart reads no more than that again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFiles:
    """
    Where this machine keeps what is read of it, and how patiently; a test has folders and times of its own.

    `proc` is where pressure, memory and the cgroups of processes are looked up. GPUs and pressure are looked
    at each `slow_s`. A GPU fills up when its memory grew for `growth_s` at least, and a process is a leftover
    when it lives on for `orphan_after_s` outside of every tree.
    """

    proc: Path = Path("/proc")
    kmsg: Path = KMSG
    journald: Path = JOURNALD
    slow_s: float = 2.5
    growth_s: float = 300.0
    orphan_after_s: float = 15.0

    def kernel_log(self) -> KernelLog:
        """Open the kernel's log; raises KernelLogError."""
        return open_kernel_log(self.kmsg, journald=self.journald)


THIS_HOST: Final = HostFiles()


class Surroundings:
    """
    Watches what surrounds a run.

    Args:
        config: the whole configuration.
        state: what the core knows now: whose processes are whose.
        emit: where the events go.
        gpus: who asks the GPUs.
        files: where the machine keeps what is read of it.
        kernel_log: opens the kernel's log; raises KernelLogError. By default that of `files`.

    """

    def __init__(
        self,
        config: Config,
        state: Callable[[], State],
        emit: Callable[[Event], None],
        *,
        gpus: GpuSense | None = None,
        files: HostFiles = THIS_HOST,
        kernel_log: Callable[[], KernelLog] | None = None,
    ) -> None:
        self._state = state
        self._emit = emit
        self.unseen: dict[str, str] = {}
        """What is unknown, each with its cause in one line."""
        self._logs = [
            FollowedLog(server.name, config.server_log(server))
            for server in config.servers
            if server.node is None
        ]
        if config.trainer.log is not None or config.trainer.backend == "process":
            self._logs.append(FollowedLog(None, config.trainer_log()))
        self._logged_ooms: Counter[str] = Counter()
        self._owners = Owners(files.orphan_after_s)
        self._files = files
        self._kills = _Kills(self._owners, kernel_log or files.kernel_log, self._known, files.proc)
        self._gpu = gpus or GpuSense()
        self._gpu_troubles = GpuTroubles(self._owners, files.growth_s)
        self._gpus: tuple[Gpu, ...] | None = None
        self._short = False
        self._pressure: Pressure | None = None
        self._looking = asyncio.Lock()
        self._reading: asyncio.Future[list[tuple[FollowedLog, _Piece]]] | None = None

    async def watch(self) -> None:
        """Look at an interval. Ends by cancellation, and leaves nothing open."""
        slow_due = 0.0
        try:
            while True:
                await self.look(absent_too=False)
                now = clock.monotonic()
                if now >= slow_due:
                    slow_due = now + self._files.slow_s
                    self._look_at_gpus(now)
                    self._look_at_pressure()
                await asyncio.sleep(INTERVAL_S)
        finally:
            if self._reading is not None:
                await asyncio.wait({self._reading}, timeout=2.0)
            if self._reading is None or self._reading.done():
                for followed in self._logs:
                    followed.close()
            self._kills.close()
            self._gpu.close()

    def guard_counts(self, report: Memory) -> None:
        """Take in what the guard says of its own cgroup, which may lie where this process cannot look."""
        kill = self._kills.told_by_guard(report)
        if kill is not None:
            self._emit(kill)

    async def look(self, *, absent_too: bool = True) -> None:
        """
        Read the logs and count the kernel's kills now; one look at a time.

        Args:
            absent_too: look for each log that was not there a moment ago, also where that is not due.

        """
        async with self._looking:
            now = clock.monotonic()
            logs = [followed for followed in self._logs if absent_too or now >= followed.due]
            if self._reading is None and logs:  # else somebody gave up on it: that is told first
                stood = {known.server: known.position for known in self._state().surroundings.log_positions}
                self._reading = asyncio.ensure_future(asyncio.to_thread(_read, logs, stood, now))
            if self._reading is not None:
                read = await asyncio.shield(self._reading)
                self._reading = None
                for followed, piece in read:
                    self._tell_lines(followed, piece)
            self._owners.look(self._state(), clock.monotonic())
            self.count_kills()

    def count_kills(self) -> None:
        """Count the kernel's kills now: systemd removes a dead unit's cgroup, and its counter, at once."""
        for kill in self._kills.poll(clock.monotonic()):
            self._emit(kill)

    def status(self) -> dict[str, object]:
        """The keys of `status` that are this module's: `gpus`, `host`, `oom`, `logs` and `unseen`."""
        state, now = self._state(), clock.monotonic()
        host = _host(self._kills.seen, self._files.proc)
        logs = [followed.status() for followed in self._logs]
        return {
            "gpus": None if self._gpus is None else [_gpu_dict(gpu) for gpu in self._gpus],
            "host": {**host, "pressure": senses.pressure(self._pressure)},
            "oom": senses.ooms(self._kills.seen, self._logged_ooms, logs, state, now),
            "logs": senses.with_newest(logs, state, now),
            "unseen": dict(self.unseen),
        }

    def _tell_lines(self, followed: "FollowedLog", piece: "_Piece") -> None:
        """The position goes with the last line of the piece: a crash in between reads the piece again."""
        self._known(f"log of {followed.server or 'the trainer'}", followed.cause)
        role = Role.TRAINER if followed.server is None else Role.SERVER
        for left, match in enumerate(piece.matches, 1 - len(piece.matches)):
            oom = oom_in_log(match, role)
            if oom is not None:
                self._logged_ooms[senses.OOM_SOURCES[oom.kind]] += oom.count
                self._emit(replace(oom, server=followed.server if oom.role is Role.SERVER else None))
            position = piece.position if left == 0 else None
            self._emit(
                LogSeen(
                    sign=match.sign,
                    server=followed.server,
                    line=match.line,
                    count=match.count,
                    position=position,
                )
            )
        if not piece.matches and piece.position is not None:
            self._emit(LogRead(server=followed.server, position=piece.position))

    async def gpus_now(self, timeout_s: float = 2.0) -> tuple[Gpu, ...] | None:
        """The GPUs by a look that begins after this call; None where they cannot be seen."""
        began = clock.monotonic()
        while "GPUs" not in self.unseen:
            now = clock.monotonic()
            asked = self._look_at_gpus(now)
            if asked is not None and asked >= began:
                break
            if now - began > timeout_s:
                return None
            await asyncio.sleep(FRESH_INTERVAL_S)
        return self._gpus

    def _look_at_gpus(self, now: float) -> float | None:
        """Take in the newest reading; when it was asked for."""
        reading = self._gpu.poll(now)
        self._gpus = reading.gpus
        self._known("GPUs", None if reading.asked is None and reading.gpus is None else reading.cause)
        for trouble in self._gpu_troubles.look(now, reading.gpus, reading.xids):
            self._emit(trouble)
        return reading.asked

    def _look_at_pressure(self) -> None:
        pressure = self._pressure = memory_pressure(proc=self._files.proc)
        if pressure is None:
            self._known("memory pressure", "this kernel keeps no /proc/pressure/memory")
            return
        self._known("memory pressure", None)
        short = pressure_warning(pressure) is not None
        if short != self._short:
            self._short = short
            self._emit(MemoryPressed(short=short, some_10s=pressure.some_10s, full_10s=pressure.full_10s))

    def _known(self, what: str, cause: str | None) -> None:
        """Say once that something is unknown and why, and once that it is known again."""
        if cause is None:
            if self.unseen.pop(what, None) is not None:
                log.info("%s: seen again", what)
        else:
            if what not in self.unseen:
                log.info("%s: unknown: %s", what, cause)
            self.unseen[what] = cause


@dataclass(frozen=True, slots=True)
class _Piece:
    """What was read of a log at one look; the position is None where it need not be kept."""

    matches: tuple[LogMatch, ...] = ()
    position: str | None = None


class FollowedLog:
    """
    One log that is followed; None is the trainer's.

    From where an earlier daemon stood, else from its end: what it said before anybody watched is history.
    One that is not there is looked for ever more rarely: it is read from its start whenever it comes.
    """

    def __init__(self, server: str | None, path: Path) -> None:
        self.server = server
        self.cause: str | None = None
        self.due = 0.0
        self._lines = 0
        self._absent_s = 0.0
        self._path = path
        self._follower: LogFollower | None = None
        self._kept: tuple[object, int] | None = None

    def poll(self, stood: str | None, now: float) -> _Piece:
        """
        What it says that means something; nothing while it cannot be read.

        Args:
            stood: the position that is kept, of this daemon or an earlier one.
            now: the time of the look.

        """
        piece = self._read(stood)
        absent = self._follower is None or self._follower.absent
        self._absent_s = min(max(2.0 * self._absent_s, INTERVAL_S), ABSENT_MAX_S) if absent else 0.0
        self.due = now + self._absent_s
        return piece

    def _read(self, stood: str | None) -> _Piece:
        try:
            if self._follower is None:
                self._open(stood)
            assert self._follower is not None
            matches = self._follower.poll()
        except LogError as unreadable:
            self.cause = str(unreadable)
            return _Piece()
        self.cause = None
        self._lines += sum(match.count for match in matches)
        return _Piece(matches, self._to_keep(self._follower.position, matches))

    def status(self) -> LogDict:
        """How it is followed, for `status`."""
        follower = self._follower
        absent = None if follower is None or not follower.absent else "it is not there yet"
        return {
            "server": self.server,
            "path": str(self._path),
            "trouble": self.cause or absent,
            "lines": self._lines,
            "dropped_bytes": 0 if follower is None else follower.dropped_bytes,
        }

    def close(self) -> None:
        """Give the file back."""
        if self._follower is not None:
            self._follower.close()

    def _open(self, stood: str | None) -> None:
        known = None if stood is None else _position(stood, self._path)
        self._follower = LogFollower(self._path, position=known, from_end=True)

    def _to_keep(self, position: Mapping[str, object], matches: tuple[LogMatch, ...]) -> str | None:
        """The position, where something was said, the file is another one, or much was read."""
        inode, offset = position["inode"], position["offset"]
        assert isinstance(offset, int)
        far = self._kept is None or self._kept[0] != inode or offset < self._kept[1]
        far = far or (self._kept is not None and offset - self._kept[1] >= POSITION_KEPT_EACH_BYTES)
        if not matches and not far:
            return None
        self._kept = (inode, offset)
        return json.dumps({"path": str(self._path), **position})


def _read(
    logs: list[FollowedLog], stood: Mapping[str | None, str], now: float
) -> list[tuple[FollowedLog, _Piece]]:
    return [(followed, followed.poll(stood.get(followed.server), now)) for followed in logs]


def _position(stood: str, path: Path) -> Mapping[str, object] | None:
    """The kept position; None for one of another file, or in words that are not understood."""
    try:
        known = json.loads(stood)
    except ValueError:
        return None
    return known if isinstance(known, dict) and known.get("path") == str(path) else None


@dataclass(slots=True)
class _Owned:
    """A process of the run, living or dead: whose it is, and when it was last in a tree."""

    proc: Proc
    role: Role
    server: str | None
    seen_at: float


class Owners:
    """Whose process a pid was, known from before its death; and which processes are the run's now."""

    def __init__(self, orphan_after_s: float = THIS_HOST.orphan_after_s) -> None:
        self._orphan_after_s = orphan_after_s
        self._owned: dict[int, _Owned] = {}
        self._current: frozenset[int] = frozenset()
        self.roots: tuple[tuple[Proc, Role, str | None], ...] = ()

    def look(self, state: State, now: float) -> None:
        """Take in the trees as they are now."""
        trees: list[tuple[tuple[Proc, ...], Role, str | None]] = [
            (server.procs, Role.SERVER, server.name) for server in state.servers
        ]
        trees.append((state.trainer.procs, Role.TRAINER, None))
        for procs, role, server in trees:
            for one in procs:
                self._owned[one.pid] = _Owned(one, role, server, now)
        current = {one.pid for procs, _, _ in trees for one in procs}
        page = state.trainer.pid
        if page is not None and page not in current and state.trainer.alive:
            self._page_pid(page, now)
            current.add(page)
        self._current = frozenset(current)
        self.roots = tuple((procs[0], role, server) for procs, role, server in trees if procs)
        if not state.trainer.procs and page in self._owned and page in current:
            self.roots = (*self.roots, (self._owned[page].proc, Role.TRAINER, None))
        for pid in [pid for pid, known in self._owned.items() if self._over(known, now)]:
            del self._owned[pid]

    def of(self, pid: int | None) -> tuple[Role, str | None]:
        """Whose it is or was, with the server's name; unknown for one that was never in a tree."""
        known = None if pid is None else self._owned.get(pid)
        return (Role.UNKNOWN, None) if known is None else (known.role, known.server)

    def orphan(self, pid: int, now: float) -> bool:
        """Whether a process of the run lives on though it belongs to no tree any more, and not only just."""
        known = self._owned.get(pid)
        return (
            known is not None
            and pid not in self._current
            and now - known.seen_at > self._orphan_after_s
            and proc.alive(known.proc)
        )

    @property
    def current(self) -> frozenset[int]:
        """The pids of the run's trees now."""
        return self._current

    def _page_pid(self, pid: int, now: float) -> None:
        """The trainer that only its page tells of; its start time is looked up once."""
        known = self._owned.get(pid)
        if known is not None and known.role is Role.TRAINER:
            known.seen_at = now
            return
        found = proc.stat(pid)
        if found is not None:
            one = Proc(pid=pid, start_ticks=found.start_ticks, role="trainer")
            self._owned[pid] = _Owned(one, Role.TRAINER, None, now)

    def _over(self, known: _Owned, now: float) -> bool:
        return (
            known.proc.pid not in self._current
            and now - known.seen_at > DEAD_KNOWN_FOR_S
            and not proc.alive(known.proc)
        )


class _Kills:
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


class GpuTroubles:
    """What is wrong with the GPUs, told when it begins. A first look is where counting starts."""

    def __init__(self, owners: Owners, growth_s: float = THIS_HOST.growth_s) -> None:
        self._owners = owners
        self._window_s = 2 * growth_s
        self._lost: frozenset[int] = frozenset()
        self._indices: dict[str, int] = {}
        self._ecc: dict[int, int] = {}
        self._headroom: dict[int, Headroom] = {}
        self._filling_told: dict[int, float] = {}
        self._orphans: frozenset[tuple[int, int]] = frozenset()
        self._last: tuple[Gpu, ...] | None = None

    def look(self, now: float, gpus: tuple[Gpu, ...] | None, xids: Iterable[Xid]) -> list[GpuTroubled]:
        """Take in one reading; one that was handed out before tells nothing new."""
        # A GPU that has just fallen off the bus says its name no more, and its Xid is told in the same look.
        self._indices |= {gpu.uuid: gpu.index for gpu in gpus or () if gpu.uuid is not None}
        found = [self._xid(xid) for xid in xids]
        if gpus is None or gpus is self._last:
            return found
        self._last = gpus
        lost = frozenset(gpu.index for gpu in gpus if gpu.lost)
        found += [
            GpuTroubled(
                trouble=GpuTrouble.LOST, gpu=index, text=f"GPU {index} is lost: it has fallen off the bus"
            )
            for index in sorted(lost - self._lost)
        ]
        self._lost = lost
        for gpu in gpus:
            found += self._errors(gpu)
            found += self._filling(now, gpu)
        return found + self._held(now, gpus)

    def _xid(self, xid: Xid) -> GpuTroubled:
        index = None if xid.uuid is None else self._indices.get(xid.uuid)
        whose = "a GPU" if index is None else f"GPU {index}"
        return GpuTroubled(
            trouble=GpuTrouble.XID, gpu=index, number=xid.number, text=f"{whose} reported Xid {xid.number}"
        )

    def _errors(self, gpu: Gpu) -> list[GpuTroubled]:
        errors = gpu.ecc_uncorrected
        if errors is None:
            return []
        before, self._ecc[gpu.index] = self._ecc.get(gpu.index, errors), errors
        new = errors - before
        if new <= 0:
            return []
        text = f"GPU {gpu.index}: {new} new uncorrected memory errors (ECC)"
        return [GpuTroubled(trouble=GpuTrouble.ECC, gpu=gpu.index, number=new, text=text)]

    def _filling(self, now: float, gpu: Gpu) -> list[GpuTroubled]:
        warning = self._headroom.setdefault(gpu.index, Headroom(window_s=self._window_s)).observe(now, gpu)
        told = self._filling_told.get(gpu.index)
        if warning is None or (told is not None and now - told < FILLING_AGAIN_S):
            return []
        self._filling_told[gpu.index] = now
        return [GpuTroubled(trouble=GpuTrouble.FILLING, gpu=gpu.index, text=warning)]

    def _held(self, now: float, gpus: tuple[Gpu, ...]) -> list[GpuTroubled]:
        """Memory that a leftover of the run holds; other people's jobs are none of its business."""
        held = frozenset(
            (index, process.pid)
            for index, process in strangers(gpus, self._owners.current)
            if self._owners.orphan(process.pid, now)
        )
        new, self._orphans = held - self._orphans, held
        return [
            GpuTroubled(
                trouble=GpuTrouble.ORPHAN,
                gpu=index,
                number=pid,
                text=f"GPU {index}: pid {pid}, a leftover of this run, still holds memory",
            )
            for index, pid in sorted(new)
        ]


def _gpu_dict(gpu: Gpu) -> GpuDict:
    return {
        "index": gpu.index,
        "used_bytes": gpu.used_bytes,
        "total_bytes": gpu.total_bytes,
        "lost": gpu.lost,
        "mig": gpu.mig,
        "busy_percent": gpu.busy_percent,
        "temperature_c": gpu.temperature_c,
        "power_w": gpu.power_w,
        "throttled_by": None if gpu.throttled_by is None else list(gpu.throttled_by),
        "ecc_uncorrected": gpu.ecc_uncorrected,
    }


def _host(kills: int | None, proc_dir: Path) -> HostDict:
    """The machine's memory now (proc_meminfo(5)); read at each question, since nobody else needs it."""
    found: dict[str, int] = {}
    try:
        lines = (proc_dir / "meminfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, rest = line.partition(":")
        number = rest.split()[:1]
        if key in {"MemAvailable", "MemTotal"} and number and number[0].isdigit():
            found[key] = 1024 * int(number[0])
    return {
        "available_bytes": found.get("MemAvailable"),
        "total_bytes": found.get("MemTotal"),
        "oom_kills": kills,
    }
