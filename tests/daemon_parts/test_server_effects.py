"""Starting and ending servers: once for an intent, all of the tree, a line that names who is in the way."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_parts.conftest import Start, until
from grpo.server_process import free_port
from stepguardd import proc
from stepguardd.config import ServerSettings
from stepguardd.core.events import Proc
from stepguardd.effects.backends import backend
from stepguardd.effects.backends.contract import port_of
from stepguardd.effects.backends.none import ObservedBackend
from stepguardd.effects.backends.process import ProcessBackend, program_missing
from stepguardd.effects.backends.systemd import SystemdBackend
from stepguardd.effects.processes import resume

LISTENER = (
    "import socket, sys, time, subprocess; "
    "child = subprocess.Popen(['sleep', '1000']); "
    "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); "
    "s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen(); time.sleep(1000)"
)


def settings(port: int, *command: str, **more: Any) -> ServerSettings:
    command = command or (sys.executable, "-c", LISTENER, str(port))
    return ServerSettings(
        url=f"http://127.0.0.1:{port}", command=list(command), **({"stop_timeout_s": 5.0} | more)
    )


class Owned:
    """A process backend for one test, with its server's output in a file."""

    def __init__(self, folder: Path, port: int, *command: str, **more: Any) -> None:
        self.log = folder / "server.log"
        self.port = port
        self.run = folder.name
        self.settings = settings(port, *command, **more)
        self.backend = ProcessBackend(self.run, self.settings, self.log)

    def another(self) -> ProcessBackend:
        """The back-end of a daemon that came later."""
        return ProcessBackend(self.run, self.settings, self.log)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Owned]:
    owned = Owned(tmp_path, free_port())
    yield owned
    left = proc.marked("STEPGUARD_SERVER", f"{tmp_path.name}/server")
    for known in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(known.pid, signal.SIGKILL)
    owned.backend._reap()
    until(lambda: not owned.backend._reap() and not owned.backend._children, "reaped")


def test_a_started_server_is_found_again_by_itself_and_by_another_daemon(own: Owned) -> None:
    outcome = asyncio.run(own.backend.start("1-start"))
    assert outcome.ok, outcome.detail
    until(lambda: len(own.backend.find()) == 2, "the tree")
    assert own.backend.find()[0] == outcome.procs[0]
    assert {known.pid for known in own.another().find()} == {known.pid for known in own.backend.find()}
    assert os.getsid(outcome.procs[0].pid) == outcome.procs[0].pid


def test_one_intent_starts_one_process_however_often_it_is_carried_out(own: Owned) -> None:
    first = asyncio.run(own.backend.start("1-start"))
    until(lambda: proc.port_taken(own.port), "it listens")
    again = asyncio.run(own.backend.start("1-start"))
    later = asyncio.run(own.another().start("1-start"))
    assert (again.ok, again.detail) == (True, "found running")
    assert later.procs[0].pid == again.procs[0].pid == first.procs[0].pid


def test_a_stop_ends_the_tree_and_frees_the_port(own: Owned) -> None:
    asyncio.run(own.backend.start("1-start"))
    until(lambda: len(own.backend.find()) == 2 and proc.port_taken(own.port), "it listens")
    tree = own.backend.find()
    outcome = asyncio.run(own.backend.stop(tree))
    assert outcome.ok, outcome.detail
    assert not any(proc.alive(known) for known in tree)
    assert not proc.port_taken(own.port)
    assert own.backend.find() == ()
    assert asyncio.run(own.backend.stop(tree)).ok  # and again, as after a crash of the daemon


def test_a_stop_ends_orphans_that_nobody_told_it_of(own: Owned) -> None:
    """The root is dead, its child adopted by init: found by its mark, and by its session."""
    asyncio.run(own.backend.start("1-start"))
    until(lambda: len(own.backend.find()) == 2, "the tree")
    tree = own.backend.find()
    os.kill(tree[0].pid, signal.SIGKILL)
    until(lambda: not proc.alive(tree[0]), "the root is dead")
    assert own.backend.find() == tree[1:]
    assert asyncio.run(own.another().stop(())).ok
    until(lambda: not proc.alive(tree[1]), "the orphan is gone")


def test_a_stop_ends_a_stopped_tree(own: Owned) -> None:
    asyncio.run(own.backend.start("1-start"))
    until(lambda: len(own.backend.find()) == 2, "the tree")
    tree = own.backend.find()
    for known in tree:
        os.kill(known.pid, signal.SIGSTOP)
    assert asyncio.run(own.backend.stop(tree)).ok
    assert not any(proc.alive(known) for known in tree)


def test_a_stop_of_pids_used_again_ends_nobody(own: Owned, start: Start) -> None:
    other = start("sleep 1000")
    found = proc.stat(other.pid)
    assert found is not None
    older = Proc(pid=other.pid, start_ticks=found.start_ticks - 1, role="server")
    assert asyncio.run(own.backend.stop((older,))).ok
    assert other.poll() is None


