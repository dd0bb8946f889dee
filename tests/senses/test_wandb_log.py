"""The W&B log reader: what it promises of any file, of real runs of wandb, and of damaged ones."""

import contextlib
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requirements import require
from senses.wandb_writer import WandbWriter, blob, framed, number
from stepguardd.sources.reward.rows import Row, StreamError
from stepguardd.sources.reward.wandb_log import FLUSH_VARIABLE, WandbLog, advice_for, run_files

TRAINER = Path(__file__).with_name("wandb_trainer.py")
ROOT = Path(__file__).parents[2]


def read_all(path: Path, **options: object) -> tuple[list[Row], WandbLog]:
    reader = WandbLog(path, **options)  # type: ignore[arg-type]
    rows: list[Row] = []
    while True:
        rows += reader.poll()
        if reader.caught_up:
            return rows, reader


def rewards(rows: list[Row]) -> list[tuple[int | None, float | None]]:
    return [(row.step, row.value) for row in rows if row.metric == "train/reward"]


def train(folder: Path, run_id: str, steps: range, *, older: Path | None = None, end: str = "finish") -> None:
    """Run the real wandb, or the one in the folder `older`, in a process group of its own, to its end."""
    command = [sys.executable, TRAINER, folder, run_id, steps[0], steps[-1], 0, end]
    paths = [] if older is None else [str(older)]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        timeout=60,
        start_new_session=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == (0 if end == "finish" else -9), done.stderr.decode()


def folder_of(root: Path, stamp: str, run_id: str) -> Path:
    return root / "wandb" / f"offline-run-{stamp}-{run_id}" / f"run-{run_id}.wandb"


def written(path: Path, *, rows: int = 5, style: str = "nested", **options: object) -> WandbWriter:
    writer = WandbWriter(path, style=style, **options)  # type: ignore[arg-type]
    for step in range(rows):
        writer.row(
            step,
            {
                "train/reward": step / 100,
                "train/global_step": step,
                "loss": math.nan if step == 3 else -0.5,
                "up": math.inf if step == 4 else 1,
                "down": -math.inf if step == 4 else 1,
                "nested.deep": step,
                "nothing": None,
                "flag": True,
                "text": "words",
                "list": [1, 2],
            },
            time=1.5e9 + step,
        )
    writer.exit()
    return writer


def own_nested(root: Path) -> Path:
    written(folder_of(root, "20260101_000000", "abc"))
    return root


def own_flat_keys(root: Path) -> Path:
    written(folder_of(root, "20260101_000000", "abc"), style="key", version="0.29.0")
    return root


def real_wandb(root: Path) -> Path:
    train(root, "abc", range(5))
    return root


def older_wandb() -> Path:
    """The folder of a wandb from before 0.31, which writes 32 KiB at a time."""
    folder = Path(os.environ.get("STEPGUARD_OLDER_WANDB", ROOT / ".frameworks" / "older-wandb"))
    if not (folder / "wandb").is_dir():
        require("older-wandb", f"no wandb in {folder}; tools/frameworks/get.sh brings one")
    return folder


def real_older_wandb(root: Path) -> Path:
    train(root, "abc", range(5), older=older_wandb())
    return root


@pytest.mark.parametrize("make", [own_nested, own_flat_keys, real_wandb, real_older_wandb])
def test_a_run_is_read_alike_whoever_wrote_it(make, tmp_path):
    """The contract of the tests' writer and of each version of wandb: every number once, with its step."""
    rows, reader = read_all(make(tmp_path))
    assert rewards(rows) == [(step, step / 100) for step in range(5)]
    values = {(row.step, row.metric): row.value for row in rows}
    assert math.isnan(values[3, "loss"])
    assert values[2, "loss"] == -0.5
    assert values[4, "up"] == math.inf
    assert values[4, "down"] == -math.inf
    assert values[4, "nested.deep"] == 4
    assert values[4, "nothing"] is None
    assert values[4, "flag"] == 1.0
    assert {row.metric for row in rows}.isdisjoint({"text", "list", "_step", "_timestamp", "_runtime"})
    assert all(row.time is not None and row.time > 1.4e9 for row in rows)
    assert reader.finished
    assert reader.unfinished() == ()
    assert reader.notes() == ()


