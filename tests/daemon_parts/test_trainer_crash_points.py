"""
The daemon is killed at each named point of a relaunch and of a rollback, and the run ends recovered.

Every process is real. What is promised: exactly one trainer started for each intent, never two at a time, a
start from what was proven, nothing deleted, and a run that goes on.
"""

import contextlib
from pathlib import Path

import pytest

from daemon_parts.little_run import LittleRun, little_run
from stepguardd.control.client import ControlError

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

RELAUNCH = [
    "gate_HOLD",
    *(f"{when}_StopTrainer" for when in ("decided", "before", "after")),
    *(f"{when}_PrepareRollback" for when in ("decided", "before", "after")),
    *(f"{when}_StartTrainer" for when in ("decided", "before", "after")),
]
SET_ASIDE = [
    "rollback_copied",
    "rollback_plan.before",
    "rollback_plan.temporary",
    "rollback_plan.durable",
    "rollback_move.0.before",
    "rollback_move.0.after",
    "rollback_done.temporary",
    "rollback_done.durable",
]
IN_PLACE = ["before_PrepareRollback", *SET_ASIDE]
IN_PLACE += ["after_PrepareRollback", "gate_ROLLBACK", "gate_GO"]


def first_proof(run: LittleRun) -> list[int]:
    """A run with a daemon and at least two proven checkpoints: their steps."""
    proven: list[int] = []

    def two() -> bool:
        proven[:] = run.proven()
        return len(proven) >= 2

    run.daemon()
    run.until(two, "two checkpoints are proven")
    return proven


def whole(run: LittleRun, before: set[str]) -> None:
    """Every checkpoint that was there is there, in its place or in the quarantine."""
    now = {path.name for path in run.checkpoints.rglob("checkpoint-*")}
    assert before <= now, before - now


def started_once(run: LittleRun) -> None:
    starts = run.starts()
    assert len(starts) == len(set(starts)), f"an intent was started twice: {starts}"
    assert len(run.started()) == 1


def test_a_relaunch_survives_a_kill_of_the_daemon_at_every_point(tmp_path: Path) -> None:
    """One death of the trainer, and a daemon killed at each point of its relaunch, one after the other."""
    with little_run(tmp_path, in_place=False) as run:
        first_proof(run)
        run.replace_daemon(RELAUNCH[0])
        proven = run.proven()
        run.goes_on("what is proven is on the disk too")
        run.kill_trainer()
        run.crashed(RELAUNCH[0])
        saved = {path.name for path in run.checkpoints.glob("checkpoint-*")}
        for point in RELAUNCH[1:]:
            run.daemon(point)
            run.crashed(point)
        run.daemon()
        run.goes_on("the trainer is back")
        started_once(run)
        whole(run, saved)
        assert len(run.starts()) == 2
        again = next(step for attempt, step in run.steps() if attempt == 1)
        # One more may have been proven between the look and the kill: never an older one.
        assert f"checkpoint-{again - 1}" in saved
        assert again - 1 >= proven[-1], run.story()
        assert run.status()["trainer"]["launches"] == 1
        run.until(lambda: run.status()["breaker"]["phase"] == "closed", "probation is passed")


@pytest.mark.parametrize("in_place", [True, False], ids=["reloads", "relaunched"])
def test_a_rollback_survives_a_kill_of_the_daemon_at_every_point(tmp_path: Path, in_place: bool) -> None:
    """A person's rollback, and a daemon killed at each point of it, the moves on the disk included."""
    points = IN_PLACE if in_place else ["before_StopTrainer", *SET_ASIDE, "after_StartTrainer"]
    with little_run(tmp_path, in_place=in_place) as run:
        target, onset = first_proof(run)[-2:]
        run.replace_daemon(points[0])
        saved = {path.name for path in run.checkpoints.glob("checkpoint-*")}
        with contextlib.suppress(ControlError):  # it dies with the answer on its lips
            run.ask("rollback", before_step=onset)
        run.crashed(points[0])
        for point in points[1:]:
            run.daemon(point)
            run.crashed(point)
        run.daemon()
        run.goes_on("the run goes on from the target")
        started_once(run)
        whole(run, saved)
        # An order that was on the page and not yet in the journal may be obeyed again: to the same target,
        # and with no step between.
        first, last = sorted({attempt for attempt, _ in run.steps()})
        assert first == 0
        again = next(step for attempt, step in run.steps() if attempt == last)
        assert target < again <= onset, run.story()
        assert len(run.starts()) == (1 if in_place else 2)


def test_a_copy_that_was_made_and_not_told_is_found_again(tmp_path: Path) -> None:
    """Killed between a pin and its row: the next daemon finds the pin, and makes no second one."""
    with little_run(tmp_path, in_place=True) as run:
        run.daemon("pinned")
        run.crashed("pinned", timeout_s=200.0)  # the vetting before it is niced
        run.daemon()
        run.until(lambda: any(row["pinned"] for row in run.status().get("checkpoints", [])), "a pin is known")
        assert list(run.checkpoints.glob("stepguard-pinned/step-*"))
