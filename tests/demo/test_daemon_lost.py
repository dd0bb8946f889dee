"""The daemon itself dies, at the worst moments of a real run. The run must not notice more than a pause."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stepguard_grpo import ground_truth
from stepguardd.demo.conduct import Arena, Plan
from stepguardd.demo.faults import SCENARIOS, Fault, strike

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEPS = 36


def plan(tmp_path: Path) -> Plan:
    return Plan(scenario=SCENARIOS[Fault.KILL], root=tmp_path, guarded=True, steps=STEPS, seed=0)


def until(arena: Arena, what: Callable[[], bool], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.05)


def last_step(arena: Arena) -> int:
    records = ground_truth.read(arena.run_root / "ground_truth.jsonl")
    return records[-1].step if records else 0


def server_of(arena: Arena) -> dict[str, object]:
    servers = arena.status().get("servers") or [{}]
    return dict(servers[0])


def finish(arena: Arena) -> None:
    for _ in arena.trainer_lives():
        pass
    assert arena.how_it_died() is None


def starts(arena: Arena) -> int:
    """How many servers were ever started."""
    return (arena.root / "server.log").read_text().count("fired up and ready to roll")


def test_a_run_goes_on_without_its_daemon_and_a_new_one_takes_the_server_up(tmp_path: Path) -> None:
    """SIGKILL on a healthy run: steps are committed meanwhile, and the server is adopted, not restarted."""
    with Arena(plan(tmp_path)) as arena:
        until(arena, lambda: last_step(arena) >= 5)
        assert arena.daemon is not None
        pid = server_of(arena)["pid"]
        arena.daemon.kill()
        arena.daemon.wait()
        at = last_step(arena)
        until(arena, lambda: last_step(arena) >= at + 5)
        arena.restart_daemon()
        until(arena, lambda: server_of(arena).get("state") == "serving")
        assert server_of(arena)["pid"] == pid
        finish(arena)
        assert starts(arena) == 1
    summary = ground_truth.summary(tmp_path / "run/ground_truth.jsonl")
    assert (summary.steps, summary.garbage_steps) == (STEPS, 0)


@pytest.mark.parametrize(
    "point", ["gate_HOLD", "after_StopServer", "after_StartServer", "before_PushWeights"]
)
def test_a_daemon_killed_during_a_recovery_ends_it_in_its_next_life(tmp_path: Path, point: str) -> None:
    """SIGKILL at a named point of a real recovery: held meanwhile, one restart in all, no garbage step."""
    # The gate's first HOLD is the server's first start: only the daemon that sees the fault may crash there.
    with Arena(plan(tmp_path)) as arena:
        assert arena.daemon is not None
        until(arena, lambda: last_step(arena) >= 5)
        arena.daemon.kill()
        arena.daemon.wait()
        arena.restart_daemon({"STEPGUARD_CRASH_AT": point})
        until(arena, lambda: server_of(arena).get("state") == "serving")
        pid = server_of(arena)["pid"]
        assert isinstance(pid, int)
        strike(Fault.KILL, pid)
        until(arena, lambda: arena.daemon is not None and arena.daemon.poll() is not None)
        assert arena.daemon.returncode == -9, "the daemon did not crash at its point"
        arena.restart_daemon()
        finish(arena)
        assert starts(arena) == 2, "one restart, whatever became of the daemon"
    summary = ground_truth.summary(tmp_path / "run/ground_truth.jsonl")
    assert (summary.steps, summary.garbage_steps) == (STEPS, 0)
