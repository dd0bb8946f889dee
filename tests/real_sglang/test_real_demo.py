"""
The demo on a real SGLang: each fault is done to the real server's processes, and the run comes through it.

Every promise here is one of the server's reaction and of the ground truth, never of a time. Five faults are
run by their command; the others of the table in docs/sglang.md share one run.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from requirements import require, required
from stepguard_grpo import ground_truth
from stepguardd import proc
from stepguardd.demo.conduct import Arena, Plan
from stepguardd.demo.faults import (
    PAUSE_S,
    SCENARIOS,
    Fault,
    PauseMode,
    continue_generation,
    load_weights,
    pause_generation,
    strike,
)
from stepguardd.demo.servers import ServerKind

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.usefixtures("program")]

STEPS = 40
READY = "fired up and ready to roll"


@pytest.fixture
def asked_for() -> None:
    """A run that takes more minutes than it tells: where it is asked for."""
    if not required("sglang-faults"):
        require("sglang-faults", "four starts of a server take minutes; ask by STEPGUARD_REQUIRE")


def run_demo(folder: Path, fault: str, *arguments: str) -> dict[str, Any]:
    """One demo on the real server to its end; what it came to with Stepguard."""
    command = [sys.executable, "-m", "stepguardd", "demo", "--json", "--server", "sglang", "--fault", fault]
    command += ["--steps", str(STEPS), "--dir", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["fault"] == fault
    assert found["fault_step"] is not None, "the fault was never injected"
    guarded: dict[str, Any] = found["guarded"]
    assert guarded["steps"] == STEPS
    assert guarded["garbage_steps"] == 0
    return guarded


def starts(log: Path) -> int:
    """How many times a server said that it serves."""
    return log.read_text(errors="replace").count(READY)


def test_one_run_comes_through_two_pauses_foreign_weights_and_its_servers_death(tmp_path: Path) -> None:
    """One server start is shared by all of them; only the last, SIGKILL to its parent, needs another."""
    plan = Plan(
        scenario=SCENARIOS[Fault.PAUSE],  # its requests have time to wait; it is done by hand here
        root=tmp_path,
        guarded=True,
        steps=5000,
        seed=0,
        server=ServerKind.SGLANG,
    )
    with Arena(plan) as arena:
        goes_on(arena)
        for mode in (PauseMode.ABORT, PauseMode.RETRACT):
            pause_generation(arena.url, mode.value)
            time.sleep(PAUSE_S)
            assert opened(arena) == 0, "a pause is no reason to hold"
            continue_generation(arena.url)
            goes_on(arena)

        base = arena.run_root / "base"
        until(
            arena, lambda: load_weights(arena.url, base, "base") is not None, "rollouts to load weights under"
        )
        until(arena, lambda: opened(arena) == 1, "the foreign weights are seen")
        goes_on(arena)
        assert starts(tmp_path / "server.log") == 1

        strike(Fault.PARENT, server_pid(arena))
        until(arena, lambda: opened(arena) == 2, "the death is seen")
        goes_on(arena)
        causes = causes_of(arena)
    assert starts(tmp_path / "server.log") == 2
    assert causes == ["stale_weights", "server_died"]
    assert ground_truth.summary(arena.run_root / "ground_truth.jsonl").garbage_steps == 0


def goes_on(arena: Arena) -> None:
    """The incident is closed and five more steps are committed."""
    until(arena, lambda: (arena.status().get("breaker") or {}).get("phase") == "closed", "all is well")
    at = last_step(arena)
    until(arena, lambda: last_step(arena) >= at + 5, "steps are taken")


def until(arena: Arena, what: Callable[[], bool], words: str, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        said = (arena.root / "daemon.log").read_text()[-3000:]
        assert arena.how_it_died() is None, said
        assert time.monotonic() < deadline, f"within {timeout_s:.0f} s not: {words}\n{said}"
        time.sleep(0.1)


def last_step(arena: Arena) -> int:
    records = ground_truth.read(arena.run_root / "ground_truth.jsonl")
    return records[-1].step if records else 0


def server_pid(arena: Arena) -> int:
    pid = (arena.status().get("servers") or [{}])[0].get("pid")
    assert isinstance(pid, int)
    return pid


def opened(arena: Arena) -> int:
    """Incidents so far."""
    return int(arena.status().get("incidents") or 0)


def causes_of(arena: Arena) -> list[str]:
    """Why each of them began, as the daemon's log has it."""
    log = (arena.root / "daemon.log").read_text()
    return re.findall(r"opened: held: (\w+)", log)


