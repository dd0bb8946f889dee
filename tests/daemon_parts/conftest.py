"""Real processes for the daemon's parts: small trees, and one embedded server for the session."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from grpo.server_process import ServerProcess, running
from stepguard_grpo.model import write_base_model
from stepguardd import proc

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    write_base_model(path, seed=0)
    return path


@pytest.fixture(scope="session")
def embedded(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running(base_model, tmp_path_factory.mktemp("server") / "server.log") as server:
        yield server.until_up()


@pytest.fixture
def http(embedded: ServerProcess) -> Iterator[httpx.Client]:
    with embedded.client() as client:
        yield client


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a shell script in a session of its own; every process of that session is gone at the end."""
    begun: list[subprocess.Popen[bytes]] = []

    def starter(script: str, **environment: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(["bash", "-c", script], start_new_session=True, env=os.environ | environment)
        begun.append(child)
        return child

    yield starter
    for child in begun:
        for known in proc.tree(child.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(known.pid, signal.SIGKILL)
        child.wait(timeout=10)


def until(holds: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Wait for the world; the time is a bound and no measurement."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)
