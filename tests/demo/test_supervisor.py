"""The demo's stand-in for somebody else's supervisor leaves nothing behind, whoever has adopted it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stepguardd import proc
from stepguardd.core.events import Proc
from stepguardd.demo.supervisor import Supervisor, end_trees

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

# A server in the middle of its start: its child is deaf to SIGTERM, as multiprocessing's resource tracker is.
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
SERVER = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {DEAF!r}], stdout=subprocess.PIPE)
child.stdout.readline()
with pathlib.Path(sys.argv[1]).open("a") as children:
    children.write(f"{{child.pid}}\\n")
time.sleep(600)
"""


@pytest.fixture
def children(tmp_path: Path) -> Path:
    """Where each start of the server writes its child's pid."""
    return tmp_path / "children"


@pytest.fixture
def supervisor(children: Path) -> Iterator[Supervisor]:
    command = [sys.executable, "-c", SERVER, str(children)]
    running = Supervisor(command, children.with_name("log"), restart=True)
    running.start()
    yield running
    running.stop()


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def child(children: Path, number: int) -> Proc:
    """The child of the server's start of this number, once it is deaf."""
    until(lambda: children.exists() and len(children.read_text().splitlines()) >= number)
    found = proc.stat(int(children.read_text().splitlines()[number - 1]))
    assert found is not None
    return Proc(pid=found.pid, start_ticks=found.start_ticks, role="child")


def test_a_stop_ends_what_is_deaf_to_sigterm_and_outlives_the_server(
    supervisor: Supervisor, children: Path
) -> None:
    server, deaf = supervisor.pid, child(children, 1)
    assert server is not None
    assert {known.pid for known in proc.tree(server)} == {server, deaf.pid}
    supervisor.stop()
    assert proc.tree(server) == ()
    assert supervisor.pid is None
    supervisor.stop()


def test_a_stop_ends_the_orphans_of_a_server_that_died_before(supervisor: Supervisor, children: Path) -> None:
    """Its parent was killed, and the supervisor has started another: both trees are its own to end."""
    server, orphan = supervisor.pid, child(children, 1)
    assert server is not None
    os.kill(server, signal.SIGKILL)
    second = child(children, 2)
    left = proc.stat(orphan.pid)
    assert left is not None
    assert proc.alive(orphan), "nobody was orphaned"
    assert left.ppid != server
    assert supervisor.starts == 2
    supervisor.stop()
    assert not proc.alive(orphan)
    assert not proc.alive(second)


def test_a_pid_that_is_somebody_elses_by_now_is_left_alone() -> None:
    stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        found = proc.stat(stranger.pid)
        assert found is not None
        end_trees([Proc(pid=found.pid, start_ticks=found.start_ticks - 1, role="server")])
        assert stranger.poll() is None
        end_trees([Proc(pid=found.pid, start_ticks=found.start_ticks, role="server")])
        assert stranger.wait(timeout=10) != 0
    finally:
        stranger.kill()
        stranger.wait(timeout=10)
