"""`stepguard drill` on a small real run: refused where it should be, measured where it strikes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_parts.small_run import SmallRun, small_run, training
from stepguardd import proc
from stepguardd.core.events import Proc
from stepguardd.drill import DrillFault, _struck

NIGHTLY = Path(__file__).parents[2] / "docs/deploy/examples/nightly-drill.sh"


def drill(config: Path, *options: str, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepguardd", "drill", "--config", str(config), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def allow(run: SmallRun) -> None:
    run.config.write_text(run.config.read_text().replace("[run]\n", "[run]\ndrills = true\n"))


def test_a_run_that_does_not_say_that_it_is_for_drills_is_not_struck(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[run]\nrun_dir = "r"\nstate_dir = "s"\n')
    done = drill(config)
    assert (done.returncode, done.stdout) == (2, "")
    assert "run.drills = true" in done.stderr
    config.write_text('[run]\nrun_dir = "r"\nstate_dir = "s"\ndrills = true\nmode = "shadow"\n')
    assert "shadow" in drill(config).stderr
    config.write_text('[run]\nrun_dir = "r"\nstate_dir = "s"\ndrills = true\n')
    done = drill(config)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no daemon at" in done.stderr


def test_the_faults_are_listed_without_a_run() -> None:
    command = [sys.executable, "-m", "stepguardd", "drill", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [one.value for one in DrillFault]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=30, check=True)
    assert {one["name"] for one in json.loads(done.stdout)["faults"]} == {one.value for one in DrillFault}


@pytest.fixture
def sleeper() -> Iterator[Proc]:
    child = subprocess.Popen(["sleep", "600"])
    found = proc.stat(child.pid)
    assert found is not None
    yield Proc(pid=child.pid, start_ticks=found.start_ticks, role="scheduler")
    child.kill()
    child.wait(timeout=10)


def test_whoever_was_stopped_goes_on_after_a_drill_that_is_broken_off(sleeper: Proc) -> None:
    def stopped() -> bool:
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WCONTINUED)
        found = proc.stat(sleeper.pid)
        assert found is not None
        return found.stopped

    def broken_off() -> None:
        with _struck(DrillFault.HANG, sleeper):
            assert stopped()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert not stopped()


@pytest.mark.e2e
@pytest.mark.timeout(240)
def test_a_drill_measures_a_real_fault(tmp_path: Path, base_model: Path) -> None:
    with small_run(tmp_path, base_model, push=True) as run:
        allow(run)
        run.daemon()
        run.until(run.serving, "the first start")
        done = drill(run.config, "--fault", "parent")
        assert (done.returncode, done.stdout) == (1, "")
        assert "no trainer is under way" in done.stderr
        with training(run) as trainer:
            run.until(lambda: trainer.committed >= 2, "two steps")
            struck = trainer.committed
            # The embedded server has no such process: nothing is struck, and the run goes on.
            done = drill(run.config, "--fault", "detokenizer", "--json")
            assert (done.returncode, done.stdout) == (1, "")
            assert "has no detokenizer process here" in done.stderr
            done = drill(run.config, "--fault", "parent", "--json", "--timeout-s", "120")
            card = json.loads(done.stdout)
            assert (done.returncode, card["passed"], card["why"]) == (0, True, ""), (card, run.story())
            assert trainer.committed > struck
            assert trainer.garbage == 0
        incident = run.status()["last_incident"]
    measured(card, "parent", incident["id"])
    assert (card["cause"], card["restarts"]) == (incident["cause"], incident["restarts"])


@pytest.mark.e2e
@pytest.mark.timeout(240)
def test_the_nightly_example_drills_a_run_and_keeps_a_scorecard_of_each_kind(
    tmp_path: Path, base_model: Path
) -> None:
    """The script as it is in the documentation, on a run that trains."""
    cards = tmp_path / "drills.jsonl"
    with small_run(tmp_path / "run", base_model, push=True) as run:
        allow(run)
        run.daemon()
        run.until(run.serving, "the first start")
        with training(run) as trainer:
            run.until(lambda: trainer.committed >= 2, "two steps")
            done = subprocess.run(
                ["bash", NIGHTLY, run.config, cards],
                env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            )
            assert done.returncode == 0, (done.stderr, run.story())
            assert trainer.garbage == 0
    kept = [json.loads(line) for line in cards.read_text().splitlines()]
    assert [card["passed"] for card in kept] == [True, True]
    for number, (card, fault) in enumerate(zip(kept, ("kill", "hang"), strict=True), 1):
        measured(card, fault, number)


def measured(card: dict[str, Any], fault: str, incident: int) -> None:
    """The fault fired: the incident is its own, opened after the strike, and the times are in their order."""
    role = "server" if fault == "parent" else "scheduler"
    assert (card["fault"], card["server"], card["role"]) == (fault, "server", role)
    assert card["incident"] == incident
    assert card["restarts"] == (0 if fault == "hang" else 1)
    assert 0 < card["detect_s"] < card["detect_s"] + card["hold_s"] <= card["recover_s"]
    assert card["garbage_steps"] == 0
