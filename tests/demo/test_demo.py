"""The demo is the product's promise run for real: each fault fires, and comes to what its scenario says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stepguard_grpo import ground_truth
from stepguardd import proc

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def run_demo(folder: Path, *arguments: str) -> dict[str, Any]:
    """One demo to its end; its object, after a look at its exit code."""
    command = [sys.executable, "-m", "stepguardd", "demo", "--json", "--dir", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, "with --json, stdout is JSON only"
    found: dict[str, Any] = json.loads(lines[0])
    return found


def daemon_log(folder: Path) -> str:
    return (folder / "guarded" / "daemon.log").read_text()


def test_a_killed_server_costs_no_garbage_step_and_without_stepguard_it_costs_many(tmp_path: Path) -> None:
    """Incident A in small: the same seed and fault with and without, and the ground truth of both."""
    found = run_demo(tmp_path / "kill", "--fault", "kill", "--compare")
    guarded, unguarded = found["guarded"], found["unguarded"]
    assert found["fault"] == "kill"
    assert found["fault_step"] is not None, "the fault was never injected"
    assert "crashed" in (tmp_path / "kill/unguarded/server.log").read_text(), "nothing died in the other run"
    assert guarded["garbage_steps"] == 0
    assert guarded["restarts"] == 1
    assert guarded["holds"] == 1
    assert guarded["steps"] == 150
    assert guarded["final_reward"] >= 0.9
    assert unguarded["garbage_steps"] > 20
    assert unguarded["final_reward"] < 0.1
    assert set(guarded) == {
        *("steps", "garbage_steps", "final_reward", "holds", "restarts", "rollbacks", "relaunches"),
        *("detect_s", "recover_s", "lost_s"),
    }


def test_a_stopped_server_is_continued_and_not_restarted(tmp_path: Path) -> None:
    """SIGSTOP: the run holds, SIGCONT helps, and nothing is killed."""
    guarded = run_demo(tmp_path / "hang", "--fault", "hang", "--steps", "60")["guarded"]
    log = daemon_log(tmp_path / "hang")
    assert "server_stopped" in log, "the stop was not seen"
    assert "SIGCONT" in log
    assert (guarded["garbage_steps"], guarded["restarts"], guarded["holds"]) == (0, 0, 1)


def test_a_server_restarted_by_somebody_else_serves_no_rollout_with_base_weights(tmp_path: Path) -> None:
    """The weights' handshake died with the server: the trainer is asked to re-sync before it goes on."""
    found = run_demo(tmp_path / "stale", "--fault", "stale", "--steps", "60")
    log = daemon_log(tmp_path / "stale")
    assert "server_died" in log, "the fault did not fire"
    assert "re-synced by the trainer" in log
    server = (tmp_path / "stale/guarded/server.log").read_text()
    assert server.count("fired up and ready to roll") == 2, "the supervisor did not restart it"
    guarded = found["guarded"]
    assert (guarded["garbage_steps"], guarded["restarts"], guarded["holds"]) == (0, 0, 1)


def test_zeros_of_a_trainer_without_isolation_are_refused_before_their_step(tmp_path: Path) -> None:
    """Incident A's own trainer: every failure scored 0, no gather. The batch is refused all the same."""
    found = run_demo(tmp_path / "zeros", "--fault", "zeros", "--steps", "60")
    assert "refused: outage" in daemon_log(tmp_path / "zeros"), "no batch of zeros was ever offered"
    guarded = found["guarded"]
    assert (guarded["garbage_steps"], guarded["restarts"], guarded["holds"]) == (0, 1, 1)


def test_one_raising_trajectory_is_masked_and_ends_the_unguarded_run(tmp_path: Path) -> None:
    """Incident D: one exception of many. Isolation masks it; a bare asyncio.gather lets it end the job."""
    found = run_demo(tmp_path / "trajectory", "--fault", "trajectory", "--steps", "50", "--compare")
    trainer = (tmp_path / "trajectory/guarded/trainer.log").read_text()
    assert "made to fail" in trainer, "the trajectory did not raise"
    guarded, unguarded = found["guarded"], found["unguarded"]
    assert (guarded["garbage_steps"], guarded["holds"], guarded["steps"]) == (0, 0, 50)
    assert "made to fail" in unguarded["died"]
    assert unguarded["steps"] < 50


