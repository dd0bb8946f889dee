"""Every format behind the one interface: what each promises alike, and what is its own."""

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requirements import require
from senses.event_writer import framed_event, scalar_event, write_events
from senses.wandb_writer import WandbWriter
from stepguardd.sources.reward.formats import Format, detect, open_stream
from stepguardd.sources.reward.jsonl import JsonLines
from stepguardd.sources.reward.rows import Reader, Row, StreamError
from stepguardd.sources.reward.table import Csv, LogTable
from stepguardd.sources.reward.tensorboard import EventFiles, is_event_file, masked_crc32c


def drain(reader: Reader) -> list[Row]:
    rows: list[Row] = []
    for _ in range(10_000):
        rows += reader.poll()
        if reader.caught_up:
            return rows
    raise AssertionError("the reader never catches up")


def wandb_file(path: Path, steps: range) -> Path:
    file = path / "run-abc.wandb"
    writer = WandbWriter(file)
    for step in steps:
        writer.row(step, {"reward": step / 4}, time=float(step))
    return file


def event_file(path: Path, steps: range) -> Path:
    file = path / "events.out.tfevents.1500000000.host"
    write_events(file, [scalar_event(step, "reward", step / 4, time=float(step)) for step in steps])
    return file


def json_file(path: Path, steps: range) -> Path:
    file = path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s, "time": float(s), "reward": s / 4}) + "\n" for s in steps))
    return file


def csv_file(path: Path, steps: range) -> Path:
    file = path / "metrics.csv"
    file.write_text("step,time,reward\n" + "".join(f"{s},{float(s)},{s / 4}\n" for s in steps))
    return file


def log_file(path: Path, steps: range) -> Path:
    file = path / "train.log"
    file.write_text("noise\n" + "".join(f"(main pid=7) step:{s} - reward:{s / 4}\n" for s in steps))
    return file


FORMATS = pytest.mark.parametrize("make", [wandb_file, event_file, json_file, csv_file, log_file])
Make = Callable[[Path, range], Path]


@FORMATS
def test_every_format_gives_the_same_rows(make: Make, tmp_path: Path):
    """Step, name as logged, value, and the wall time where the format keeps one."""
    reader = open_stream(make(tmp_path, range(20)))
    rows = drain(reader)
    assert [(row.step, row.metric, row.value) for row in rows] == [(s, "reward", s / 4) for s in range(20)]
    assert {row.time for row in rows} in ({None}, {float(s) for s in range(20)})
    assert drain(reader) == []
    json.dumps(reader.position)
    reader.close()


@FORMATS
def test_every_format_goes_on_from_a_stored_position(make: Make, tmp_path: Path):
    """The file grows byte by byte over restarts of the reader: no row is lost, none is doubled."""
    whole = make(tmp_path, range(8))
    expected = drain(open_stream(whole))
    data = whole.read_bytes()
    folder = tmp_path / "growing"
    folder.mkdir()
    growing = folder / whole.name
    growing.write_bytes(data[:20])
    position: dict[str, object] = {}
    kind = detect(whole)
    rows: list[Row] = []
    for size in range(20, len(data) + 1, 13):
        with growing.open("ab") as file:
            file.write(data[growing.stat().st_size : size])
        reader = open_stream(growing, format_=kind, position=json.loads(json.dumps(position)))
        rows += drain(reader)
        position = reader.position
        reader.close()
    with growing.open("ab") as file:
        file.write(data[growing.stat().st_size :])
    rows += drain(open_stream(growing, format_=kind, position=position))
    assert rows == expected


@FORMATS
def test_every_format_names_a_torn_tail(make: Make, tmp_path: Path):
    file = make(tmp_path, range(8))
    file.write_bytes(file.read_bytes()[:-3])
    reader = open_stream(file)
    assert len(drain(reader)) == 7
    assert any("no whole" in sentence for sentence in reader.unfinished())