def test_a_process_that_appears_while_the_tree_ends_is_ended_too(tmp_path: Path) -> None:
    port = free_port()
    script = "trap 'setsid sleep 1000 & exit 0' TERM; sleep 1000 & wait"
    owned = Owned(tmp_path, port, "bash", "-c", script)
    asyncio.run(owned.backend.start("1-start"))
    until(lambda: len(owned.backend.find()) == 2, "the tree")
    assert asyncio.run(owned.backend.stop(owned.backend.find())).ok
    assert proc.marked("STEPGUARD_SERVER", f"{tmp_path.name}/server") == ()


def test_a_port_that_somebody_else_holds_is_told_with_the_pid(own: Owned) -> None:
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", own.port))
        stranger.listen()
        outcome = asyncio.run(own.backend.start("1-start"))
        assert not outcome.ok
        assert outcome.detail.startswith(f"port {own.port} is held by pid {os.getpid()};")
        assert "\n" not in outcome.detail
        assert own.backend.blocked() == outcome.detail
    assert own.backend.blocked() is None
    assert proc.marked("STEPGUARD_SERVER", f"{own.run}/server") == ()


def test_the_servers_own_port_does_not_block_it(own: Owned) -> None:
    asyncio.run(own.backend.start("1-start"))
    until(lambda: proc.port_taken(own.port), "it listens")
    assert own.another().blocked() is None


def test_a_program_that_ends_at_once_is_told_with_its_code_and_its_log(tmp_path: Path) -> None:
    owned = Owned(tmp_path, free_port(), "bash", "-c", "echo no model there; exit 3")
    outcome = asyncio.run(owned.backend.start("1-start"))
    assert not outcome.ok
    assert outcome.detail == f"it exited at once with code 3; its log is {owned.log}"
    assert owned.log.read_text() == "no model there\n"


def test_a_program_that_is_missing_is_named_before_and_at_the_start(tmp_path: Path) -> None:
    owned = Owned(tmp_path, free_port(), "/nowhere/sglang", "serve")
    assert (
        program_missing(owned.settings)
        == "servers.command: /nowhere/sglang is not found or cannot be executed"
    )
    outcome = asyncio.run(owned.backend.start("1-start"))
    assert not outcome.ok
    assert outcome.detail.startswith("cannot start /nowhere/sglang: No such file or directory")


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    found = program_missing(settings(1234, "bash", cwd=str(tmp_path / "nowhere")))
    assert found == f"servers.cwd: {tmp_path}/nowhere is no folder"
    (tmp_path / "serve").write_text("#!/bin/sh\n")
    assert program_missing(settings(1234, "./serve", cwd=str(tmp_path))) is not None
    (tmp_path / "serve").chmod(0o755)
    assert program_missing(settings(1234, "./serve", cwd=str(tmp_path))) is None


def test_the_servers_environment_is_its_own_and_has_no_dumps_before_a_crash(tmp_path: Path) -> None:
    owned = Owned(
        tmp_path, free_port(), "bash", "-c", "env; sleep 1000", env={"STEPGUARD_TEST_SECRET": "hunter2"}
    )
    try:
        asyncio.run(owned.backend.start("4-start"))
        until(lambda: "hunter2" in owned.log.read_text(), "its environment")
        text = owned.log.read_text().splitlines()
        assert "SGLANG_PYSPY_DUMP_BEFORE_CRASH=0" in text
        assert f"STEPGUARD_INTENT={tmp_path.name}/server/4-start" in text
    finally:
        assert asyncio.run(owned.backend.stop(owned.backend.find())).ok


def test_a_log_that_grew_large_is_kept_once(tmp_path: Path) -> None:
    owned = Owned(tmp_path, free_port(), "bash", "-c", "echo new; exit 1")
    with owned.log.open("wb") as file:
        file.truncate(65 << 20)
    asyncio.run(owned.backend.start("1-start"))
    assert owned.log.read_text() == "new\n"
    assert (tmp_path / "server.log.1").stat().st_size == 65 << 20


def test_a_stopped_process_is_woken(start: Start) -> None:
    child = start("sleep 1000")
    tree = proc.tree(child.pid)
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: proc.stat(child.pid).stopped, "stopped")  # type: ignore[union-attr]
    outcome = asyncio.run(resume(tree))
    assert outcome.ok
    until(lambda: not proc.stat(child.pid).stopped, "awake")  # type: ignore[union-attr]
    child.kill()
    child.wait()
    assert not asyncio.run(resume(tree)).ok


# ---- only observed ---------------------------------------------------------------------------------