@pytest.mark.e2e
def test_a_real_run_is_seen_while_it_is_written_and_over_a_kill_and_a_resumption(tmp_path):
    """Rows arrive while the writer lives; SIGKILL leaves no exit record; the resumed run goes on."""
    command = [sys.executable, TRAINER, tmp_path, "abc", 0, 19, 0.1, "kill"]
    with subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as trainer:
        reader = WandbLog(tmp_path)
        rows: list[Row] = []
        seen_alive = 0
        deadline = time.monotonic() + 40
        while trainer.poll() is None and time.monotonic() < deadline:
            rows += reader.poll()
            seen_alive = len(rewards(rows))
            time.sleep(0.02)
        assert trainer.wait(timeout=10) == -9
    assert seen_alive >= 10, "rows must be seen while the run lives"
    rows += reader.poll()
    assert rewards(rows) == [(step, step / 100) for step in range(20)]
    assert not reader.finished
    assert any("no exit record" in sentence for sentence in reader.unfinished())
    time.sleep(1.0)  # the folder of a resumption is told apart by the second in its name
    train(tmp_path, "abc", range(20, 25))
    while not reader.finished:
        rows += reader.poll()
        assert time.monotonic() < deadline + 40
    assert rewards(rows) == [(step, step / 100) for step in range(25)]
    assert any("without an exit record" in note for note in reader.notes())
    fresh, _ = read_all(tmp_path)
    assert repr(fresh) == repr(rows)


