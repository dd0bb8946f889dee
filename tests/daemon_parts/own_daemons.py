"""A run of a test's own: its folders, its config, the daemons started for it, and what they say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepguard.gate import GateError, GatePage
from stepguardd import proc
from stepguardd.control.client import ControlClient, ControlError, NoDaemonError

SIGKILLED = -signal.SIGKILL


class OwnDaemons:
    """
    Daemons of one run, one after the other.

    A subclass says which processes are the run's beside them, and when a daemon has taken the run up.
    """

    def __init__(self, root: Path, tables: Mapping[str, Mapping[str, object]]) -> None:
        self.root, self.run_dir, self.state_dir = root, root / "run", root / "state"
        self.log, self.config = root / "daemon.log", root / "config.toml"
        places = {"name": root.name, "mode": "act"}
        places |= {"run_dir": str(self.run_dir), "state_dir": str(self.state_dir)}
        text = ""
        for table, values in {**tables, "run": {**places, **tables.get("run", {})}}.items():
            text += f"[{table}]\n" + "".join(f"{key} = {json.dumps(v)}\n" for key, v in values.items())
        self.config.write_text(text)
        self.daemons: list[subprocess.Popen[bytes]] = []

    def started(self) -> tuple[proc.Proc, ...]:
        """The processes that the daemons started and that live."""
        raise NotImplementedError

    def taken_up(self) -> object:
        """Whether the newest daemon has the run in hand."""
        return self.status()

    def command(self) -> list[str]:
        """What starts a daemon of this run."""
        return [sys.executable, "-m", "stepguardd", "run", "--config", str(self.config)]

    def environment(self) -> dict[str, str]:
        """What a daemon of this run finds in its environment."""
        return {key: value for key, value in os.environ.items() if key != "STEPGUARD_CRASH_AT"}

    def daemon(self, crash_at: str | None = None) -> subprocess.Popen[bytes]:
        """Start a daemon; with a point at which it kills itself."""
        environment = self.environment()
        if crash_at is not None:
            environment["STEPGUARD_CRASH_AT"] = crash_at
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self.daemons.append(child)
        return child

    def replace_daemon(self, crash_at: str | None = None) -> None:
        """End the daemon in an orderly way, and have another take up the run that goes on."""
        self.daemons[-1].terminate()
        assert self.daemons[-1].wait(timeout=20) == 0, self.story()
        self.daemon(crash_at)
        self.until(self.taken_up, "another daemon takes up the run")

    def crashed(self, point: str, timeout_s: float = 120.0) -> None:
        """The fault fired: this daemon was killed by its own hand, and nothing else ended it."""
        daemon = self.daemons[-1]
        self.until(lambda: daemon.poll() is not None, f"the daemon dies at {point}", timeout_s)
        assert daemon.returncode == SIGKILLED, (point, daemon.returncode, self.story())

    def status(self) -> dict[str, Any]:
        """What the daemon says of itself; {} while nobody answers."""
        try:
            with ControlClient(self.run_dir / "control.sock") as client:
                return dict(client.status())
        except (NoDaemonError, ControlError):
            return {}

    def ask(self, verb: Any, **args: object) -> None:
        with ControlClient(self.run_dir / "control.sock") as client:
            client.ask(verb, "a test", args)

    def order(self) -> str:
        """The order on the page, as the trainer sees it; "" where no living daemon stands behind it."""
        try:
            page = GatePage.open(self.run_dir / "gate", writable=False)
        except GateError:
            return ""
        with contextlib.closing(page):
            half = page.daemon()
        return "" if half is None or half.lease_deadline_ns < time.monotonic_ns() else half.order.name

    def until(self, holds: Callable[[], object], what: str, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"not in time: {what}\n{self.story()}"
            time.sleep(0.03)

    def story(self) -> str:
        """What the daemon logged and says, for a failing test."""
        return f"{self.status()}\n{self.log.read_text()[-6000:]}"

    def close(self) -> None:
        """End the daemons, then what they had started."""
        for daemon in self.daemons:
            if daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait(timeout=10)
        for known in self.started():
            with contextlib.suppress(ProcessLookupError):
                os.kill(known.pid, signal.SIGKILL)