def test_a_demo_interrupted_while_the_real_server_starts_leaves_no_process(tmp_path: Path) -> None:
    """Ctrl-C under the fault whose server is another supervisor's: what is still importing ends too."""
    command = [sys.executable, "-m", "stepguardd", "demo", "--server", "sglang", "--fault", "stale"]
    command += ["--no-ui", "--dir", str(tmp_path / "demo")]
    mark = ("STEPGUARD_TEST_DEMO", str(tmp_path))
    demo = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | dict([mark]))
    deadline = time.monotonic() + 240
    try:
        # The resource tracker is the first of the server's children, and deaf to SIGTERM.
        while "resource_tracker" not in {known.role for known in proc.marked(*mark)}:
            assert demo.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        demo.send_signal(signal.SIGINT)
        _, stderr = demo.communicate(timeout=120)
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.wait()
    assert demo.returncode == 1
    assert b"every process of the demo has ended" in stderr
    assert starts(tmp_path / "demo/guarded/server.log") == 0, "it was not interrupted in its start"
    assert proc.marked(*mark) == ()


@pytest.mark.parametrize("fault", ["kill", "detokenizer"])
def test_a_killed_process_of_the_real_server_costs_one_restart_and_no_garbage_step(
    tmp_path: Path, fault: str
) -> None:
    """SIGKILL to one of its processes: held at once, the whole tree replaced, the weights pushed."""
    guarded = run_demo(tmp_path / fault, fault)
    assert "server_died" in daemon_log(tmp_path / fault), "the death was not seen"
    assert (guarded["holds"], guarded["restarts"]) == (1, 1)
    assert starts(tmp_path / fault / "guarded/server.log") == 2


def test_a_stopped_real_scheduler_is_continued_and_not_restarted(tmp_path: Path) -> None:
    """SIGSTOP, which SGLang itself never notices: held, continued, the same server goes on."""
    guarded = run_demo(tmp_path / "hang", "hang")
    log = daemon_log(tmp_path / "hang")
    assert "server_stopped" in log, "the stop was not seen"
    assert "SIGCONT" in log
    assert (guarded["holds"], guarded["restarts"]) == (1, 0)
    assert starts(tmp_path / "hang/guarded/server.log") == 1


def test_a_real_server_restarted_by_somebody_else_gets_its_weights_before_a_rollout(tmp_path: Path) -> None:
    """It comes back with the base model: the trainer pushes its weights again before it goes on."""
    guarded = run_demo(tmp_path / "stale", "stale")
    log = daemon_log(tmp_path / "stale")
    assert "server_died" in log, "the fault did not fire"
    assert "re-synced by the trainer" in log
    assert (guarded["holds"], guarded["restarts"]) == (1, 0)
    assert starts(tmp_path / "stale/guarded/server.log") == 2, "the supervisor did not restart it"


def test_a_paused_real_server_is_waited_for(tmp_path: Path) -> None:
    """A pause looks hung to /health; it is neither a reason to hold nor to kill."""
    guarded = run_demo(tmp_path / "pause", "pause")
    server = (tmp_path / "pause/guarded/server.log").read_text(errors="replace")
    assert re.search(r"POST /pause_generation HTTP/1\.1\" 200", server), "nobody paused it"
    assert re.search(r"POST /continue_generation HTTP/1\.1\" 200", server)
    assert (guarded["holds"], guarded["restarts"]) == (0, 0)
    assert server.count(READY) == 1


@pytest.mark.usefixtures("asked_for")
def test_a_prompt_that_kills_a_real_server_is_found_and_withheld(tmp_path: Path) -> None:
    """A token that no vocabulary has: three starts of a real server, and the batch is whole without it."""
    guarded = run_demo(tmp_path / "poison", "poison")
    log = daemon_log(tmp_path / "poison")
    assert "in flight at 2 crashes of the server" in log, "it did not die of the prompt"
    assert log.count("kills the server: alone in flight") == 1
    assert "ran out of memory" not in log
    assert (guarded["holds"], guarded["restarts"]) == (1, 3)
    assert starts(tmp_path / "poison/guarded/server.log") == 4


def daemon_log(folder: Path) -> str:
    return (folder / "guarded/daemon.log").read_text()
