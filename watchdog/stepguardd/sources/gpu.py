"""
The GPUs of this machine, asked in a thread of their own, and what their memory is heading for.

Promises never to wait: a poll hands out the newest look and asks for the next one. A driver that does not
answer in time makes the reading unknown, with one line why, until it comes back; there is never a second
thread. No driver, no GPU and no `nvidia-ml-py` are unknown as well, never an error. The pure part says when
memory will be full, and whose processes hold it.
"""

import queue
import threading
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from stepguardd.sources.nvml import (
    Gpu,
    GpuError,
    GpuLook,
    GpuProcess,
    NoGpuDriverError,
    NvmlDriver,
    Xid,
)

ABSENT_S: Final = 60.0
"""A driver that is not installed is looked for so seldom: each look searches the whole library path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """
    What is known of the GPUs now.

    `gpus` is None while that is unknown, and `cause` then says why in one line. `asked` is when they were
    asked, on the caller's clock. `xids` are handed out once.
    """

    gpus: tuple[Gpu, ...] | None
    cause: str | None = None
    asked: float | None = None
    xids: tuple[Xid, ...] = ()


class Driver(Protocol):
    """What can be asked about GPUs; may block."""

    def look(self) -> GpuLook:
        """Ask everything once. Raises GpuError."""
        ...


class GpuSense:
    """The GPUs, by a driver that may block. Time is the caller's, in seconds."""

    def __init__(self, driver: Driver | None = None, *, timeout_s: float = 5.0) -> None:
        self._driver = driver or NvmlDriver()
        self._timeout_s = timeout_s
        self._questions: queue.Queue[bool] = queue.Queue(maxsize=1)
        self._answers: queue.Queue[GpuLook | GpuError] = queue.Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        self._asked: float | None = None
        self._not_before: float | None = None
        self._reading = GpuReading(gpus=None, cause="the GPUs were not asked yet")

    def poll(self, now: float) -> GpuReading:
        """Hand out the newest reading, and ask for the next one if none is under way; never waits."""
        xids: tuple[Xid, ...] = ()
        if self._asked is not None:
            try:
                answer = self._answers.get_nowait()
            except queue.Empty:
                waited_s = now - self._asked
                if waited_s > self._timeout_s:
                    cause = f"the GPU driver has not answered for {waited_s:.0f} s"
                    return GpuReading(gpus=None, cause=cause, asked=self._asked)
                return self._reading
            xids = self._take(answer)
        if self._not_before is None or now >= self._not_before:
            self._ask(now)
        return GpuReading(
            gpus=self._reading.gpus, cause=self._reading.cause, asked=self._reading.asked, xids=xids
        )

    def close(self) -> None:
        """Let the thread end once it comes back from the driver; it is not waited for."""
        if self._thread is not None and self._asked is None:
            self._questions.put_nowait(False)

    def _take(self, answer: GpuLook | GpuError) -> tuple[Xid, ...]:
        asked, self._asked = self._asked, None
        self._not_before = None
        if asked is not None and isinstance(answer, NoGpuDriverError):
            self._not_before = asked + ABSENT_S
        if isinstance(answer, GpuError):
            self._reading = GpuReading(gpus=None, cause=str(answer), asked=asked)
            return ()
        self._reading = GpuReading(gpus=answer.gpus, asked=asked)
        return answer.xids

    def _ask(self, now: float) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="gpu-driver", daemon=True)
            self._thread.start()
        self._asked = now
        self._questions.put_nowait(True)

    def _work(self) -> None:
        while self._questions.get():
            try:
                self._answers.put(self._driver.look())
            except GpuError as unknown:
                self._answers.put(unknown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A line through memory in use: its slope, how well it fits (0 to 1), and when it meets the total."""

    bytes_per_s: float
    fit: float
    full_in_s: float | None


def forecast(points: Sequence[tuple[float, int]], total_bytes: int) -> Forecast | None:
    """
    Fit a line by least squares through (seconds, bytes); None with fewer than three points, or all at one
    time.

    `full_in_s` counts from the last point, and is None while the use does not grow.
    """
    count = len(points)
    if count < 3:
        return None
    mean_t = sum(t for t, _ in points) / count
    mean_b = sum(b for _, b in points) / count
    spread_t = sum((t - mean_t) ** 2 for t, _ in points)
    spread_b = sum((b - mean_b) ** 2 for _, b in points)
    if spread_t <= 0:
        return None
    together = sum((t - mean_t) * (b - mean_b) for t, b in points)
    slope = together / spread_t
    fit = min(1.0, together**2 / (spread_t * spread_b)) if spread_b > 0 else 1.0
    at_end = mean_b + slope * (points[-1][0] - mean_t)
    full_in_s = max(0.0, (total_bytes - at_end) / slope) if slope > 0 else None
    return Forecast(bytes_per_s=slope, fit=fit, full_in_s=full_in_s)


class Headroom:
    """Watches the memory of one GPU over a window and warns before it is full."""

    def __init__(
        self, *, window_s: float = 600.0, points_max: int = 240, warn_within_s: float = 1800.0
    ) -> None:
        self._window_s = window_s
        self._warn_within_s = warn_within_s
        self._points: deque[tuple[float, int]] = deque(maxlen=points_max)

    def observe(self, now: float, gpu: Gpu) -> str | None:
        """
        Take one look; return a sentence when a steady growth over at least half of the window ends in a full
        GPU.

        Noise, a sawtooth and a pool that is allocated at once are no steady growth. A use that falls by a
        tenth begins a new window: the server was restarted, or let its memory go.
        """
        if gpu.used_bytes is None or not gpu.total_bytes:
            return None
        if self._points and gpu.used_bytes < 0.9 * self._points[-1][1]:
            self._points.clear()
        self._points.append((now, gpu.used_bytes))
        while self._points and now - self._points[0][0] > self._window_s:
            self._points.popleft()
        if now - self._points[0][0] < self._window_s / 2:
            return None
        line = forecast(list(self._points), gpu.total_bytes)
        if line is None or line.full_in_s is None or line.fit < 0.8 or line.full_in_s > self._warn_within_s:
            return None
        minutes = max(1, round(line.full_in_s / 60))
        used_percent = 100 * gpu.used_bytes / gpu.total_bytes
        return f"GPU {gpu.index}: memory is {used_percent:.0f} % full and will be full in {minutes} minutes"


def strangers(gpus: Collection[Gpu], own: Collection[int]) -> tuple[tuple[int, GpuProcess], ...]:
    """
    List, with the index of its GPU, each process that holds memory there and is not one of the run's own.

    These are orphaned schedulers, or other people's jobs: which of the two, `/proc` knows.
    """
    return tuple(
        (gpu.index, process) for gpu in gpus for process in gpu.processes or () if process.pid not in own
    )


def used_by(gpus: Collection[Gpu], pids: Collection[int]) -> int | None:
    """Add up what these processes hold on all GPUs; None where the driver does not say it for one of them."""
    held = [process.used_bytes for gpu in gpus for process in gpu.processes or () if process.pid in pids]
    if any(gpu.processes is None for gpu in gpus) or any(used is None for used in held):
        return None
    return sum(used for used in held if used is not None)
