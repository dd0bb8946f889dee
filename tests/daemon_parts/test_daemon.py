"""The daemon as a process: what it refuses to start on, how it ends, and what it leaves behind."""

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from daemon_parts.small_run import small_run, training
from grpo.server_process import free_port
from stepguard.gate import GatePage
from stepguardd import clock, proc
from stepguardd.config import load_config
from stepguardd.core.events import OperatorAsked, Tick
from stepguardd.core.invariants import InvariantError
from stepguardd.core.state import Mode
from stepguardd.daemon import Daemon, DaemonError
from stepguardd.journal import Journal


def config_file(root: Path, server: dict[str, Any] | None = None, **run: Any) -> Path:
    """A config of a run in this folder; without a server there is nothing to start."""
    tables = {"run": {"run_dir": str(root / "run"), "state_dir": str(root / "state")} | run}
    if server is not None:
        tables["server"] = server
    text = ""
    for table, values in tables.items():
        text += f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    path = root / "config.toml"
    path.write_text(text)
    return path


def refused(path: Path) -> str:
    """The line with which a daemon refuses to start; it must be one, and leave nothing half-started."""
    daemon = Daemon(load_config(path))
    with pytest.raises(DaemonError) as caught:
        asyncio.run(daemon.run())
    said = str(caught.value)
    assert "\n" not in said
    return said


def lived(path: Path, act: Any = lambda daemon: None) -> Daemon:
    """A daemon that is up, does something, and is told to end."""
    daemon = Daemon(load_config(path))

    async def live() -> None:
        def ready() -> None:
            act(daemon)
            daemon.stop()

        async with asyncio.timeout(20):
            await daemon.run(ready=ready)

    asyncio.run(live())
    return daemon


# ---- what it refuses -------------------------------------------------------------------------------


def test_a_second_daemon_on_a_run_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    said: list[str] = []

    def second(daemon: Daemon) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "stepguardd", "run", "--config", str(path)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        said.extend([str(done.returncode), done.stderr.strip(), done.stdout])

    daemon = lived(path, second)
    assert said[0] == "2"
    assert said[1].splitlines()[-1].endswith("see `stepguard status`, or give this one another run.name")
    assert len(said[1].splitlines()) == 1
    assert said[2] == ""
    assert daemon.journal.lost_rows == 0


def test_a_second_daemon_on_a_run_dir_is_refused_whatever_its_state_dir(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    (tmp_path / "other").mkdir()
    other = config_file(tmp_path / "other", run_dir=str(tmp_path / "run"))

    def second(daemon: Daemon) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "stepguardd", "run", "--config", str(other)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert "another daemon watches this run already" in done.stderr
        assert (tmp_path / "run" / "reports.sock").exists()

    lived(path, second)


def test_a_journal_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    lived(path)
    with closing(sqlite3.connect(tmp_path / "state" / "journal.db")) as db, db:
        db.execute("UPDATE meta SET value = '2' WHERE key = 'version'")
    assert "newer version (layout 2" in refused(path)


def test_a_run_dir_that_cannot_be_made_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused(config_file(tmp_path, run_dir=str(tmp_path / "file" / "run")))
    assert said.startswith("run.run_dir: cannot make ")
    assert "Not a directory" in said


def test_a_run_dir_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    said = refused(config_file(tmp_path, run_dir="/proc/self"))
    assert "/proc/self" in said
    assert "writable" in said or "run_dir" in said


def test_something_else_in_a_sockets_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "reports.sock").write_text("mine")
    assert "is no socket" in refused(config_file(tmp_path))
    assert (tmp_path / "run" / "reports.sock").read_text() == "mine"


def test_a_servers_program_that_is_not_there_is_named_before_anything_is_made(tmp_path: Path) -> None:
    said = refused(config_file(tmp_path, {"url": "http://127.0.0.1:1", "command": ["/nowhere/sglang"]}))
    assert said == "servers.command: /nowhere/sglang is not found or cannot be executed"
    assert not (tmp_path / "run" / "gate").exists()


