"""Two real processes over gloo decide alike: all hold at the same step, and none hangs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guard.real_daemon import RealDaemon
from stepguard.gate import Order

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0  # bounds a hang, and measures nothing


class Run:
    """
    A daemon, and the ranks.

    Args:
        run_dir: for gate and socket.
        what: for `rank_worker.py`.

    """

    def __init__(self, run_dir: Path, what: str) -> None:
        self.record = run_dir / "record"
        self.daemon = RealDaemon(run_dir)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("trainer", "watchdog", "tests")),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "ACCELERATE_USE_CPU": "true",
        }
        worker = Path(__file__).with_name("rank_worker.py")
        self.ranks = [
            subprocess.Popen(
                [sys.executable, str(worker), str(run_dir), str(self.record), what],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]

    def ended(self) -> list[int]:
        codes = [rank.wait(WAIT_S) for rank in self.ranks]
        self.daemon.settle()
        return codes

    def rows(self, rank: int) -> list[dict[str, Any]]:
        path = self.record.with_suffix(f".{rank}")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()
        self.daemon.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Run]]:
    runs: list[Run] = []

    def make(what: str) -> Run:
        runs.append(Run(tmp_path, what))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def holds_at_step_4(run: Run, released: list[float]) -> Callable[[dict[str, Any]], None]:
    """HOLD once step 3 is committed; GO when the hold was acknowledged and two more seconds have passed."""

    def on_report(report: dict[str, Any]) -> None:
        if report["kind"] == "step" and report["step"] == 3:
            run.daemon.order(Order.HOLD, "server_dead")
        if report["kind"] == "ack" and report["order"] == "HOLD" and not released:
            time.sleep(2)
            released.append(time.monotonic())
            run.daemon.order(Order.GO)

    return on_report


@pytest.mark.parametrize("what", ["bare", "trl"])
def test_all_ranks_hold_at_the_same_step_and_go_on_together(what: str, start: Callable[[str], Run]) -> None:
    run = start(what)
    released: list[float] = []
    run.daemon.on_report = holds_at_step_4(run, released)
    assert run.ended() == [0, 0]
    assert len(released) == 1
    held = []
    for rank in range(2):
        gates = [row for row in run.rows(rank) if "step" in row]
        assert max(row["step"] for row in gates) == 8
        passed_before = [row["step"] for row in gates if row["after"] < released[0]]
        held.append(max(passed_before))
        assert all(row["step"] > 3 for row in gates if row["after"] > released[0])
    assert held == [3, 3], "no rank took step 4 before the hold was over"
    batches = run.daemon.of_kind("batch")
    assert {batch["ok"] for batch in batches} == {8 if what == "bare" else 32}, "both ranks' shares"
    if what == "trl":
        one, other = (run.rows(rank)[-1] for rank in range(2))
        assert one["total"] == other["total"]


def test_all_ranks_roll_back_and_stop_together(start: Callable[[str], Run]) -> None:
    run = start("bare")

    def on_report(report: dict[str, Any]) -> None:
        if report["kind"] == "step" and report["step"] == 2:
            run.daemon.order(Order.ROLLBACK, "poison", target_step=1, target_path="/c")
        if report["kind"] == "ack" and report["order"] == "ROLLBACK":
            run.daemon.order(Order.GO)
        if report["kind"] == "step" and report["step"] == 5:
            run.daemon.order(Order.STOP, "enough")

    run.daemon.on_report = on_report
    assert run.ended() == [0, 0]
    for rank in range(2):
        rows = run.rows(rank)
        assert [row["rolled_back_to"] for row in rows if "rolled_back_to" in row] == [1]
        assert rows[-1]["stopped"].startswith("enough")
    assert {row["step"] for row in run.rows(0) if "step" in row} == {
        row["step"] for row in run.rows(1) if "step" in row
    }


def test_a_rank_that_dies_ends_the_others_in_an_error_and_not_in_a_hang(start: Callable[[str], Run]) -> None:
    run = start("dies")
    assert run.ended() == [3, -signal.SIGKILL]
    rows = run.rows(0)
    assert max(row["step"] for row in rows if "step" in row) == 3, "no step without its peer"
    assert rows[-1]["error"]