def test_an_observed_server_is_found_by_its_port_and_again_when_another_takes_it(start: Start) -> None:
    port = free_port()
    watching = ObservedBackend(ServerSettings(url=f"http://127.0.0.1:{port}", backend="none"))
    assert watching.find() == ()
    listen = f'exec {sys.executable} -c "{LISTENER}" {port}'
    first = start(listen)
    until(lambda: len(watching.find()) == 2, "found")
    assert watching.find()[0].pid == first.pid
    for known in watching.find():
        os.kill(known.pid, signal.SIGKILL)
    first.wait()
    assert watching.find() == ()
    second = start(listen)
    until(lambda: len(watching.find()) == 2, "found again")
    assert watching.find()[0].pid == second.pid


def test_an_observed_server_is_neither_started_nor_ended() -> None:
    watching = ObservedBackend(ServerSettings(url="http://127.0.0.1:1", backend="none"))
    assert not asyncio.run(watching.start("1-start")).ok
    assert not asyncio.run(watching.stop(())).ok


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://127.0.0.1:30000", 30000),
        ("http://localhost:1", 1),
        ("http://[::1]:5", 5),
        ("http://127.0.0.1", 80),
        ("https://localhost", 443),
        ("http://10.0.0.7:30000", None),
    ],
)
def test_a_port_is_looked_at_on_this_machine_alone(url: str, port: int | None) -> None:
    assert port_of(url) == port


# ---- systemd ---------------------------------------------------------------------------------------

SYSTEMCTL = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
echo "$@" >> {folder}/calls
case "$1" in
  show) cat {folder}/pid 2>/dev/null || echo 0 ;;
  start) [ -e {folder}/refuse ] && {{ echo "Failed to start it: Access denied" >&2; exit 4; }}
         [ -e {folder}/pid ] && kill -0 "$(cat {folder}/pid)" 2>/dev/null && exit 0
         setsid sleep 1000 >/dev/null 2>&1 </dev/null & echo $! > {folder}/pid ;;
  stop) [ -e {folder}/refuse ] && {{ echo "Failed to stop it: Access denied" >&2; exit 4; }}
        kill -9 "$(cat {folder}/pid)" 2>/dev/null; rm -f {folder}/pid; exit 0 ;;
  *) exit 0 ;;
esac
"""


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[SystemdBackend]:
    command = tmp_path / "systemctl"
    command.write_text(SYSTEMCTL.format(folder=tmp_path))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    given = ServerSettings(url="http://127.0.0.1:1", backend="systemd", unit="sglang.service")
    yield SystemdBackend(given, systemctl=(str(command),), runtime=tmp_path / "run")
    subprocess.run([str(command), "stop"], check=False, timeout=10)


def test_a_unit_is_started_found_and_stopped(unit: SystemdBackend, tmp_path: Path) -> None:
    assert unit.find() == ()
    first = asyncio.run(unit.start("1-start"))
    assert first.ok, first.detail
    pid = int((tmp_path / "pid").read_text())
    assert [known.pid for known in first.procs] == [pid]
    again = asyncio.run(unit.start("1-start"))
    assert again.procs[0].pid == pid
    assert asyncio.run(unit.stop(first.procs)).ok
    until(lambda: not proc.alive(first.procs[0]), "gone")
    assert unit.find() == ()
    assert all(line.endswith("sglang.service") for line in (tmp_path / "calls").read_text().splitlines()[:-1])


def test_a_unit_that_may_not_be_touched_says_why(unit: SystemdBackend, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    for outcome in (asyncio.run(unit.start("1-start")), asyncio.run(unit.stop(()))):
        assert not outcome.ok
        assert "Access denied" in outcome.detail
        assert "sglang.service" in outcome.detail


def test_what_a_units_stop_leaves_is_ended(unit: SystemdBackend, start: Start) -> None:
    left = start("sleep 1000")
    until(lambda: proc.tree(left.pid), "running")
    assert asyncio.run(unit.stop(proc.tree(left.pid))).ok
    left.wait(timeout=10)


def test_a_machine_without_systemctl_says_so() -> None:
    given = ServerSettings(url="http://127.0.0.1:1", backend="systemd", unit="sglang.service")
    missing = SystemdBackend(given, systemctl=("/nowhere/systemctl",))
    assert missing.find() == ()
    outcome = asyncio.run(missing.start("1-start"))
    assert (outcome.ok, outcome.detail) == (False, "cannot run /nowhere/systemctl: No such file or directory")


def test_each_backend_is_the_one_that_the_config_names(tmp_path: Path) -> None:
    url = "http://127.0.0.1:1"
    given = {
        "process": {"command": ["true"]},
        "systemd": {"unit": "a.service"},
        "docker": {"container": "a"},
        "ray": {"actor": "a"},
        "http": {"hook": "http://127.0.0.1:1/restart"},
        "trainer": {},
        "none": {},
    }
    kinds = {
        name: type(backend("r", ServerSettings(url=url, backend=name, **keys), tmp_path)).__name__  # type: ignore[arg-type]
        for name, keys in given.items()
    }
    assert list(kinds.values()) == [
        *("ProcessBackend", "SystemdBackend", "DockerBackend", "RayBackend", "HookBackend"),
        *("TrainerBackend", "ObservedBackend"),
    ]
