"""
A container by hand: what an engine makes of a command, with the kernel's own means and no engine.

The command is process 1 of its own namespaces. It sees no process of the host, no kernel log and no systemd;
the network and the Python installation are the host's. All of it ends with the process that is started here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stepguardd.control.client import ControlClient, ControlError, NoDaemonError

VOLUME = Path("/run/volume")
"""Where the container sees the folder that it shares with the host."""

_NAMESPACES = "-fpmui"
_SCRIPT = Path(__file__).with_name("container.sh")
_PROGRAMS = ("unshare", "nsenter", "setpriv", "mount")
_LIMIT_S = 120.0


def why_not() -> str | None:
    """Why there can be no container here; None where there can."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces and mounts"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (see .ci/packages)"
    tried = subprocess.run(
        [
            "unshare",
            _NAMESPACES,
            "--mount-proc",
            "--kill-child=KILL",
            "mount",
            "-t",
            "tmpfs",
            "tmpfs",
            "/mnt",
        ],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return None if tried.returncode == 0 else f"no namespaces or mounts here: {tried.stderr.strip()}"


class Container:
    """
    One that runs.

    Args:
        volume: the folder of the host that it sees as `VOLUME`.
        command: its process 1.
        log: where stdout and stderr go.

    """

    def __init__(self, volume: Path, command: Sequence[str], log: Path) -> None:
        self._log = log
        words = ["setpriv", "--pdeathsig", "KILL"]  # were this process killed, all of it would end as well
        words += ["unshare", _NAMESPACES, "--mount-proc", "--kill-child=KILL", str(_SCRIPT), str(volume)]
        with log.open("wb") as out:
            self.outer = subprocess.Popen(
                [*words, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )

    @property
    def init(self) -> int | None:
        """Its process 1, as the host numbers it; None before it began and after it ended."""
        try:
            children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def run(self, *command: str) -> None:
        """A command inside, which has to succeed."""
        done = self.asked(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}\n{self.story()}"

    def asked(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command inside, whatever comes of it."""
        return subprocess.run(
            ["nsenter", "-t", str(self.init), "-m", "-p", "-u", "-i", *command],
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
            check=False,
        )

    def path(self, inside: Path | str) -> Path:
        """A file of the inside, as the host sees it."""
        return Path(f"/proc/{self.init}/root{inside}")

    def status(self, run_dir: Path) -> dict[str, Any]:
        """What its daemon says of itself; {} while nobody answers."""
        try:
            with ControlClient(self.path(run_dir) / "control.sock") as client:
                return dict(client.status())
        except (NoDaemonError, ControlError):
            return {}

    def until(self, holds: Callable[[], object], what: str, timeout_s: float = _LIMIT_S) -> None:
        """Wait for it; what the container said is told where it does not come."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert self.outer.poll() is None, f"it ended before: {what}\n{self.story()}"
            assert time.monotonic() < deadline, f"not in time: {what}\n{self.story()}"
            time.sleep(0.05)

    def story(self) -> str:
        """The end of what it said."""
        return self._log.read_text(errors="replace")[-6000:]

    def close(self) -> None:
        """End it, and all that runs in it."""
        self.outer.kill()
        self.outer.wait(timeout=20)


@contextlib.contextmanager
def container(volume: Path, command: Sequence[str], log: Path) -> Iterator[Container]:
    """One that is gone when the block is left."""
    running = Container(volume, command, log)
    try:
        yield running
    finally:
        running.close()
