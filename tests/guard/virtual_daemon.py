"""A clock that moves when someone waits, and a daemon that lives by it: what the guard's tests talk to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepguard.gate import DaemonHalf, GatePage, Order
from stepguard.guard import Guard
from stepguard.reports import REPORT_BYTES_MAX, parse_report

BOOT = bytes(range(16))
LEASE_S = 5.0


class VirtualTime:
    """Monotonic time in ns; `sleep` advances it and runs what is due."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000_000
        self.slept = 0
        self.on_tick: list[Callable[[], None]] = []
        self._due: list[tuple[int, Callable[[], None]]] = []

    def now(self) -> int:
        return self.ns

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        self._due.append((self.ns + int(seconds * 1e9), act))

    def sleep(self, seconds: float) -> None:
        self.slept += 1
        assert self.slept < 200_000, "waits without end"
        self.ns += max(1, int(seconds * 1e9))
        while self._due and min(self._due, key=lambda due: due[0])[0] <= self.ns:
            first = min(self._due, key=lambda due: due[0])
            self._due.remove(first)
            first[1]()
        for tick in list(self.on_tick):
            tick()

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)
        await asyncio.sleep(0)


class VirtualDaemon:
    """
    Renews its lease and judges batches whenever time passes.

    Args:
        run_dir: where page and socket go.
        time: the clock.
        judge: batch report -> None for yes, or a reason; None as a whole: never judges.

    """

    def __init__(
        self,
        run_dir: Path,
        time: VirtualTime,
        judge: Callable[[dict[str, Any]], str | None] | None = lambda batch: None,
        generation: int = 0,
        listens: bool = True,
        boot_id: bytes | None = BOOT,
    ) -> None:
        self.run_dir = run_dir
        self.time = time
        self.judge = judge
        self.alive = True
        self.generation = generation
        self.reports: list[dict[str, Any]] = []
        self.page = GatePage.create(run_dir / "gate", boot_id=boot_id)
        self.half = self.page.daemon()
        self._socket: socket.socket | None = None
        if listens:
            self.listen()
        if self.half is None:
            self.order(Order.GO, "start")
        else:
            self.generation = self.half.generation
            self.tick()
        time.on_tick.append(self.tick)

    def listen(self) -> None:
        path = self.run_dir / "reports.sock"
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))

    def order(self, order: Order, reason: str = "", **more: Any) -> None:
        self.generation += 1
        judged = (
            {}
            if self.half is None
            else {"judged_batch": self.half.judged_batch, "judged_ok": self.half.judged_ok}
        )
        self.half = DaemonHalf(
            order=order,
            generation=self.generation,
            reason=reason,
            lease_deadline_ns=self.time.ns + int(LEASE_S * 1e9),
            **(judged | more),
        )
        self.page.publish(self.half)

    def tick(self) -> None:
        if not self.alive:
            return
        self.read()
        assert self.half is not None
        self.page.renew_lease(self.time.ns + int(LEASE_S * 1e9))

    def read(self) -> None:
        while self._socket is not None:
            try:
                report: dict[str, Any] = dict(parse_report(self._socket.recv(REPORT_BYTES_MAX + 1)))
            except BlockingIOError:
                return
            self.reports.append(report)
            if report["kind"] == "batch" and self.judge is not None:
                assert self.half is not None
                reason = self.judge(report)
                order = Order.GO if reason is None else Order.HOLD
                if reason is None and self.half.order is not Order.GO:
                    order = self.half.order
                more: dict[str, Any] = {
                    "judged_batch": report["batch"],
                    "judged_step": report["step"],
                    "judged_ok": reason is None,
                }
                if order is self.half.order and reason is None:
                    self.generation -= 1  # a verdict is no new order
                    more |= {"target_step": self.half.target_step, "target_path": self.half.target_path}
                self.order(order, reason or self.half.reason, **more)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        self.read()
        return [report for report in self.reports if report["kind"] == kind]

    def die(self) -> None:
        """As by SIGKILL: the page stays, the socket refuses."""
        self.alive = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        self.die()
        with contextlib.suppress(ValueError):
            self.time.on_tick.remove(self.tick)
        self.page.close()


def virtual_guard(run_dir: Path | None, time: VirtualTime, **more: Any) -> Guard:
    options: dict[str, Any] = {
        "clock_ns": time.now,
        "sleep": time.sleep,
        "async_sleep": time.sleep_async,
        "heartbeat_s": None,
        "boot_id": BOOT,
    }
    return Guard(run_dir, **(options | more))
