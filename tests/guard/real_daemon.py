"""The virtual daemon by the machine's clock, in a thread: for trainers that are processes of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guard.virtual_daemon import BOOT, VirtualDaemon, VirtualTime


class RealTime(VirtualTime):
    """The machine's clock, which nobody turns."""

    @property
    def ns(self) -> int:
        return time.monotonic_ns()

    @ns.setter
    def ns(self, value: int) -> None:
        """Where the virtual clock would be turned."""

    def now(self) -> int:
        return self.ns


class RealDaemon(VirtualDaemon):
    """
    Judges and answers by itself.

    Args:
        run_dir: for gate and socket.
        boot_id: None: the kernel's, for guards made by `Guard.from_env`.

    """

    def __init__(self, run_dir: Path, boot_id: bytes | None = BOOT) -> None:
        self.on_report: Callable[[dict[str, Any]], None] = lambda report: None
        self._seen = 0
        self._over = threading.Event()
        super().__init__(run_dir, RealTime(), boot_id=boot_id)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Stop, with every report read."""
        self._over.set()
        self._thread.join(30)
        self.read()

    def close(self) -> None:
        self.settle()
        super().close()

    def _serve(self) -> None:
        while not self._over.wait(0.002):
            self.tick()
            for report in self.reports[self._seen :]:
                self._seen += 1
                self.on_report(report)