def test_a_call_that_never_returns_costs_one_rollout(tmp_path: Path) -> None:
    """Incident C: one worker process stands still. Awaited without a bound, it would be the run's end."""
    guarded = run_demo(tmp_path / "actor", "--fault", "actor", "--steps", "40")["guarded"]
    trainer = (tmp_path / "actor/guarded/trainer.log").read_text()
    assert trainer.count("gave no grade: no answer within 2 s, killed") == 1, "no call hung"
    assert (guarded["garbage_steps"], guarded["holds"], guarded["steps"]) == (0, 0, 40)


def test_a_killed_trainer_is_relaunched_from_what_is_proven_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Incident C's end: the job is gone. The steps that it takes again are those that it took before."""
    found = run_demo(tmp_path / "trainer", "--fault", "trainer", "--steps", "50")
    guarded, log = found["guarded"], daemon_log(tmp_path / "trainer")
    assert "died, code -9" in log, "the trainer was not killed"
    assert (guarded["garbage_steps"], guarded["holds"], guarded["restarts"]) == (0, 1, 0)
    assert guarded["relaunches"] == 1
    records = ground_truth.read(tmp_path / "trainer/guarded/run/ground_truth.jsonl")
    before = {one.step: one.reward_mean_true for one in records if one.attempt == 0}
    after = {one.step: one.reward_mean_true for one in records if one.attempt == 1}
    assert min(after) == 21, "the newest proven checkpoint is the one of step 20"
    again = before.keys() & after.keys()
    assert len(again) >= 3
    assert all(before[step] == after[step] for step in again)
    assert max(after) == 50


def test_a_server_that_dies_again_on_probation_gets_the_next_remedy(tmp_path: Path) -> None:
    """One incident, not two: the second restart gives the server fewer requests at a time."""
    guarded = run_demo(tmp_path / "relapse", "--fault", "relapse", "--steps", "60")["guarded"]
    log = daemon_log(tmp_path / "relapse")
    assert "again: server_died" in log, "it did not die on probation"
    assert "max_running_requests unset → 32" in log
    assert (guarded["garbage_steps"], guarded["restarts"], guarded["holds"]) == (0, 2, 1)
    assert guarded["rollbacks"] == 0
    assert guarded["steps"] == 60


def test_a_server_without_memory_enough_serves_on_one_rung_down(tmp_path: Path) -> None:
    """Incident B: the kernel kills where a cgroup can be made, else CUDA's line; then fewer fit."""
    guarded = run_demo(tmp_path / "oom", "--fault", "oom", "--steps", "40")["guarded"]
    log = daemon_log(tmp_path / "oom")
    assert "ran out of memory, and the kernel killed" in log or "CUDA ran out of memory" in log
    assert "max_running_requests unset → 32" in log
    server = (tmp_path / "oom/guarded/server.log").read_text()
    assert server.count("fired up and ready to roll") == 2
    assert (guarded["garbage_steps"], guarded["restarts"], guarded["holds"]) == (0, 1, 1)
    assert guarded["steps"] == 40


def test_a_rank_that_dies_at_the_barrier_hangs_nobody_and_both_are_relaunched(tmp_path: Path) -> None:
    """Incident C: the other rank fails in its collective, and both take the same steps again, bit for bit."""
    guarded = run_demo(tmp_path / "rank", "--fault", "rank", "--steps", "50")["guarded"]
    trainer = (tmp_path / "rank/guarded/trainer.log").read_text()
    assert "in barrier" in trainer, "nobody waited for the dead rank"
    assert (guarded["garbage_steps"], guarded["holds"], guarded["restarts"]) == (0, 1, 0)
    assert guarded["relaunches"] == 1
    records = ground_truth.read(tmp_path / "rank/guarded/run/ground_truth.jsonl")
    assert {one.rollouts for one in records} == {64}, "the shares of both ranks"
    before = {one.step: one.reward_mean_true for one in records if one.attempt == 0}
    after = {one.step: one.reward_mean_true for one in records if one.attempt == 1}
    assert (max(before), min(after), max(after)) == (25, 21, 50)
    assert all(before[step] == after[step] for step in range(21, 26))