@pytest.mark.e2e
def test_an_older_writer_that_is_killed_loses_its_newest_rows_and_its_resumption_is_read(tmp_path):
    """wandb before 0.31 keeps up to 32 KiB to itself; its files are read through damage as well."""
    older = older_wandb()
    train(tmp_path, "abc", range(400), older=older, end="kill")
    rows, reader = read_all(tmp_path)
    seen = rewards(rows)
    assert 100 < len(seen) < 400, "some reached the disk, and the newest did not"
    assert seen == [(step, step / 100) for step in range(len(seen))]
    assert any("no exit record" in sentence for sentence in reader.unfinished())
    [file] = run_files(tmp_path)
    whole = file.path.read_bytes()
    for at in range(10_000, len(whole), len(whole) // 7):
        damaged = tmp_path / f"flipped-{at}.wandb"
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        left, through = read_all(damaged)
        steps = [step for step, _ in rewards(left)]
        assert steps == sorted(set(steps))
        assert set(rewards(left)) < set(seen)
        assert through.notes() or through.unfinished(), "what is lost is said"
    time.sleep(1.0)  # the folder of a resumption is told apart by the second in its name
    train(tmp_path, "abc", range(400, 405), older=older)
    rows, reader = read_all(tmp_path)
    assert rewards(rows) == [*seen, *((step, step / 100) for step in range(400, 405))]
    assert reader.finished
    assert any("without an exit record" in note for note in reader.notes())


@pytest.mark.parametrize("bytes_max", [1, 7, 100, 5000, 1 << 20])
def test_any_slicing_of_the_reads_gives_the_same_rows(bytes_max, tmp_path):
    """Small polls, records over several blocks, a file that grows: nothing lost, nothing twice."""
    source = tmp_path / "whole.wandb"
    writer = WandbWriter(source)
    for step in range(40):
        writer.row(step, {"reward": step, "wide": list(range(4000 if step % 10 == 3 else 3)), "k" * step: 1})
    expected, _ = read_all(source)
    assert len(expected) == 80 - 1 + 1
    data = source.read_bytes()
    growing = tmp_path / "run-abc.wandb"
    growing.write_bytes(b"")
    reader = WandbLog(growing)
    rows: list[Row] = []
    position: dict[str, object] = {}
    for size in [0, 3, 7, 40, 100, 33_000, 33_001, 70_000, 70_001, len(data)]:
        growing.write_bytes(data[:size])
        while True:
            rows += reader.poll(bytes_max)
            if reader.caught_up:
                break
        position = reader.position
        reader.close()
        reader = WandbLog(growing, position=position)  # and over a restart at every stop
    assert rows == expected
    assert reader.notes() == ()


def test_a_flipped_byte_costs_the_rest_of_its_block_and_is_said(tmp_path):
    source = tmp_path / "run-abc.wandb"
    writer = WandbWriter(source)
    for step in range(400):
        writer.row(step, {"train/reward": step})
    writer.exit()
    good, _ = read_all(source)
    data = bytearray(source.read_bytes())
    data[40_000] ^= 0x10
    source.write_bytes(data)
    rows, reader = read_all(source)
    lost = set(good) - set(rows)
    assert lost
    assert set(rows) < set(good)
    steps = [row.step for row in rows]
    assert steps == sorted(steps)
    assert steps[-1] == 399
    notes = reader.notes()
    assert any("damaged" in note for note in notes)
    assert any("records are lost" in note for note in notes)
    assert reader.finished


def test_a_cut_file_keeps_its_whole_records_and_names_the_torn_bytes(tmp_path):
    real_wandb(tmp_path)
    [file] = run_files(tmp_path)
    whole, _ = read_all(file.path)
    cut = tmp_path / "cut.wandb"
    size = file.path.stat().st_size
    for keep in range(8, size, max(1, size // 60)):
        cut.write_bytes(file.path.read_bytes()[:keep])
        rows, reader = read_all(cut)
        assert repr(rows) == repr(whole[: len(rows)])  # by their words, since NaN is not equal to itself
        assert not reader.finished
        assert any("no exit record" in sentence for sentence in reader.unfinished())
    cut.write_bytes(file.path.read_bytes()[:-3])
    _, reader = read_all(cut)
    assert any("no whole record" in sentence for sentence in reader.unfinished())


def test_the_files_of_a_resumed_run_are_read_in_order_and_other_runs_are_left_alone(tmp_path):
    for stamp, run_id, first in [
        ("20260101_000000", "abc", 0),
        ("20260101_000100", "other", 500),
        ("20260101_000200", "abc", 10),
    ]:
        writer = WandbWriter(folder_of(tmp_path, stamp, run_id), run_id=run_id)
        for step in range(first, first + 10):
            writer.row(step, {"train/reward": step})
    rows, reader = read_all(tmp_path)
    assert [row.step for row in rows] == list(range(20))
    assert reader.run_id == "abc"
    pinned, _ = read_all(tmp_path, run_id="other")
    assert [row.step for row in pinned] == list(range(500, 510))
    inside, _ = read_all(tmp_path / "wandb")
    assert inside == rows
    one, _ = read_all(tmp_path / "wandb" / "offline-run-20260101_000200-abc")
    assert [row.step for row in one] == list(range(10, 20))


def test_a_newer_run_is_gone_over_to_and_that_is_said(tmp_path):
    WandbWriter(folder_of(tmp_path, "20260101_000000", "one")).row(0, {"reward": 0.5})
    reader = WandbLog(tmp_path)
    assert [row.value for row in reader.poll()] == [0.5]
    assert reader.poll() == ()
    WandbWriter(folder_of(tmp_path, "20260102_000000", "two")).row(0, {"reward": 0.7})
    rows = [row for _ in range(3) for row in reader.poll()]
    assert [row.value for row in rows] == [0.7]
    assert reader.run_id == "two"
    assert any("newer run, two" in note for note in reader.notes())


def test_rows_that_come_late_into_an_older_file_are_not_passed_over(tmp_path):
    """The next file is begun when a look at the old one, made after the new one appeared, finds no more."""
    first = WandbWriter(folder_of(tmp_path, "20260101_000000", "abc"))
    first.row(0, {"reward": 0})
    WandbWriter(folder_of(tmp_path, "20260101_000100", "abc")).row(2, {"reward": 2})
    reader = WandbLog(tmp_path)
    rows = list(reader.poll())
    first.row(1, {"reward": 1})
    while not reader.caught_up:
        rows += reader.poll()
    assert [row.step for row in rows] == [0, 1, 2]


def test_a_chunk_that_is_seen_half_written_is_waited_for(tmp_path):
    """A network file system can show a file's new length before its new bytes."""
    path = tmp_path / "run-abc.wandb"
    writer = WandbWriter(path)
    writer.row(0, {"reward": 0})
    before = path.stat().st_size
    writer.row(1, {"reward": 1})
    whole = path.read_bytes()
    path.write_bytes(whole[: before + 9] + bytes(len(whole) - before - 9))
    reader = WandbLog(path)
    rows = list(reader.poll())
    assert [row.step for row in rows] == [0]
    path.write_bytes(whole)
    rows += reader.poll()
    assert [row.step for row in rows] == [0, 1]
    assert reader.notes() == ()


def test_a_position_survives_a_restart_between_files(tmp_path):
    """Stored in the first file; a second appears while the reader is away: nothing lost or twice."""
    first = WandbWriter(folder_of(tmp_path, "20260101_000000", "abc"))
    for step in range(10):
        first.row(step, {"reward": step})
    rows, reader = read_all(tmp_path)
    first.row(10, {"reward": 10})
    second = WandbWriter(folder_of(tmp_path, "20260101_000100", "abc"))
    second.row(11, {"reward": 11})
    more, _ = read_all(tmp_path, position=reader.position)
    assert [row.step for row in rows + more] == list(range(12))


def test_a_position_whose_file_is_gone_starts_over_and_says_so(tmp_path):
    own_nested(tmp_path)
    rows, reader = read_all(tmp_path, position={"file": "/nowhere/run-x.wandb", "offset": 99, "num": 3})
    assert len(rewards(rows)) == 5
    assert any("starting over" in note for note in reader.notes())


def test_nothing_there_yet_is_waited_for(tmp_path):
    reader = WandbLog(tmp_path)
    assert reader.poll() == ()
    assert reader.caught_up
    assert any("no W&B run here yet" in sentence for sentence in reader.unfinished())
    own_nested(tmp_path)
    assert len(rewards([row for _ in range(3) for row in reader.poll()])) == 5


def test_the_step_is_the_configured_key_else_the_global_step_else_wandbs_own(tmp_path):
    path = tmp_path / "run-abc.wandb"
    writer = WandbWriter(path)
    writer.row(100, {"reward": 1.0, "my/step": 7})
    writer.row(101, {"reward": 2.0, "train/global_step": 8})
    assert [row.step for row in read_all(path)[0] if row.metric == "reward"] == [100, 8]
    assert [row.step for row in read_all(path, step_key="my/step")[0] if row.metric == "reward"] == [7, None]


def test_typed_values_of_newer_writers_are_read_as_well(tmp_path):
    """wandb 0.31 declares fields for integer, number and none, and writes JSON text for now."""
    path = tmp_path / "run-abc.wandb"
    writer = WandbWriter(path)
    double = b"\x31" + struct.pack("<d", 0.25)
    items = [
        blob(1, blob(2, "a") + number(5, 5)),  # zigzag: -3
        blob(1, blob(2, "b") + double),
        blob(1, blob(1, "c") + number(3, 0)),
        blob(1, blob(1, "d") + number(4, 1)),
        blob(1, blob(1, "e") + blob(7, "text")),
    ]
    writer.record(2, b"".join(items))
    rows, _ = read_all(path)
    assert {row.metric: row.value for row in rows} == {"a": -3.0, "b": 0.25, "c": None, "d": 1.0}


def test_another_kind_of_file_is_refused_by_name(tmp_path):
    path = tmp_path / "run-x.wandb"
    path.write_bytes(b"PK\x03\x04 not a log")
    with pytest.raises(StreamError, match=r"run-x\.wandb.*no W&B log"):
        read_all(path)
    path.write_bytes(b":W&B\xe1\xbe\x07")
    with pytest.raises(StreamError, match="version 7"):
        read_all(path)


def test_the_advice_names_the_line_to_add():
    assert FLUSH_VARIABLE in advice_for("0.31.0")
    assert "every 15 s" in advice_for("0.31.2")
    assert "lost in a kill" in advice_for("0.30.0")
    assert "lost in a kill" in advice_for("0.9.1")


def test_an_overlong_record_is_skipped_as_damage(tmp_path):
    """A first chunk whose record never ends does not stop the reader for good."""
    path = tmp_path / "run-abc.wandb"
    writer = WandbWriter(path)
    first = framed([bytes(70_000)], path.stat().st_size)[: 32 * 1024 - path.stat().st_size]
    with path.open("ab") as file:
        file.write(first)
    writer.row(5, {"reward": 0.5})
    rows, _ = read_all(path)
    assert [row.step for row in rows] == [5]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_bytes_make_it_raise_anything_but_its_own_error(data, tmp_path_factory):
    """Flipped, cut, overwritten and random bytes: rows, notes or StreamError, and always an end."""
    path = tmp_path_factory.mktemp("fuzz") / "run-abc.wandb"
    written(path, rows=3)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
        raw = raw or bytearray(b"x")
    path.write_bytes(raw)
    with contextlib.suppress(StreamError):
        read_all(path)


@settings(max_examples=150, deadline=None)
@given(record=st.binary(max_size=200))
def test_no_record_makes_it_raise(record, tmp_path_factory):
    """Sound chunks around a record that is no message."""
    path = tmp_path_factory.mktemp("fuzz") / "run-abc.wandb"
    writer = WandbWriter(path)
    for field in (2, 17, 18, 21):
        writer.record(field, record)
    with path.open("ab") as file:
        file.write(framed([record], path.stat().st_size))
    writer.row(1, {"reward": 1})
    rows, _ = read_all(path)
    assert rows[-1].metric == "reward"


def test_a_moved_run_keeps_its_rows(tmp_path):
    """A file that is read while its folder is moved away stays readable to its end."""
    own_nested(tmp_path)
    reader = WandbLog(tmp_path)
    first = reader.poll(700)
    shutil.move(tmp_path / "wandb", tmp_path / "elsewhere")
    rest = [row for _ in range(10) for row in reader.poll()]
    assert len(rewards([*first, *rest])) == 5
