"""Vetting happens in a small process of its own, and whatever becomes of it, the answer is a verdict."""

import os
import signal
from pathlib import Path

import psutil
import pytest
from runs_on_disk import KINDS, Kind, contents

from stepguardd.checkpoints.layouts import Framework, find_checkpoints, surroundings
from stepguardd.checkpoints.vetting import Depth, Finding, Verdict, Vetter, Vetting, VettingLimits, vet_all
from stepguardd.checkpoints.vetting_process import NICENESS, _Pace

TRL = next(kind for kind in KINDS if kind.framework is Framework.TRL)


def vet_newest(kind: Kind, root: Path, limits: VettingLimits | None = None, **more) -> Vetting:
    folder = kind.open(root)
    checkpoints = find_checkpoints(folder)
    around = surroundings(folder, checkpoints)
    with Vetter(limits) as vetter:
        return vetter.vet(folder, checkpoints[-1], around[-1], **more)


@pytest.fixture
def large(a_run) -> Path:
    """A run whose newest checkpoint takes a while to read at the slow rates used here."""
    import torch
    from safetensors.torch import save_file

    root = a_run(TRL)
    save_file({"w": torch.zeros(1 << 20)}, root / "checkpoint-30/model.safetensors")
    return root


SLOW = VettingLimits(bytes_per_s=1 << 20)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.framework)
def test_a_good_checkpoint_of_every_kind_is_good_and_untouched(kind: Kind, a_run) -> None:
    """Nothing is written, created, removed or given another time."""
    root = a_run(kind)
    before = contents(root), _times(root)
    folder = kind.open(root)
    checkpoints = find_checkpoints(folder)
    verdicts = vet_all(folder, checkpoints)
    assert [v.verdict for v in verdicts] == [Verdict.GOOD] * 3, verdicts
    assert all(v.size_bytes > 0 and "finite" in v.reason for v in verdicts)
    assert (contents(root), _times(root)) == before


def _times(root: Path) -> dict[str, tuple[int, int]]:
    places = [root, *root.rglob("*")]
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_ctime_ns) for p in places}


def test_structure_alone_is_quick_and_says_that_numbers_were_not_read(a_run) -> None:
    root = a_run(TRL)
    TRL.spoil(root, 30)
    assert vet_newest(TRL, root).verdict is Verdict.BAD
    vetting = vet_newest(TRL, root, VettingLimits(depth=Depth.STRUCTURE))
    assert (vetting.verdict, vetting.reason) == (Verdict.GOOD, "complete; numbers were not read")


def vetters() -> list[psutil.Process]:
    """The vetting processes of this test alone: others may have left children of their own."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE
        and "stepguardd.checkpoints.vetting_process" in child.cmdline()
    ]


def test_the_process_is_niced_and_ends_with_its_vetter(large: Path) -> None:
    seen: list[tuple[int, int]] = []

    def look(read_bytes: int) -> None:
        child = vetters()[0]
        seen.append((child.pid, child.nice()))

    limits = VettingLimits(bytes_per_s=8 << 20)
    vetting = vet_newest(TRL, large, limits, progress=look)
    assert vetting.verdict is Verdict.GOOD
    assert seen
    assert seen[0][1] == min(19, psutil.Process().nice() + NICENESS)
    assert not psutil.pid_exists(seen[0][0])


def test_a_killed_process_costs_one_verdict_and_no_more(large: Path) -> None:
    folder = TRL.open(large)
    checkpoints = find_checkpoints(folder)
    around = surroundings(folder, checkpoints)

    def kill(read_bytes: int) -> None:
        os.kill(vetters()[0].pid, signal.SIGKILL)

    with Vetter(SLOW) as vetter:
        died = vetter.vet(folder, checkpoints[2], around[2], progress=kill)
        assert (died.verdict, died.finding) == (Verdict.UNKNOWN, Finding.DIED)
        assert "status -9" in died.reason
        assert vetter.vet(folder, checkpoints[0], around[0]).verdict is Verdict.GOOD


def test_it_can_be_cancelled(large: Path) -> None:
    asked: list[int] = []
    vetting = vet_newest(TRL, large, SLOW, progress=asked.append, cancelled=lambda: len(asked) > 0)
    assert (vetting.verdict, vetting.finding) == (Verdict.UNKNOWN, Finding.CANCELLED)
    assert not vetters()


def test_a_stalled_process_is_ended(large: Path) -> None:
    """Stopped here by a signal; in life by a network mount that no longer answers."""

    def stop(read_bytes: int) -> None:
        vetters()[0].suspend()

    limits = VettingLimits(bytes_per_s=1 << 20, stall_s=0.3)
    vetting = vet_newest(TRL, large, limits, progress=stop)
    assert vetting.finding in {Finding.STALLED, Finding.DIED}
    assert not vetters()


def test_what_needs_more_memory_than_allowed_is_unknown(a_run) -> None:
    """A header of 100 MB may be a valid file; parsing it may not swallow the machine."""
    root = a_run(TRL)
    header = b'{"a":' + b"[" * 30_000_000
    path = root / "checkpoint-30/model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    vetting = vet_newest(TRL, root, VettingLimits(memory_mib=120))
    assert vetting.verdict in {Verdict.UNKNOWN, Verdict.BAD}
    big = b'{"a":"' + b"x" * 90_000_000 + b'"}'
    path.write_bytes(len(big).to_bytes(8, "little") + big)
    vetting = vet_newest(TRL, root, VettingLimits(memory_mib=120))
    assert (vetting.verdict, vetting.finding) == (Verdict.UNKNOWN, Finding.MEMORY)


def test_a_checkpoint_still_being_written_is_unknown(large: Path) -> None:
    touched: list[int] = []

    def write_on(read_bytes: int) -> None:
        if not touched:
            (large / "checkpoint-30/trainer_state.json").write_text('{"global_step": 30, "later": 1}')
        touched.append(read_bytes)

    vetting = vet_newest(TRL, large, VettingLimits(bytes_per_s=8 << 20), progress=write_on)
    assert touched
    assert (vetting.verdict, vetting.finding) == (Verdict.UNKNOWN, Finding.CHANGED)


def test_a_folder_that_vanishes_is_unknown(a_run) -> None:
    import shutil

    root = a_run(TRL)
    folder = TRL.open(root)
    checkpoints = find_checkpoints(folder)
    around = surroundings(folder, checkpoints)
    shutil.rmtree(root / "checkpoint-30")
    with Vetter() as vetter:
        vetting = vetter.vet(folder, checkpoints[-1], around[-1])
    assert vetting.verdict in {Verdict.UNKNOWN, Verdict.INCOMPLETE}


def test_a_link_out_of_the_folder_is_not_followed(a_run, tmp_path: Path) -> None:
    root = a_run(TRL)
    weights = root / "checkpoint-30/model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    vetting = vet_newest(TRL, root)
    assert (vetting.verdict, vetting.finding) == (Verdict.UNKNOWN, Finding.LINK)


def test_the_pace_keeps_to_its_limit_and_tells_on_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        assert 0 < seconds <= 1.0
        now[0] += seconds

    pace = _Pace(1 << 20, now=lambda: now[0], sleep=sleep)
    for _ in range(64):
        pace.spent(1 << 18)
    assert now[0] == pytest.approx(16.0)
    assert capsys.readouterr().out.count("read_bytes") == 64
    _Pace(None, now=lambda: now[0], sleep=sleep).spent(1 << 40)
    assert now[0] == pytest.approx(16.0)