def test_a_prompt_that_kills_the_server_is_found_and_withheld(tmp_path: Path) -> None:
    """Two crashes make suspects of a batch's eight prompts, a third meets one of them alone."""
    guarded = run_demo(tmp_path / "poison", "--fault", "poison", "--steps", "40")["guarded"]
    log = daemon_log(tmp_path / "poison")
    assert "in flight at 2 crashes of the server" in log, "it did not die of the prompt"
    assert log.count("kills the server: alone in flight") == 1
    assert "ran out of memory" not in log
    trainer = (tmp_path / "poison/guarded/trainer.log").read_text()
    assert "withheld, as the file quarantine says" in trainer
    assert (guarded["garbage_steps"], guarded["restarts"], guarded["holds"]) == (0, 3, 1)
    assert guarded["steps"] == 40


def test_a_step_of_nan_is_taken_back_and_without_stepguard_it_ends_all_learning(tmp_path: Path) -> None:
    """One NaN in a gradient: every weight is lost with it, and no later step can know."""
    found = run_demo(tmp_path / "nan", "--fault", "nan", "--steps", "60", "--compare")
    assert "grad_not_finite" in daemon_log(tmp_path / "nan"), "no NaN was ever reported"
    guarded, unguarded = found["guarded"], found["unguarded"]
    assert (guarded["garbage_steps"], guarded["holds"], guarded["rollbacks"]) == (0, 1, 1)
    assert guarded["final_reward"] > 0.5
    assert unguarded["final_reward"] < 0.05


def test_a_ruined_policy_is_held_called_about_and_rolled_back_as_the_config_says(tmp_path: Path) -> None:
    """The reward is gone while every server is well: nothing to restart."""
    guarded = run_demo(tmp_path / "policy", "--fault", "policy", "--steps", "80")["guarded"]
    assert "every server is well" in daemon_log(tmp_path / "policy")
    assert (guarded["garbage_steps"], guarded["holds"], guarded["restarts"]) == (0, 1, 0)
    assert guarded["rollbacks"] == 1
    assert guarded["final_reward"] > 0.7


def test_a_pause_is_waited_for(tmp_path: Path) -> None:
    """Somebody pauses the server for longer than a deadlock is given: no hold, no restart, no step lost."""
    guarded = run_demo(tmp_path / "pause", "--fault", "pause", "--steps", "50")["guarded"]
    assert guarded["lost_s"] > 5, "the pause never came"
    assert (guarded["garbage_steps"], guarded["holds"], guarded["restarts"]) == (0, 0, 0)
    assert guarded["steps"] == 50


def test_foreign_weights_are_refused_and_replaced(tmp_path: Path) -> None:
    """Somebody loads the base weights: what they generated trains nothing, and the trainer's come back."""
    guarded = run_demo(tmp_path / "weights", "--fault", "weights", "--steps", "50")["guarded"]
    log = daemon_log(tmp_path / "weights")
    assert "refused: stale_weights" in log, "nobody saw them"
    assert "pushed from disk" in log
    assert (guarded["garbage_steps"], guarded["holds"], guarded["restarts"]) == (0, 1, 0)


def test_what_the_embedded_server_lacks_is_said_at_once(tmp_path: Path) -> None:
    """It has no detokenizer; and a real SGLang that is not installed is named with its remedy."""
    command = [sys.executable, "-m", "stepguardd", "demo", "--dir", str(tmp_path / "none"), "--fault"]
    done = subprocess.run([*command, "detokenizer"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--server sglang" in done.stderr
    environment = os.environ | {"SGLANG_VENV": str(tmp_path / "no-such-folder")}
    done = subprocess.run(
        [*command, "kill", "--server", "sglang"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "make sglang" in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_told_to_end_leaves_no_process_behind(tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C or a TERM in the middle of a run: daemon, server and trainer are gone when the demo is."""
    folder = tmp_path / "stopped"
    command = [sys.executable, "-m", "stepguardd", "demo", "--fault", "none", "--no-ui", "--dir", str(folder)]
    mark = ("STEPGUARD_TEST_DEMO", str(tmp_path))
    environment = os.environ | dict([mark])
    demo = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        truth = folder / "guarded/run/ground_truth.jsonl"
        deadline = time.monotonic() + 120
        while not truth.exists() and time.monotonic() < deadline and demo.poll() is None:
            time.sleep(0.1)
        assert len(proc.marked(*mark)) >= 5, "demo, daemon, server, scheduler and trainer should be running"
        demo.send_signal(how)
        _, stderr = demo.communicate(timeout=60)
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.wait()
    assert demo.returncode == 1
    assert b"every process of the demo has ended" in stderr
    assert proc.marked(*mark) == ()
