"""The embedded server as a process of its own, for tests: started, found, signalled, and gone at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

START_TIMEOUT_S = 30.0
SCHEDULER = "stepguard_grpo::scheduler"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """One server; the caller waits for what it needs."""

    def __init__(
        self, model: Path, log: Path, *flags: str, port: int | None = None, **environment: str
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        command = [sys.executable, "-m", "stepguard_grpo.server", "--model-path", str(model)]
        command += ["--port", str(self.port), *flags]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def until_up(self) -> ServerProcess:
        """Wait until the ready line is there."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while "ready to roll" not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        return self

    def scheduler(self) -> psutil.Process:
        """The process that owns the model, found as a watchdog would: by its command line."""
        found = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if SCHEDULER in child.cmdline()
        ]
        assert len(found) == 1, found
        return found[0]

    def until_scheduler(self) -> psutil.Process:
        """The scheduler as soon as there is one."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(AssertionError, psutil.NoSuchProcess):
                return self.scheduler()
            time.sleep(0.005)
        raise AssertionError(f"no scheduler appeared: {self.log}")

    def exit_code(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout=timeout_s)

    def client(self, timeout_s: float = 10.0) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=False)


@contextlib.contextmanager
def running(
    model: Path, log: Path, *flags: str, port: int | None = None, **environment: str
) -> Iterator[ServerProcess]:
    """A server that is gone, with all its children, when the block is left."""
    server = ServerProcess(model, log, *flags, port=port, **environment)
    try:
        yield server
    finally:
        children = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(server.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(timeout=10)
        _, alive = psutil.wait_procs(children, timeout=10)
        for child in alive:
            child.kill()
        assert not alive, f"left behind: {alive}"
