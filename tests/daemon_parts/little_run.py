"""A real run without servers: a daemon process, and under it a small trainer that it may start again."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from daemon_parts.own_daemons import OwnDaemons
from stepguardd import proc

TRAINER = Path(__file__).with_name("little_trainer.py")


class LittleRun(OwnDaemons):
    """A run whose trainer is the daemon's own to start."""

    def __init__(self, root: Path, *, in_place: bool, page: bool) -> None:
        self.checkpoints = root / "checkpoints"
        command = [sys.executable, str(TRAINER), str(root), *(["reload"] if in_place else [])]
        super().__init__(
            root,
            {
                "trainer": {"backend": "process", "command": command, "stop_timeout_s": 5}
                | {"relaunch_budget": 50, "relaunches_without_step": 20, "on_stop": "keep"},
                "recovery": {"backoff_first_s": 0.01, "backoff_max_s": 0.01},
                "checkpoints": {"dir": str(self.checkpoints), "proven_after_steps": 3},
                "web": {"enabled": page, "listen": "127.0.0.1:0"},
            },
        )

    def started(self) -> tuple[proc.Proc, ...]:
        return proc.marked("STEPGUARD_TRAINER", f"{self.root.name}@{self.state_dir}")

    def kill_trainer(self) -> None:
        (known,) = self.started()
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

    def story(self) -> str:
        log = self.state_dir / "trainer.log"
        return super().story() + ("\n" + log.read_text()[-2000:] if log.exists() else "")


@contextlib.contextmanager
def little_run(root: Path, *, in_place: bool, page: bool = False) -> Iterator[LittleRun]:
    """A run that leaves no process behind."""
    run = LittleRun(root, in_place=in_place, page=page)
    try:
        yield run
    finally:
        run.close()
