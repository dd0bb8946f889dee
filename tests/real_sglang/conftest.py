"""One real SGLang server for the folder's contract tests; where SGLang is not installed, the reason."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from requirements import require
from stepguard_grpo.model import write_base_model
from stepguardd import proc
from stepguardd.demo.servers import ServerMissingError, ServerProgram, sglang, sglang_venv

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts servers of its own goes before the one that stays, so that there are never two."""
    ours = [item for item in items if item.path.parent == HERE]
    last = {item for item in ours if "server_url" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item in last)


@pytest.fixture(scope="session")
def program() -> ServerProgram:
    """How the real server is started."""
    try:
        return sglang(sglang_venv())
    except ServerMissingError as missing:
        require("sglang", str(missing))


@pytest.fixture(scope="package")
def server_url(program: ServerProgram, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server on the demo's base model; its whole tree is gone at the end."""
    folder = tmp_path_factory.mktemp("sglang")
    write_base_model(folder / "base", seed=0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = folder / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            program.command(folder / "base", port),
            env=os.environ | dict(program.environment) | {"SGLANG_HEALTH_CHECK_TIMEOUT": "6"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _until_up(server, port, log, program.start_timeout_s)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(server)


@pytest.fixture
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=30, trust_env=False) as client:
        yield client


def _until_up(server: subprocess.Popen[bytes], port: int, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while "fired up and ready to roll" not in log.read_text(errors="replace"):
        assert server.poll() is None, log.read_text(errors="replace")[-4000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
        time.sleep(0.2)


def _end(server: subprocess.Popen[bytes]) -> None:
    """Its children outlive it by less than half a second, by themselves."""
    tree = proc.tree(server.pid)
    if server.poll() is None:
        server.send_signal(signal.SIGKILL)
    server.wait(10)
    deadline = time.monotonic() + 10
    while any(proc.alive(known) for known in tree):
        assert time.monotonic() < deadline, f"left behind: {tree}"
        time.sleep(0.1)