@FORMATS
def test_every_format_waits_for_a_file_that_is_not_there_yet(make: Make, tmp_path: Path):
    later = make(tmp_path, range(3))
    kind = detect(later)
    moved = later.rename(tmp_path / "elsewhere")
    reader = open_stream(later, format_=kind)
    assert drain(reader) == []
    moved.rename(later)
    assert len(drain(reader)) == 3


@FORMATS
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_bytes_make_a_reader_raise_anything_but_its_error(
    make: Make, data: st.DataObject, tmp_path_factory
):
    """Damage anywhere: rows, notes or StreamError, and always an end."""
    file = make(tmp_path_factory.mktemp("fuzz"), range(4))
    kind = detect(file)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(
            st.binary(max_size=8)
            | st.sampled_from([b"\n", b"[" * 5000, b"{" * 9, b"9" * 5000, b"NaN", b'"', b"\0"])
        )
    file.write_bytes(raw)
    with contextlib.suppress(StreamError):
        reader = open_stream(file, format_=kind)
        for row in drain(reader):
            assert row.step is None or isinstance(row.step, int)
            assert row.value is None or isinstance(row.value, float)
        reader.unfinished()
        reader.notes()


@pytest.mark.parametrize("reader", [JsonLines, Csv, LogTable, EventFiles])
@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=400))
def test_random_bytes_are_no_trouble_either(reader, raw: bytes, tmp_path_factory):
    file = tmp_path_factory.mktemp("fuzz") / "file"
    file.write_bytes(raw + b"\n")
    with contextlib.suppress(StreamError):
        drain(reader(file))


@settings(max_examples=60, deadline=None)
@given(
    position=st.dictionaries(
        st.sampled_from(["inode", "offset", "mark", "file", "num", "columns", "step", "next_step"]),
        st.none()
        | st.booleans()
        | st.integers(-5, 1 << 40)
        | st.text(max_size=8)
        | st.lists(st.integers(), max_size=2),
    )
)
def test_no_stored_position_makes_a_reader_raise_anything_but_its_error(position, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for make in (wandb_file, event_file, json_file, csv_file, log_file):
        file = make(folder, range(3))
        position["inode"] = file.stat().st_ino if "inode" in position else 0
        with contextlib.suppress(StreamError):
            drain(open_stream(file, position=position))


def test_json_lines_of_verl_prime_rl_and_miles_are_known(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 3, "data": {"critic/score/mean": 0.5, "training/global_step": 3}},
        {"step": 4, "time": 9.0, "train/agg/effective/math/reward/mean": 0.25},
        {
            "ts": 8.5,
            "step_key": "rollout/step",
            "step": 5,
            "metrics": {"rollout/raw_reward": 0.75, "n": None},
        },
        {"step": 6, "reward": math.nan, "deep": {"er": math.inf}, "words": "no", "odd": "NaN", "list": [1]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not json\n[1]\n\n")
    reader = JsonLines(file)
    rows = drain(reader)
    assert rows[0] == Row(3, "critic/score/mean", 0.5, None)
    assert Row(4, "train/agg/effective/math/reward/mean", 0.25, 9.0) in rows
    assert Row(5, "rollout/raw_reward", 0.75, 8.5) in rows
    assert Row(5, "n", None, 8.5) in rows
    assert Row(6, "deep.er", math.inf, None) in rows
    assert {row.metric for row in rows if row.step == 6} == {"reward", "deep.er", "odd"}
    assert any("2 lines are no JSON objects" in sentence for sentence in reader.unfinished())
    assert any("not json" in note for note in reader.notes())


def test_the_configured_step_key_is_taken_and_nothing_else(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "my": 7, "reward": 0.5}\n{"step": 2, "reward": 0.5}\n')
    assert [row.step for row in drain(JsonLines(file, step_key="my")) if row.metric == "reward"] == [7, None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "step:12 - global_seqlen/min:5 - critic/score/mean:0.03 - val-core/x/mean@1:np.float64(0.5)",
            [
                (12, "global_seqlen/min", 5.0),
                (12, "critic/score/mean", 0.03),
                (12, "val-core/x/mean@1", 0.5),
            ],
        ),
        (
            "[2026-01-01 00:00:00] train.py:7 - rollout 5: {'rollout/raw_reward': 0.25, 'rollout/n': None}",
            [(5, "rollout/raw_reward", 0.25), (5, "rollout/n", None)],
        ),
        (
            "{'loss': '0.1', 'reward': 0.75, 'epoch': nan}",
            [(None, "loss", 0.1), (None, "reward", 0.75), (None, "epoch", math.nan)],
        ),
        ("{'global_step': 9, 'reward': 1}", [(9, "global_step", 9.0), (9, "reward", 1.0)]),
        (
            "Epoch 1/2 Step 3/9 Train step 13/100 done.\nStats (1/1):\n"
            "╒═══╤═══╕\n│ ppo_actor/task_reward/avg │ 4.5000e-01 │ lr │ 1e-5 │\n├───┤\n| plain | -2 |",
            [(12, "ppo_actor/task_reward/avg", 0.45), (12, "lr", 1e-5), (12, "plain", -2.0)],
        ),
        ("INFO step=40 reward=0.5 loss=-1e-3 name=abc", [(40, "reward", 0.5), (40, "loss", -1e-3)]),
        ("GET /health 200 in 1.5 s; retries=3", []),
    ],
)
def test_the_known_shapes_of_log_lines(text, expected, tmp_path):
    file = tmp_path / "train.log"
    file.write_text(text + "\n")
    rows = [(row.step, row.metric, row.value) for row in drain(LogTable(file))]
    assert repr(rows) == repr(expected)


