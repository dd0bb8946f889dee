"""What a person may ask of a live run: pause, resume, restart the server, roll back. All parts are real."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stepguard_grpo import ground_truth
from stepguardd.demo.conduct import Arena, Plan
from stepguardd.demo.faults import SCENARIOS, Fault

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def ask(arena: Arena, *arguments: str) -> None:
    """One `stepguard` command on the arena's run."""
    command = [sys.executable, "-m", "stepguardd", *arguments, "--run-dir", str(arena.run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def until(arena: Arena, what: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    for _ in arena.trainer_lives():
        if what():
            return
        assert time.monotonic() < deadline, "it did not come to that in time"
    assert what(), "the trainer ended before it came to that"


def test_pause_resume_restart_and_rollback_of_a_live_run(tmp_path: Path) -> None:
    """A paused run commits nothing; a rollback reloads the trainer in place from before the given step."""
    plan = Plan(scenario=SCENARIOS[Fault.NONE], root=tmp_path, guarded=True, steps=200, seed=0)
    with Arena(plan) as arena:
        truth = arena.run_root / "ground_truth.jsonl"

        def last_step() -> int:
            records = ground_truth.read(truth)
            return records[-1].step if records else 0

        def phase() -> object:
            return (arena.status().get("breaker") or {}).get("phase")

        until(arena, lambda: last_step() >= 8)
        ask(arena, "pause", "--why", "a look at the curve")
        time.sleep(1.0)  # the step that was under way may still commit
        held_at = last_step()
        time.sleep(2.0)
        assert last_step() == held_at, "an optimizer step was taken while the run was paused"
        ask(arena, "resume")
        until(arena, lambda: last_step() > held_at)

        ask(arena, "restart-server", "--yes")
        until(arena, lambda: last_step() > held_at + 5 and phase() == "closed")

        # No checkpoint of an incident's steps is proven: the one to go back to is of later steps.
        target = 10 * (last_step() // 10 + 1)
        until(arena, lambda: last_step() >= target + 23)
        ask(arena, "rollback", "--before-step", str(target + 5), "--yes")
        until(arena, lambda: any(record.attempt == 1 for record in ground_truth.read(truth)))
        until(arena, lambda: last_step() >= 200)
        for _ in arena.trainer_lives():
            pass
        record = json.loads((arena.run_root / "run_record.json").read_text())
    records = ground_truth.read(truth)
    assert (record["rollbacks"], record["attempt"], record["outcome"]) == (1, 1, "finished")
    again = next(record for record in records if record.attempt == 1)
    assert again.step == target + 1, "the newest checkpoint before the given step"
    assert not any(record.garbage for record in records)
    assert "restarting sglang: operator_restart" in (tmp_path / "daemon.log").read_text()
    quarantine = arena.run_root / "checkpoints" / "quarantine"
    set_aside = sorted(path.name for path in quarantine.glob("*/checkpoint-*"))
    assert f"checkpoint-{target + 20}" in set_aside, "newer checkpoints are set aside, not deleted"
    assert f"checkpoint-{target}" not in set_aside
