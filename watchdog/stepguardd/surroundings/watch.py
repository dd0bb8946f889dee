"""The look at all of it at an interval, and what `status` says of it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from stepguard.reports import Memory

from .. import clock, senses
from ..config import Config
from ..control.contract import GpuDict
from ..core.events import Event, LogRead, LogSeen, MemoryPressed, Role
from ..core.state import State
from ..sources.cgroups import Pressure, memory_pressure, pressure_warning
from ..sources.gpu import GpuSense
from ..sources.kmsg import KernelLog
from ..sources.nvml import Gpu
from ..sources.oom import oom_in_log
from .followed import FollowedLog, Piece, read_all
from .gpus import GpuTroubles
from .host import INTERVAL_S, THIS_HOST, HostFiles, memory_now
from .kills import Kills
from .owners import Owners

log = logging.getLogger("stepguardd")

FRESH_INTERVAL_S: Final = 0.01


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
        self._kills = Kills(self._owners, kernel_log or files.kernel_log, self._known, files.proc)
        self._gpu = gpus or GpuSense()
        self._gpu_troubles = GpuTroubles(self._owners, files.growth_s)
        self._gpus: tuple[Gpu, ...] | None = None
        self._short = False
        self._pressure: Pressure | None = None
        self._looking = asyncio.Lock()
        self._reading: asyncio.Future[list[tuple[FollowedLog, Piece]]] | None = None

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
                self._reading = asyncio.ensure_future(asyncio.to_thread(read_all, logs, stood, now))
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
        host = memory_now(self._kills.seen, self._files.proc)
        logs = [followed.status() for followed in self._logs]
        return {
            "gpus": None if self._gpus is None else [_gpu_dict(gpu) for gpu in self._gpus],
            "host": {**host, "pressure": senses.pressure(self._pressure)},
            "oom": senses.ooms(self._kills.seen, self._logged_ooms, logs, state, now),
            "logs": senses.with_newest(logs, state, now),
            "unseen": dict(self.unseen),
        }

    def _tell_lines(self, followed: FollowedLog, piece: Piece) -> None:
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
