"""
The trainer: its half of the gate page, its reports, and its process.

Reports wake the daemon at once; the page is read at an interval and carries what reports do not (beats,
progress, phase) or may have lost.
"""

import asyncio
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from stepguard.gate import GatePage
from stepguard.reports import REPORT_BYTES_MAX, BadReport, Batch, Memory, Report, parse_report

from .. import proc
from ..core.events import (
    BatchReported,
    CallsHung,
    CheckpointSaved,
    Event,
    OrderAcknowledged,
    Proc,
    RequestsFailed,
    RolloutsLost,
    StepCommitted,
    TrainerExited,
    TrainerLeft,
    TrainerSeen,
)
from ..oneline import utf8
from .process import ExitWatch
from .reward.aliases import canonical

REPORTS_PER_WAKE_MAX: Final = 64

Emit = Callable[[Event], None]
Reported = (
    BatchReported
    | StepCommitted
    | CheckpointSaved
    | RequestsFailed
    | CallsHung
    | RolloutsLost
    | OrderAcknowledged
    | TrainerLeft
)
"""What a guard's reports become."""


class ReportSocket:
    """
    `<run_dir>/reports.sock`: each datagram a report, each report at most one event.

    Args:
        path: where to bind; a socket left there by a daemon that died is replaced.
        emit: where the events go.
        kills: where the guard's counts of kernel kills go: which of them are news is told elsewhere.

    Raises:
        OSError: the path cannot be bound, or holds something that is no socket.

    """

    def __init__(
        self, path: Path, emit: Emit, kills: Callable[[Memory], None] = lambda _report: None
    ) -> None:
        self.path = path
        self.bad_reports = 0
        self._emit = emit
        self._kills = kills
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise FileExistsError(f"{path} is there and is no socket; remove it")
            path.unlink()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        path.chmod(0o660)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def close(self) -> None:
        """Unbind; the trainer's reports are dropped and counted on its side."""
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def drain(self) -> None:
        """Take in what has come already: a goodbye counts before the exit that it speaks of."""
        self._readable()

    def _readable(self) -> None:
        # Bounded, so that a trainer that floods the socket cannot starve the rest of the loop.
        for _ in range(REPORTS_PER_WAKE_MAX):
            try:
                datagram = self._socket.recv(REPORT_BYTES_MAX + 1)
            except (BlockingIOError, InterruptedError):
                return
            try:
                report = parse_report(datagram)
            except BadReport:
                self.bad_reports += 1
                continue
            if report["kind"] == "memory":
                self._kills(report)
                continue
            event = event_of(report)
            if event is not None:
                self._emit(event)


def event_of(report: Report) -> Reported | None:
    """The event that a report is; None for one that only informs people."""
    match report["kind"]:
        case "batch":
            return _batch(report)
        case "step":
            # Under the names that the judgement knows; what it does not know it could not use.
            metrics = {
                known.value: number(value)
                for name, value in report["metrics"].items()
                if (known := canonical(name)) is not None
            }
            return StepCommitted(
                attempt=report["attempt"],
                step=report["step"],
                reward=optional(report["reward"]),
                weight_version=None if report["weight_version"] is None else utf8(report["weight_version"]),
                metrics=metrics,
            )
        case "saved":
            norms = report["norms"] or {}
            return CheckpointSaved(
                attempt=report["attempt"],
                step=report["step"],
                path=utf8(report["path"]),
                norms={utf8(name): number(value) for name, value in norms.items()},
            )
        case "requests_failed":
            return RequestsFailed(
                attempt=report["attempt"], in_a_row=report["in_a_row"], error=utf8(report["error"])
            )
        case "calls_hung":
            return CallsHung(
                attempt=report["attempt"],
                what=utf8(report["what"]),
                failed=report["failed"],
                calls=report["calls"],
            )
        case "rollouts_lost":
            return RolloutsLost(
                attempt=report["attempt"],
                began=number(report["began"]),
                lost=tuple(utf8(key) for key in report["lost"]),
                answered=tuple(utf8(key) for key in report["answered"]),
            )
        case "bye":
            detail = utf8(report["detail"])
            return TrainerLeft(attempt=report["attempt"], why=report["why"], detail=detail)
        case "ack":
            return OrderAcknowledged(
                generation=report["generation"],
                order=report["order"],
                ok=report["ok"],
                detail=utf8(report["detail"]),
            )
        case _:
            return None


def _batch(report: Batch) -> BatchReported:
    reward = report["reward"]
    return BatchReported(
        attempt=report["attempt"],
        step=report["step"],
        batch=report["batch"],
        ok=report["ok"],
        failed=report["failed"],
        reward=None if reward is None else optional(reward["mean"]),
        reward_std=None if reward is None else optional(reward["std"]),
        reward_min=None if reward is None else optional(reward["min"]),
        reward_max=None if reward is None else optional(reward["max"]),
        stale=report["stale"],
        refused=None if report["refused"] is None else utf8(report["refused"]),
        began=optional(report.get("began")),
    )


def number(value: float | str) -> float:
    """A number as reports spell it: JSON has no NaN, so it travels as a word."""
    return float(value)


def optional(value: float | str | None) -> float | None:
    """The same, where null is unknown."""
    return None if value is None else number(value)


class TrainerPage:
    """
    The trainer's half of the gate page, and the exit of the process that wrote it.

    Args:
        page: the gate page.
        emit: where the events go.
        before_exit: called before an exit is told: reports of the dead may still wait.

    """

    def __init__(self, page: GatePage, emit: Emit, before_exit: Callable[[], None] = lambda: None) -> None:
        self._page = page
        self._emit = emit
        self._before_exit = before_exit
        self._pid: int | None = None
        self._exits = ExitWatch(self._exited)

    def look(self) -> None:
        """Read the page; a torn or absent half is no news."""
        half = self._page.trainer()
        if half is None:
            return
        if half.pid != self._pid:
            self._follow(half.pid)
        self._emit(
            TrainerSeen(
                pid=half.pid,
                attempt=half.attempt,
                step=half.step,
                phase=half.phase.name,
                beats=half.beats,
                progress=half.progress,
                acked_generation=half.acked_generation,
                weight_version=half.weight_version,
                handles_resync=half.handles_resync,
                handles_rollback=half.handles_rollback,
                handles_save=half.handles_save,
            )
        )

    def close(self) -> None:
        """Stop watching."""
        self._exits.close()

    def _follow(self, pid: int) -> None:
        self._pid = pid
        found = proc.stat(pid)
        if found is None or found.dead or proc.maps(pid, self._page.path.name) is False:
            # In another pid namespace (where somebody else may have its number here), or gone: its heartbeat
            # is all there is.
            self._exits.watch(frozenset())
            return
        self._exits.watch(frozenset({Proc(pid=pid, start_ticks=found.start_ticks, role="trainer")}))

    def _exited(self, ended: Proc, code: int | None) -> None:
        self._before_exit()
        self._emit(TrainerExited(pid=ended.pid, code=code))
