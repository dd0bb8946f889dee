"""The figures of a run are counted from its ground truth, whatever became of the run."""

from collections.abc import Sequence
from typing import Any

from stepguard_grpo.ground_truth import TruthRecord
from stepguardd.demo.faults import Fault
from stepguardd.demo.outcome import STOOD_STILL, ending, figures, report


def record(step: int, time: float, *, attempt: int = 0, failed: int = 0) -> TruthRecord:
    return TruthRecord(
        step=step,
        attempt=attempt,
        rollouts=64,
        failed_in_loss=failed,
        stale_in_loss=0,
        reward_mean_true=0.8,
        reward_mean_in_loss=0.8,
        committed=True,
        time=time,
    )


def lost_s(records: Sequence[TruthRecord], fault_step: int) -> float | None:
    return figures(records, incidents=(), struck_at=None, fault_step=fault_step, died=None).lost_s


def test_a_pause_costs_what_goes_beyond_the_usual_step() -> None:
    """Ten seconds between two steps that otherwise take one."""
    times = [1.0, 2.0, 3.0, 13.0, 14.0, 15.0]
    assert lost_s([record(step, at) for step, at in enumerate(times, 1)], 3) == 9.0


def test_garbage_steps_cost_their_whole_time() -> None:
    """They brought the run nowhere."""
    records = [record(step, float(step), failed=64 if step > 3 else 0) for step in range(1, 7)]
    assert lost_s(records, 3) == 3.0


def test_steps_taken_again_after_a_relaunch_are_lost_time() -> None:
    """Died at step 4, back 5 s later from step 2: that wait, and the steps 3 and 4 once more."""
    before = [record(step, float(step)) for step in range(1, 5)]
    after = [record(step, 10.0 + step - 3, attempt=1) for step in range(3, 8)]
    assert lost_s([*before, *after], 4) == 6.0 + 1.0


def test_a_fault_after_the_last_step_cost_nothing_that_can_be_seen() -> None:
    """No step followed: nothing to count."""
    assert lost_s([record(step, float(step)) for step in range(1, 5)], 4) == 0.0


def test_a_run_that_stood_still_or_died_is_not_compared_as_if_it_had_trained() -> None:
    """It was good until the fault, and then there was no run any more: no final reward, no time lost."""
    records = [record(step, float(step)) for step in range(1, 13)]
    whole = figures(records, incidents=(), struck_at=4.0, fault_step=4, died=None)
    still = figures(records, incidents=(), struck_at=4.0, fault_step=4, died=f"{STOOD_STILL}, for ever")
    died = figures(records, incidents=(), struck_at=4.0, fault_step=4, died="exit code 1")
    assert (whole.final_reward, ending(whole)) == (0.8, "by itself")
    assert (still.final_reward, still.lost_s, ending(still)) == (None, None, "stood still after 12 steps")
    assert (died.final_reward, died.lost_s, ending(died)) == (None, None, "died after 12 steps")
    said: dict[str, Any] = report(Fault.ACTOR, 4, whole, still)
    assert "died" not in said["guarded"]
    assert said["unguarded"]["died"].startswith("it stands still")