def test_a_pattern_of_ones_own_replaces_the_known_shapes(tmp_path):
    file = tmp_path / "train.log"
    file.write_text("iter 3 R=0.5\niter 4 R=oops\niter 5 R=0.75\n")
    reader = LogTable(file, pattern=r"iter (?P<step>\d+) R=(?P<value>\S+)")
    assert drain(reader) == [Row(3, "reward", 0.5, None), Row(5, "reward", 0.75, None)]
    with pytest.raises(StreamError, match="no regular expression"):
        LogTable(file, pattern="(")
    with pytest.raises(StreamError, match="no group"):
        LogTable(file, pattern="x")


def test_a_csv_needs_its_header_and_leaves_odd_lines_out(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text('step,reward,note\n1,0.5,"a, b"\n2,,x\n3,NaN,\n4,0.5\n')
    reader = Csv(file)
    rows = [row for row in drain(reader) if row.metric == "reward"]
    assert [(row.step, repr(row.value)) for row in rows] == [(1, "0.5"), (2, "None"), (3, "nan")]
    assert any("2 cells, not 3" in note for note in reader.notes())
    file.write_text("1,2\n3,4\n")
    with pytest.raises(StreamError, match="names no columns"):
        drain(Csv(file))


def test_all_scalar_forms_of_event_files_are_read_in_the_order_of_the_files(tmp_path):
    write_events(tmp_path / "events.out.tfevents.200.host", [scalar_event(3, "r", 0.75, form="double")])
    write_events(
        tmp_path / "events.out.tfevents.100.host",
        [scalar_event(1, "r", 0.25), scalar_event(2, "r", 0.5, form="tensor")],
    )
    reader = EventFiles(tmp_path)
    assert [(row.step, row.value) for row in drain(reader)] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    write_events(tmp_path / "events.out.tfevents.300.host", [scalar_event(4, "r", 1.0)])
    assert [row.step for row in drain(reader)] == [4]
    assert "flush_secs" in (reader.advice() or "")


def test_a_damaged_event_costs_itself_and_a_damaged_length_the_rest(tmp_path):
    file = tmp_path / "events.out.tfevents.100.host"
    write_events(file, [scalar_event(step, "r", 0.5) for step in range(6)])
    whole = file.read_bytes()
    size = len(framed_event(scalar_event(1, "r", 0.5)))
    damaged = bytearray(whole)
    damaged[-size + 20] ^= 1
    file.write_bytes(damaged)
    reader = EventFiles(file)
    assert len(drain(reader)) == 5
    assert any("damaged event" in note for note in reader.notes())
    damaged = bytearray(whole)
    damaged[-2 * size] ^= 1
    file.write_bytes(damaged)
    reader = EventFiles(file)
    assert len(drain(reader)) == 4
    assert any("rest of this file" in note for note in reader.notes())


def test_the_checksum_is_crc32c():
    """The check value of CRC-32C, as the mask leaves it."""
    crc = 0xE3069283
    assert masked_crc32c(b"123456789") == (((crc >> 15 | crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def test_an_event_of_many_kilobytes_is_read_whole(tmp_path):
    file = tmp_path / "events.out.tfevents.100.host"
    write_events(file, [scalar_event(1, "x" * 9000, 0.5), scalar_event(2, "r", 0.5)])
    reader = EventFiles(file)
    rows = []
    for _ in range(50):
        rows += reader.poll(100)
    assert [row.step for row in rows] == [1, 2]


def test_a_real_summary_writer_is_read(tmp_path):
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as missing:
        require("tensorboard", str(missing))
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(5):
            writer.add_scalar("train/reward", step / 4, step)
    assert [(row.step, row.value) for row in drain(EventFiles(tmp_path))] == [(s, s / 4) for s in range(5)]


def test_a_rotated_a_cut_and_a_rewritten_file_are_told_apart(tmp_path):
    file = json_file(tmp_path, range(3))
    reader = JsonLines(file)
    assert len(drain(reader)) == 3
    with file.open("a") as more:
        more.write('{"step": 3, "reward": 1}\n')
    file.rename(tmp_path / "metrics.jsonl.1")
    file.write_text('{"step": 4, "reward": 1}\n')
    assert [row.step for row in drain(reader)] == [3, 4]
    file.write_text("")
    assert drain(reader) == []
    file.write_text('{"step": 5, "reward": 1}\n')
    assert [row.step for row in drain(reader)] == [5]
    file.write_text('{"step": 6, "reward": 1}\n{"step": 7, "reward": 1}\n')
    assert [row.step for row in drain(reader)] == [6, 7], "written anew, and longer than before"
    assert any("cut or written anew" in note for note in reader.notes())


def test_a_file_rotated_while_the_reader_was_away_is_read_to_its_end_first(tmp_path):
    file = json_file(tmp_path, range(3))
    reader = JsonLines(file)
    drain(reader)
    with file.open("a") as more:
        more.write('{"step": 3, "reward": 1}\n')
    file.rename(tmp_path / "metrics.jsonl.1")
    file.write_text('{"step": 4, "reward": 1}\n')
    assert [row.step for row in drain(JsonLines(file, position=reader.position))] == [3, 4]


def test_the_format_is_told_from_the_content(tmp_path):
    (tmp_path / "odd.name").write_text('{"step": 1}\n')
    assert detect(tmp_path / "odd.name") is Format.JSONL
    assert is_event_file(event_file(tmp_path, range(1)).read_bytes())
    (tmp_path / "empty.wandb").write_bytes(b"")
    assert detect(tmp_path / "empty.wandb") is Format.WANDB
    for name, content in {
        "image.png": b"\x89PNG\0",
        "notes.md": b"# words\n",
        "zeros.log": bytes(99),
        "e": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StreamError, match="not a metric stream"):
            detect(tmp_path / name)
    with pytest.raises(StreamError, match="No such file"):
        detect(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StreamError, match="no W&B run"):
        detect(tmp_path / "folder")


def test_an_unreadable_file_is_named(tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "dir.jsonl").mkdir()
        with pytest.raises(StreamError, match=r"dir\.jsonl"):
            drain(JsonLines(tmp_path / "dir.jsonl"))
    else:
        file = json_file(tmp_path, range(1))
        file.chmod(0)
        with pytest.raises(StreamError, match="Permission"):
            drain(JsonLines(file))
