"""A real run without servers: a daemon process, and under it a small trainer that it may start again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stepguard.gate import GateError, GatePage
from stepguardd import proc
from stepguardd.control.client import ControlClient, ControlError, NoDaemonError

TRAINER = Path(__file__).with_name("little_trainer.py")
SIGKILLED = -signal.SIGKILL


class LittleRun:
    """The run's folders, its config, and the daemons that are started for it."""

    def __init__(self, root: Path, *, in_place: bool) -> None:
        self.root, self.run_dir, self.state_dir = root, root / "run", root / "state"
        self.checkpoints = root / "checkpoints"
        self.log = root / "daemon.log"
        command = [sys.executable, str(TRAINER), str(root), *(["reload"] if in_place else [])]
        tables: dict[str, dict[str, object]] = {
            "run": {"name": root.name, "mode": "act", "run_dir": str(self.run_dir)}
            | {"state_dir": str(self.state_dir)},
            "trainer": {"backend": "process", "command": command, "stop_timeout_s": 5}
            | {"relaunch_budget": 50, "relaunches_without_step": 20, "on_stop": "keep"},
            "recovery": {"backoff_first_s": 0.01, "backoff_max_s": 0.01},
            "checkpoints": {"dir": str(self.checkpoints), "proven_after_steps": 3},
            "web": {"enabled": False},
        }
        text = ""
        for name, values in tables.items():
            text += f"[{name}]\n" + "".join(f"{key} = {json.dumps(v)}\n" for key, v in values.items())
        self.config = root / "config.toml"
        self.config.write_text(text)
        self.daemons: list[subprocess.Popen[bytes]] = []

    def daemon(self, crash_at: str | None = None) -> subprocess.Popen[bytes]:
        """Start a daemon; with a point at which it kills itself."""
        environment = {k: v for k, v in os.environ.items() if k != "STEPGUARD_CRASH_AT"}
        if crash_at is not None:
            environment["STEPGUARD_CRASH_AT"] = crash_at
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "stepguardd", "run", "--config", str(self.config)],
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
        self.until(self.status, "another daemon takes up the run")

    def crashed(self, point: str) -> None:
        """The fault fired: this daemon was killed by its own hand, and nothing else ended it."""
        daemon = self.daemons[-1]
        self.until(lambda: daemon.poll() is not None, f"the daemon dies at {point}")
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
        """The order on the page; "" where no living daemon stands behind it."""
        try:
            page = GatePage.open(self.run_dir / "gate", writable=False)
        except GateError:
            return ""
        with contextlib.closing(page):
            half = page.daemon()
        return "" if half is None or half.lease_deadline_ns < time.monotonic_ns() else half.order.name

    def trainer(self) -> tuple[proc.Proc, ...]:
        return proc.marked("STEPGUARD_TRAINER", f"{self.root.name}@{self.state_dir}")

    def kill_trainer(self) -> None:
        (known,) = self.trainer()
        os.kill(known.pid, signal.SIGKILL)

    def starts(self) -> list[str]:
        """The intents under which trainer processes were really started."""
        file = self.root / "trainer_starts"
        return file.read_text().split() if file.exists() else []

    def steps(self) -> list[tuple[int, int]]:
        """Every step that was committed: (attempt, step)."""
        file = self.root / "steps"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(int(a), int(b)) for a, _, b in (line.partition(" ") for line in lines)]

    def proven(self) -> list[int]:
        return [row["step"] for row in self.status().get("checkpoints", []) if row["proven"]]

    def goes_on(self, what: str) -> None:
        """GO is on the page, and steps are taken."""
        before = len(self.steps())
        self.until(lambda: self.order() == "GO" and len(self.steps()) >= before + 2, what)

    def until(self, holds: Callable[[], object], what: str, timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"not in time: {what}\n{self.story()}"
            time.sleep(0.03)

    def story(self) -> str:
        log = self.state_dir / "trainer.log"
        said = log.read_text()[-2000:] if log.exists() else ""
        return f"{self.status()}\n{self.log.read_text()[-6000:]}\n{said}"

    def close(self) -> None:
        for daemon in self.daemons:
            if daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait(timeout=10)
        for known in self.trainer():
            with contextlib.suppress(ProcessLookupError):
                os.kill(known.pid, signal.SIGKILL)


@contextlib.contextmanager
def little_run(root: Path, *, in_place: bool) -> Iterator[LittleRun]:
    """A run that leaves no process behind."""
    run = LittleRun(root, in_place=in_place)
    try:
        yield run
    finally:
        run.close()
