"""
Every layout in every state that a rollback meets; what is on disk before and after is compared byte by byte.
"""

import json
import shutil
from pathlib import Path

import pytest
from runs_on_disk import KINDS, Kind, contents
from typer.testing import CliRunner

from stepguardd.checkpoints.layouts import QUARANTINE, Framework, find_checkpoints, marker_step, resumes_from
from stepguardd.checkpoints.rollback import undo
from stepguardd.cli.checkpoints import app

EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.framework)


def roll_back(kind: Kind, root: Path, before: int, *more: str) -> tuple[int, dict]:
    arguments = ["rollback", str(root), "--before", str(before), "--json", *more]
    if kind.framework is Framework.CUSTOM:
        arguments += ["--framework", "custom", "--pattern", "runs/at-{step}", "--marker", "newest"]
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, json.loads(done.stdout)


def check_went_back(
    kind: Kind, root: Path, before: dict, answer: dict, *, chosen: int, set_aside: list[int]
) -> None:
    """
    The answer, the framework's own view, the bytes that stayed, the bytes set aside; and the undo of it all.
    """
    assert answer["chosen"] == chosen
    assert answer["quarantined"] == set_aside
    assert resumes_from(kind.open(root)) == chosen
    if kind.markers:
        assert answer["marker"] == str(root / kind.markers[0])
        assert marker_step(kind.open(root)) == chosen
    else:
        assert answer["marker"] is None
    after = contents(root)
    if not kind.slot:
        moved = {path for path in before if path not in after}
        aside = contents(root / QUARANTINE, quarantine=True)
        homes = {path.partition("/")[0] for path in aside}
        assert len(homes) <= 1
        for path in moved:
            assert aside[f"{next(iter(homes))}/{path}"] == before[path]
        for path in set(after) - set(kind.markers):
            assert after[path] == before[path]
    if answer["undo"] is not None:
        undone = undo(root)
        assert undone.steps == tuple(set_aside)
        assert contents(root) == before


@EVERY_KIND
def test_a_clean_folder_is_left_as_it_is(kind: Kind, a_run) -> None:
    root = a_run(kind)
    before = contents(root, quarantine=True)
    code, answer = roll_back(kind, root, 31)
    assert (code, answer["chosen"], answer["quarantined"], answer["undo"]) == (0, 30, [], None)
    assert contents(root, quarantine=True) == before


@EVERY_KIND
def test_a_newest_one_with_nan_in_it_is_set_aside(kind: Kind, a_run) -> None:
    root = a_run(kind)
    kind.spoil(root, 30)
    before = contents(root)
    code, answer = roll_back(kind, root, 31)
    assert code == 0
    check_went_back(kind, root, before, answer, chosen=20, set_aside=[30])


@EVERY_KIND
def test_a_newest_one_that_was_never_finished_is_set_aside(kind: Kind, a_run) -> None:
    root = a_run(kind)
    kind.cut_short(root, 30)
    before = contents(root)
    code, answer = roll_back(kind, root, 31)
    assert code == 0
    check_went_back(kind, root, before, answer, chosen=20, set_aside=[30])


@EVERY_KIND
def test_a_marker_to_a_missing_folder_is_moved_to_one_that_is_there(kind: Kind, a_run) -> None:
    root = a_run(kind)
    for checkpoint in find_checkpoints(kind.open(root)):
        if checkpoint.step == 30:
            for part in checkpoint.parts:
                path = root / part.path
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(root)
    code, answer = roll_back(kind, root, 31)
    assert code == 0
    check_went_back(kind, root, before, answer, chosen=20, set_aside=[])


@EVERY_KIND
def test_when_all_are_bad_nothing_is_touched(kind: Kind, a_run) -> None:
    root = a_run(kind)
    for step in (10, 20, 30):
        kind.spoil(root, step)
    before = contents(root, quarantine=True)
    code, answer = roll_back(kind, root, 31)
    assert (code, answer) == (1, {"chosen": None, "quarantined": [], "marker": None, "undo": None})
    assert contents(root, quarantine=True) == before


@EVERY_KIND
def test_what_was_saved_inside_the_incident_is_set_aside_however_good_it_looks(kind: Kind, a_run) -> None:
    root = a_run(kind)
    before = contents(root)
    code, answer = roll_back(kind, root, 30)
    assert code == 0
    check_went_back(kind, root, before, answer, chosen=20, set_aside=[30])


@EVERY_KIND
def test_links_and_climbing_names_are_neither_followed_nor_touched(kind: Kind, a_run, tmp_path: Path) -> None:
    root = a_run(kind)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "precious").write_text("keep")
    (outside / ".metadata").write_text("what a look through the link would find")
    if kind.slot:
        slot = root / "default/recover_checkpoint"
        slot.rename(outside / "moved")
        slot.symlink_to(outside / "moved")
        expected, aside = 20, [30]
    else:
        kind.folder(root, 40).symlink_to(outside)
        for odd in ("global_step_..", "step_", "checkpoint--1", "iter_31", "global_step_031", "..step_99"):
            (kind.folder(root, 30).parent / odd).mkdir()
            (kind.folder(root, 30).parent / odd / "note").write_text(odd)
        expected, aside = 30, [40]
    before, beyond = contents(root), contents(outside)
    code, answer = roll_back(kind, root, 50)
    assert code == 0
    check_went_back(kind, root, before, answer, chosen=expected, set_aside=aside)
    assert contents(outside) == beyond


@pytest.mark.parametrize(
    "kind",
    [k for k in KINDS if k.markers][:2] + [k for k in KINDS if k.slot],
    ids=lambda kind: kind.framework,
)
def test_a_dry_run_changes_nothing_and_says_the_same(kind: Kind, a_run) -> None:
    root = a_run(kind)
    before = contents(root, quarantine=True)
    code, answer = roll_back(kind, root, 30, "--dry-run")
    assert (code, answer["chosen"], answer["quarantined"]) == (0, 20, [30])
    assert contents(root, quarantine=True) == before
    assert roll_back(kind, root, 30) == (code, answer)
