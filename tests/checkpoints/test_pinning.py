"""A pin survives whatever the framework does to the original, and costs only what it must."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from runs_on_disk import KINDS, Kind, areal, contents, dcp_folder, torch_file

from requirements import require
from stepguardd.checkpoints import disk
from stepguardd.checkpoints.layouts import PINNED, Checkpoint, Framework, find_checkpoints, find_pins
from stepguardd.checkpoints.pinning import PinError, costs_space, pin, release
from stepguardd.checkpoints.rollback import plan_rollback, roll_back, undo
from stepguardd.checkpoints.vetting import Verdict, vet_all

BY_NAME = {kind.framework: kind for kind in KINDS}
FOLDERS = [kind for kind in KINDS if not kind.slot]


def step_20(kind: Kind, root: Path) -> Checkpoint:
    return next(c for c in find_checkpoints(kind.open(root)) if c.step == 20)


@pytest.mark.parametrize("kind", FOLDERS, ids=lambda kind: kind.framework)
def test_a_pin_outlives_rotation_and_can_be_gone_back_to(kind: Kind, a_run) -> None:
    root = a_run(kind)
    folder = kind.open(root)
    whole = contents(root)
    original = step_20(kind, root)
    pin(folder, original)
    assert contents(root / PINNED / "step-20", quarantine=True).items() <= whole.items()
    for part in original.parts:
        path = root / part.path
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    checkpoints = find_checkpoints(folder)
    left = next(c for c in checkpoints if c.step == 20)
    assert left.pinned
    assert [v.verdict for v in vet_all(folder, checkpoints)] == [Verdict.GOOD] * 3
    rotated = contents(root)
    roll_back(folder, plan_rollback(folder, checkpoints, left, "night"))
    assert not step_20(kind, root).pinned
    for path in contents(root):
        if not path.startswith(PINNED) and path not in kind.markers:
            assert contents(root)[path] == whole[path]
    undo(root)
    assert contents(root) == rotated


def test_hard_links_cost_nothing_and_copies_are_made_where_files_are_rewritten(a_run) -> None:
    for kind in KINDS:
        folder = kind.open(a_run(kind))
        if kind.slot:
            continue
        target = pin(folder, step_20(kind, folder.root))
        files = [path for path in target.rglob("*") if path.is_file()]
        assert {path.stat().st_nlink for path in files} == ({1} if costs_space(folder) else {2})


def test_a_slot_rewritten_in_place_leaves_its_pin_as_it_was(a_run) -> None:
    root = a_run(BY_NAME[Framework.AREAL])
    kept = contents(root / PINNED, quarantine=True)
    shutil.rmtree(root / "default/recover_checkpoint")
    dcp_folder(root / "default/recover_checkpoint", 99, finite=False)
    assert contents(root / PINNED, quarantine=True) == kept
    areal(root, 40)
    assert [p.step for p in find_pins(BY_NAME[Framework.AREAL].open(root))] == [10, 20, 30]


def test_pinning_twice_and_releasing_twice_is_no_trouble(a_run) -> None:
    root = a_run(BY_NAME[Framework.TRL])
    folder = BY_NAME[Framework.TRL].open(root)
    before = contents(root)
    assert pin(folder, step_20(BY_NAME[Framework.TRL], root)) == pin(
        folder, step_20(BY_NAME[Framework.TRL], root)
    )
    release(folder, 20)
    release(folder, 20)
    assert contents(root) == before


def test_an_unfinished_pin_of_a_crash_is_not_taken_for_one(a_run) -> None:
    root = a_run(BY_NAME[Framework.TRL])
    folder = BY_NAME[Framework.TRL].open(root)
    torch_file(root / PINNED / ".step-20.partial/checkpoint-20/optimizer.pt", 20)
    assert find_pins(folder) == []
    pin(folder, step_20(BY_NAME[Framework.TRL], root))
    assert [p.step for p in find_pins(folder)] == [20]
    assert not (root / PINNED / ".step-20.partial").exists()


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        require("mount", "a small file system cannot be mounted here")
    try:
        kind = BY_NAME[Framework.DCP]
        dcp_folder(small / "ckpt-20", 20)
        (small / "ckpt-20/ballast").write_bytes(os.urandom(60_000))
        before = contents(small)
        with pytest.raises(PinError, match="free some space"):
            pin(kind.open(small), step_20(kind, small))
        assert contents(small) == before
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_copying_keeps_times_modes_and_links(tmp_path: Path) -> None:
    source = tmp_path / "a"
    (source / "deep").mkdir(parents=True)
    (source / "deep/file").write_text("x")
    (source / "deep/file").chmod(0o640)
    (source / "link").symlink_to("deep/file")
    (source / "folder").symlink_to("deep")
    os.utime(source / "deep/file", ns=(1, 2))
    for link in (False, True):
        target = tmp_path / f"b{link}"
        disk.copy_tree(source, target, link=link)
        assert contents(target) == contents(source)
        assert disk.fingerprint(target / "deep") == disk.fingerprint(source / "deep")
        assert (target / "deep/file").stat().st_mode & 0o777 == 0o640
