"""
The demo on a real SGLang: each fault is done to the real server's processes, and the run comes through it.

Every promise here is one of the server's reaction and of the ground truth, never of a time.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepguard_grpo import ground_truth
from stepguardd.demo.conduct import Plan, Progress, conduct
from stepguardd.demo.faults import SCENARIOS, Fault
from stepguardd.demo.servers import ServerKind, ServerProgram

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.usefixtures("program")]

STEPS = 40


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


def starts(folder: Path) -> int:
    """How many times a server said that it serves."""
    return (folder / "guarded/server.log").read_text(errors="replace").count("fired up and ready to roll")


def daemon_log(folder: Path) -> str:
    return (folder / "guarded/daemon.log").read_text()


@pytest.mark.parametrize("fault", ["kill", "detokenizer"])
def test_a_killed_process_of_the_real_server_costs_one_restart_and_no_garbage_step(
    tmp_path: Path, fault: str
) -> None:
    """SIGKILL to one of its children: held at once, the whole tree replaced, the weights pushed."""
    guarded = run_demo(tmp_path / fault, fault)
    log = daemon_log(tmp_path / fault)
    assert "server_died" in log, "the death was not seen"
    assert (guarded["holds"], guarded["restarts"]) == (1, 1)
    assert starts(tmp_path / fault) == 2


def test_a_stopped_real_scheduler_is_continued_and_not_restarted(tmp_path: Path) -> None:
    """SIGSTOP, which SGLang itself never notices: held, continued, the same server goes on."""
    guarded = run_demo(tmp_path / "hang", "hang")
    log = daemon_log(tmp_path / "hang")
    assert "server_stopped" in log, "the stop was not seen"
    assert "SIGCONT" in log
    assert (guarded["holds"], guarded["restarts"]) == (1, 0)
    assert starts(tmp_path / "hang") == 1


def test_a_real_server_restarted_by_somebody_else_gets_its_weights_before_a_rollout(tmp_path: Path) -> None:
    """It comes back with the base model: the trainer pushes its weights again before it goes on."""
    guarded = run_demo(tmp_path / "stale", "stale")
    log = daemon_log(tmp_path / "stale")
    assert "server_died" in log, "the fault did not fire"
    assert "re-synced by the trainer" in log
    assert (guarded["holds"], guarded["restarts"]) == (1, 0)
    assert starts(tmp_path / "stale") == 2, "the supervisor did not restart it"


@pytest.mark.parametrize("mode", ["abort", "in_place", "retract"])
def test_a_paused_real_server_is_waited_for_in_every_mode(
    tmp_path: Path, program: ServerProgram, mode: str
) -> None:
    """A pause looks hung to /health; it is neither a reason to hold nor to kill."""
    del program
    plan = Plan(
        scenario=SCENARIOS[Fault.PAUSE],
        root=tmp_path / mode,
        guarded=True,
        steps=STEPS,
        seed=0,
        server=ServerKind.SGLANG,
        pause_mode=mode,
    )
    plan.root.mkdir()

    def look(progress: Progress) -> None:
        del progress

    progress, figures = conduct(plan, look)
    server = (plan.root / "server.log").read_text(errors="replace")
    assert re.search(r"POST /pause_generation HTTP/1\.1\" 200", server), "nobody paused it"
    assert re.search(r"POST /continue_generation HTTP/1\.1\" 200", server)
    assert progress.fault_step is not None
    assert (figures.steps, figures.holds, figures.restarts, figures.died) == (STEPS, 0, 0, None)
    assert ground_truth.summary(plan.root / "run/ground_truth.jsonl").garbage_steps == 0
    assert server.count("fired up and ready to roll") == 1
