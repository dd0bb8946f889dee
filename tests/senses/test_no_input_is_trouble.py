"""Whatever a source reads, only its declared error comes out: one row per reader, and none is forgotten."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stepguardd.sources
from stepguard.cgroups import find_memory_cgroup, parse_kills
from stepguardd import proc
from stepguardd.core.events import Answer, Event, OperatorAsked, RewardLogged, Role
from stepguardd.core.state import Mode, Settings, initial
from stepguardd.sources.cgroups import parse_pressure, pressure_warning
from stepguardd.sources.kmsg import parse_journal_line, parse_record
from stepguardd.sources.nvml import Gpu, GpuProcess, Xid
from stepguardd.sources.oom import KernelKills, size_bytes
from stepguardd.sources.pausefile import PauseFile
from stepguardd.sources.reward.jsonl import JsonLines
from stepguardd.sources.sglang import Reply, open_requests, read_metrics, snapshot_time, weight_version
from stepguardd.sources.signatures import SIGNATURES
from stepguardd.sources.stream import RewardStream
from stepguardd.surroundings.gpus import GpuTroubles
from stepguardd.surroundings.owners import Owners

SOURCES = Path(stepguardd.sources.__file__).parent
TESTS = Path(__file__).parents[1]
KILL = (
    b"3,424,4132400095,-;Memory cgroup out of memory: Killed process 5361 (python3) total-vm:78260kB, "
    b"anon-rss:67712kB, file-rss:6620kB, shmem-rss:4kB, UID:1000 pgtables:196kB oom_score_adj:-17\n"
)
PRESSURE = (
    b"some avg10=31.50 avg60=4.00 avg300=1.00 total=9\nfull avg10=0.25 avg60=0.10 avg300=0.00 total=3\n"
)
MOUNT = b"40 30 0:29 /docker/abc /sys/fs/cgr\\040oup rw - cgroup2 cgroup rw,nsdelegate\n"
STAT = b"7 (a) S 1 7 7 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 1 0 4711 8192 1 184467 1 1 0"
ENTRY = json.dumps({"MESSAGE": "words", "_SOURCE_MONOTONIC_TIMESTAMP": "5000000"}).encode()
RAY = next(row.example for row in SIGNATURES if row.sign.value == "ray_memory_kill").encode()
LOADS = b'{"loads": [{"num_running_reqs": 3, "timestamp": 4132.5}]}'
OPEN = b'sglang:http_requests_active{endpoint="/generate",method="POST"} 3.0\n'
METRICS = b'sglang:num_running_reqs{dp="0"} 3.0\nsglang:generation_tokens_total 12.0\n'


def _text(read: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda raw: read(raw.decode("latin-1"))


def _kill(raw: bytes) -> object:
    message = parse_record(raw)
    return None if message is None else KernelKills(lambda _pid, _name: Role.UNKNOWN).take(message)


READERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "PSI": (_text(lambda text: pressure_warning(parse_pressure(text))), PRESSURE),
    "memory.events": (_text(parse_kills), b"low 0\nhigh 7\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n"),
    "/proc/PID/cgroup": (_text(lambda text: find_memory_cgroup(text, MOUNT.decode())), b"0::/docker/abc/x\n"),
    "mountinfo": (_text(lambda text: find_memory_cgroup("0::/docker/abc\n", text)), MOUNT),
    "/proc/PID/stat": (proc.parse_stat, STAT),
    "kmsg": (_kill, KILL),
    "journald": (parse_journal_line, ENTRY),
    "sizes": (_text(size_bytes), b"2.00 GiB"),
    "Ray's memory monitor": (lambda raw: [row.facts(raw) for row in SIGNATURES], RAY),
    "/v1/loads": (snapshot_time, LOADS),
    "open requests": (open_requests, OPEN),
    "/metrics": (read_metrics, METRICS),
    "/model_info": (
        lambda raw: weight_version(Reply(answer=Answer.OK, body=raw)),
        b'{"model_path": "/m", "weight_version": "7"}',
    ),
}
"""What each reads, and a sound example; none of these declares an error: what it cannot read is None."""

TRIED_ELSEWHERE = {
    "lines": "senses/test_logs.py::test_no_bytes_are_trouble_and_no_line_is_seen_twice",
    "logs": "senses/test_logs.py::test_no_bytes_are_trouble_and_no_line_is_seen_twice",
    "signatures": "senses/test_logs.py::test_no_mutated_line_makes_a_pattern_raise_or_hang",
    "trainer": "guard/test_reports.py::@given(st.binary(max_size=200)",
    "reward/aliases": "senses/test_aliases.py::@given(names=",
    "reward/wandb_api": "senses/test_wandb_api.py::@given(",
    "reward/wandb_log": "senses/test_wandb_log.py::test_no_bytes_make_it_raise_anything_but_its_own_error",
    "reward/wandb_frames": "senses/test_wandb_log.py::test_no_bytes_make_it_raise_anything_but_its_own_error",
    "reward/wandb_records": "senses/test_wandb_log.py::test_no_record_makes_it_raise",
    "reward/wire": "senses/test_wandb_log.py::test_no_record_makes_it_raise",
    **{
        f"reward/{name}": "senses/test_readers.py::test_no_bytes_make_a_reader_raise_anything_but_its_error"
        for name in ("formats", "jsonl", "rows", "table", "tensorboard")
    },
}
TRIED_HERE = {"cgroups", "gpu", "kmsg", "nvml", "oom", "pausefile", "process", "sglang", "stream"} | {
    "trainer_tree"  # it finds processes as `process` does
}


def _mutated(data: st.DataObject, example: bytes) -> bytes:
    raw = bytearray(example)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 6))] = data.draw(
            st.binary(max_size=6)
            | st.sampled_from([b"9" * 5000, b"[" * 3000, b"NaN", b"-1", b"null", b"1e999", b"\n", b"\0"])
        )
    return bytes(raw)


@pytest.mark.parametrize("what", READERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_bytes_make_a_source_raise(what: str, data: st.DataObject) -> None:
    read, example = READERS[what]
    assert read(example) is not None, "the example means something"
    read(_mutated(data, example))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_stream_and_no_pause_file_are_trouble(data: st.DataObject, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    told: list[Event] = []
    file = folder / "metrics.jsonl"
    file.write_bytes(_mutated(data, b'{"step": 1, "reward": 0.5, "loss": NaN}\n{"step": 2, "reward": 1}\n'))
    stream = RewardStream(lambda: JsonLines(file), str(file), "auto", told.append)
    asyncio.run(stream.look())
    assert all(isinstance(event, RewardLogged) for event in told)
    told.clear()
    (folder / "PAUSE").write_bytes(_mutated(data, b"looking at the curve\n"))
    PauseFile(folder, lambda: initial(Settings(), Mode.HOLD, ()), told.append).look()
    assert [type(event) for event in told] == [OperatorAsked]


_numbers = st.none() | st.integers(-(2**63), 2**64)
_gpus = st.lists(
    st.builds(
        Gpu,
        index=st.integers(0, 2),
        uuid=st.none() | st.sampled_from(["GPU-a", "GPU-b"]),
        lost=st.booleans(),
        used_bytes=_numbers,
        total_bytes=_numbers,
        ecc_uncorrected=_numbers,
        processes=st.none()
        | st.lists(st.builds(GpuProcess, pid=st.integers(0, 2**32 - 1), used_bytes=_numbers), max_size=3).map(
            tuple
        ),
    ),
    max_size=3,
).map(tuple)
_xids = st.lists(st.builds(Xid, uuid=st.sampled_from([None, "GPU-a"]), number=st.integers(0, 2**64 - 1)))


@settings(max_examples=40, deadline=None)
@given(looks=st.lists(st.tuples(st.none() | _gpus, _xids), max_size=8))
def test_no_values_of_a_driver_are_trouble(looks: list[tuple[tuple[Gpu, ...] | None, list[Xid]]]) -> None:
    troubles = GpuTroubles(Owners())
    for number, (gpus, xids) in enumerate(looks):
        for told in troubles.look(200.0 * number, gpus, xids):
            assert "\n" not in told.text


def _files() -> set[str]:
    found = {path.relative_to(SOURCES).with_suffix("").as_posix() for path in SOURCES.rglob("*.py")}
    return {name for name in found if not name.endswith("__init__")}


def test_every_source_is_tried_with_input_that_is_none() -> None:
    assert TRIED_HERE | TRIED_ELSEWHERE.keys() == _files()
    for place in set(TRIED_ELSEWHERE.values()):
        file, _, test = place.partition("::")
        assert test in (TESTS / file).read_text(), place


def test_every_source_has_its_place_in_the_docs() -> None:
    """A row that says what it can see and what it cannot."""
    text = (Path(__file__).parents[2] / "docs" / "signals.md").read_text()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    for name in _files():
        row = rows.get(f"{name}.py")
        assert row is not None, f"docs/signals.md has no row for sources/{name}.py"
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3, row
        assert all(cells), row
