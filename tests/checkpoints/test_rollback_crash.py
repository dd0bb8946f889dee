"""
SIGKILL at every point of a rollback and of its undo.

Promised: whatever the point, the framework would then resume from before or from the chosen checkpoint (or
refuse to start, never from scratch and never from between); finishing leaves exactly the new folder, and
undoing exactly the old.
"""

import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from runs_on_disk import KINDS, contents

from stepguardd.checkpoints import disk
from stepguardd.checkpoints.layouts import Framework, find_checkpoints, open_folder, resumes_from
from stepguardd.checkpoints.pinning import pin
from stepguardd.checkpoints.rollback import Hands, find_unfinished, plan_rollback, roll_back, settle, undo

BY_NAME = {kind.framework: kind for kind in KINDS}

# (framework, whether names can be exchanged, whether the chosen step is left only as a pin). One of each way
# to resume: a marker, the highest number, two markers, side files, a slot; and a rollback to what rotation
# has taken.
CASES = {
    "marker": (Framework.VERL, True, False),
    "highest": (Framework.TRL, True, False),
    "two markers": (Framework.OPENRLHF, True, False),
    "side files": (Framework.SLIME, True, False),
    "slot": (Framework.AREAL, True, False),
    "slot on a network": (Framework.AREAL, False, False),
    "rotated away": (Framework.SKYRL, True, True),
}

Act = Callable[[Path, Hands], None]


def rolling_back(case: str) -> Act:
    def act(root: Path, hands: Hands) -> None:
        folder = open_folder(root, CASES[case][0])
        checkpoints = find_checkpoints(folder)
        chosen = next(c for c in checkpoints if c.step == 20)
        roll_back(folder, plan_rollback(folder, checkpoints, chosen, "night"), hands)

    return act


def undoing(root: Path, hands: Hands) -> None:
    undo(root, hands=hands)


def hands_of(case: str, at: Callable[[str], None]) -> Hands:
    return Hands(at=at, exchange=disk.exchange if CASES[case][1] else lambda one, other: False)


def points_of(case: str, act: Act, root: Path) -> list[str]:
    """Do it, and tell every point passed."""
    points: list[str] = []
    act(root, hands_of(case, points.append))
    return points


def kill_at(case: str, act: Act, root: Path, point: str) -> None:
    """Do it in a process that is killed at this point, and make sure that it was."""

    def at(passed: str) -> None:
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # newer Pythons warn of any fork beside threads; this child only moves files
        child = os.fork()
    if child == 0:
        try:
            act(root, hands_of(case, at))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"not killed at {point}"


def start_of(case: str, a_run, root: Path) -> Path:
    """A run of which everything after step 20 is to be set aside."""
    framework, _, rotated = CASES[case]
    kind = BY_NAME[framework]
    made = a_run(kind)
    if not kind.slot:
        kind.write(made, 40)
    if rotated:
        folder = open_folder(made, framework)
        pin(folder, next(c for c in find_checkpoints(folder) if c.step == 20))
        shutil.rmtree(kind.folder(made, 20))
    return copy(made, root)


def copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, symlinks=True))


def check_resumable(root: Path, framework: Framework, newest: int | None, point: str) -> None:
    """What the framework would do if it were started at this very moment."""
    step = resumes_from(open_folder(root, framework))
    if BY_NAME[framework].slot and step is None:
        # A file system without an exchange: the slot is away between two renames.
        assert point.endswith((".away", ".in")), point
        return
    assert step in {newest, 20}, point


@pytest.mark.parametrize("case", CASES)
def test_a_rollback_killed_at_any_point_leaves_the_old_or_the_new(case: str, a_run, tmp_path: Path) -> None:
    framework = CASES[case][0]
    start = start_of(case, a_run, tmp_path / "start")
    before, newest = contents(start), resumes_from(open_folder(start, framework))
    whole = copy(start, tmp_path / "whole")
    points = points_of(case, rolling_back(case), whole)
    wanted = contents(whole)
    assert wanted != before
    assert len(points) >= 9

    for point in points:
        root = copy(start, tmp_path / "killed")
        kill_at(case, rolling_back(case), root, point)
        check_resumable(root, framework, newest, point)
        planned = points.index(point) >= points.index("plan.durable")
        assert (find_unfinished(root) is not None) == (planned and point != "done.durable"), point
        if planned:
            taken_back = copy(root, tmp_path / "taken back")
            undo(taken_back)
            assert contents(taken_back) == before, point
        settle(root)
        assert contents(root) == (wanted if planned else before), point


@pytest.mark.parametrize("case", CASES)
def test_an_undo_killed_at_any_point_can_be_finished(case: str, a_run, tmp_path: Path) -> None:
    framework = CASES[case][0]
    start = start_of(case, a_run, tmp_path / "start")
    before, newest = contents(start), resumes_from(open_folder(start, framework))
    rolled_back = copy(start, tmp_path / "rolled back")
    rolling_back(case)(rolled_back, hands_of(case, lambda point: None))
    points = points_of(case, undoing, copy(rolled_back, tmp_path / "whole"))
    assert contents(tmp_path / "whole") == before

    for point in points:
        root = copy(rolled_back, tmp_path / "killed")
        kill_at(case, undoing, root, point)
        check_resumable(root, framework, newest, point)
        if point == "undo.plan.temporary":
            assert find_unfinished(root) is None
            undo(root)
        settle(root)
        assert contents(root) == before, point