def test_a_port_that_a_stranger_holds_is_told_with_the_pid(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        server = {"url": f"http://127.0.0.1:{port}", "command": ["sleep", "1000"]}
        said = refused(config_file(tmp_path, server))
    assert said.startswith(f"servers.url: port {port} is held by pid {os.getpid()};")
    assert not (tmp_path / "run" / "gate").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run]\nnmae = 'x'\n", ["nmae", "name"]),
        ("[probe]\ninterval_s = 'soon'\n", ["probe.interval_s"]),
        ("[run\n", ["config.toml"]),
        ("[server]\nurl = 'http://127.0.0.1:1'\n", ["command"]),
    ],
)
def test_a_config_that_is_wrong_is_one_line_and_exit_2(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "stepguardd", "run", "--config", str(path), "--json"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


# ---- how it lives and ends -------------------------------------------------------------------------


def test_what_it_decided_is_there_when_it_comes_back(tmp_path: Path) -> None:
    path = config_file(tmp_path)

    def pause(daemon: Daemon) -> None:
        daemon.feed(OperatorAsked(verb="pause", who="ada", why="lunch"))

    lived(path, pause)
    again = lived(path)
    assert again.state.pause is not None
    assert again.state.gate.order.value == "HOLD"


def test_a_mode_that_a_person_set_stays_until_the_config_says_another(tmp_path: Path) -> None:
    path = config_file(tmp_path, mode="hold")
    lived(path, lambda daemon: daemon.feed(OperatorAsked(verb="mode", who="ada", why="", mode="act")))
    assert lived(path).state.mode is Mode.ACT
    assert lived(config_file(tmp_path, mode="shadow")).state.mode is Mode.SHADOW
    assert lived(config_file(tmp_path, mode="shadow")).state.mode is Mode.SHADOW


def test_a_config_changed_between_two_lives_changes_no_decision_of_the_past(tmp_path: Path) -> None:
    """Rows are decided again under the settings of their time; the new ones hold from now on."""
    path = config_file(tmp_path)
    first = lived(path, lambda daemon: [daemon.feed(Tick()) for _ in range(5)])
    path.write_text(path.read_text() + "[recovery]\nquorum = 0.9\n")
    again = lived(path)
    assert first.state.settings.quorum == 0.5
    assert again.state.settings.quorum == 0.9


def test_a_bug_in_a_decision_ends_the_daemon_wherever_the_event_came_from(tmp_path: Path) -> None:
    """An event from a callback of the loop would else be a line in a log, and the daemon half blind."""
    path = config_file(tmp_path)
    daemon = Daemon(load_config(path))

    async def live() -> None:
        def ready() -> None:
            daemon.state = None  # type: ignore[assignment]
            asyncio.get_running_loop().call_later(0.01, daemon.feed, Tick())

        async with asyncio.timeout(20):
            await daemon.run(ready=ready)

    with pytest.raises((InvariantError, AttributeError, ExceptionGroup)):
        asyncio.run(live())


def test_the_page_says_at_once_that_nobody_is_there_any_more(tmp_path: Path) -> None:
    lived(config_file(tmp_path))
    with closing(GatePage.open(tmp_path / "run" / "gate", writable=False)) as page:
        found = page.daemon()
    assert found is not None
    assert found.lease_deadline_ns <= clock.monotonic_ns()


def test_it_leaves_no_descriptor_and_no_task_behind(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    lived(path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        lived(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_journal_of_a_run_can_be_read_after_its_daemon(tmp_path: Path) -> None:
    lived(config_file(tmp_path))
    with closing(Journal(tmp_path / "state" / "journal.db", boot_id=clock.boot_id())) as journal:
        kinds = [type(recorded.event).__name__ for recorded in journal.read()]
    assert kinds[0] == "DaemonStarted"


@pytest.mark.e2e
@pytest.mark.parametrize("kept", [True, False], ids=["keep", "stop"])
def test_sigterm_ends_it_cleanly_and_keeps_or_ends_the_server(
    kept: bool, tmp_path: Path, base_model: Path
) -> None:
    with small_run(tmp_path, base_model, push=True) as run:
        if not kept:
            run.config.write_text(run.config.read_text().replace('"keep"', '"stop"'))
        daemon = run.daemon()
        run.until(run.serving, "the first start")
        tree = run.started()
        assert len(tree) >= 2
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(timeout=30) == 0
        assert all(proc.alive(known) for known in tree) is kept
        assert not (run.run_dir / "control.sock").exists()
        if kept:
            run.daemon()
            run.until(run.serving, "taken up again")
            assert [known.pid for known in run.started()] == [known.pid for known in tree]
            assert len(run.starts()) == 1


@pytest.mark.e2e
def test_a_start_that_fails_is_told_and_the_daemon_stays(tmp_path: Path) -> None:
    """It exits at once, every time: the budget is spent, the run locked out, and the daemon still answers."""
    with small_run(tmp_path, tmp_path / "no model", push=True) as run:
        text = run.config.read_text().replace("restart_budget = 50", "restart_budget = 2")
        run.config.write_text(text)
        run.daemon()
        run.until(lambda: run.order() == "HOLD", "held")
        run.until(lambda: run.status().get("breaker", {}).get("phase") == "locked_out", "locked out")
        assert len(run.starts()) == 3
        assert len(set(run.starts())) == 3
        assert "a person has to decide" in run.log.read_text()


@pytest.mark.e2e
def test_a_full_recovery_with_people_in_between(tmp_path: Path, base_model: Path) -> None:
    """Pause, a death under the pause, resume: repaired, and the trainer goes on without a step on garbage."""
    with small_run(tmp_path, base_model, push=True) as run:
        run.daemon()
        run.until(run.serving, "the first start")
        with training(run) as trainer:
            run.until(lambda: trainer.committed >= 2, "two steps")
            run.ask("pause")
            run.until(lambda: run.order() == "HOLD", "held")
            run.kill_scheduler()
            run.until(lambda: len(run.starts()) == 2, "started again")
            run.until(lambda: run.status()["servers"][0]["state"] == "serving", "repaired")
            assert run.order() == "HOLD"
            held_at = trainer.committed
            run.ask("resume")
            run.until(lambda: trainer.committed >= held_at + 3, "goes on")
            assert trainer.garbage == 0


def test_free_ports_are_free() -> None:
    assert not proc.port_taken(free_port())
