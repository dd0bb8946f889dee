"""`stepguard stream` as a program: what it prints, on which channel, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from senses.wandb_writer import WandbWriter

pytestmark = pytest.mark.e2e

COMMAND = [sys.executable, "-c", "from stepguard._command import main; main()", "stream"]


def stream(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=30, cwd=cwd, check=False
    )


def a_run(path: Path, *, ended: bool = True) -> WandbWriter:
    writer = WandbWriter(path)
    for step, value in enumerate([0.5, None, float("nan"), float("inf"), float("-inf")]):
        writer.row(step, {"train/reward": value, "loss": 1.0}, time=1.5e9)
    if ended:
        writer.exit()
    return writer


def test_json_has_one_object_a_line_and_spells_what_json_lacks(tmp_path):
    a_run(tmp_path / "run-abc.wandb")
    done = stream(tmp_path / "run-abc.wandb", "--json", "--metric", "auto")
    assert done.returncode == 0
    assert done.stderr == ""
    rows = [json.loads(line, parse_constant=lambda _: 1 / 0) for line in done.stdout.splitlines()]
    assert rows == [
        {"step": step, "metric": "train/reward", "value": value, "time": 1.5e9}
        for step, value in enumerate([0.5, None, "NaN", "Infinity", "-Infinity"])
    ]


def test_the_table_fits_a_terminal(tmp_path):
    a_run(tmp_path / "run-abc.wandb")
    done = stream(tmp_path / "run-abc.wandb")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["step", "value", "time", "metric"]
    assert len(lines) == 11
    assert "unknown" in lines[3]
    assert max(map(len, lines)) <= 80


def test_torn_killed_and_flipped_files_end_with_0_and_a_warning(tmp_path):
    path = tmp_path / "run-abc.wandb"
    a_run(path, ended=False)
    killed = stream(path)
    assert killed.returncode == 0
    assert "no exit record" in killed.stderr
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    torn = stream(path)
    assert torn.returncode == 0
    assert "no whole record" in torn.stderr
    path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:] + bytes(40_000))
    flipped = stream(path)
    assert flipped.returncode == 0
    assert "damaged" in flipped.stderr


def test_another_kind_of_file_is_wrong_use_in_one_line(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\0")
    for path in [tmp_path / "picture.png", tmp_path / "nowhere", tmp_path]:
        done = stream(path)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert str(path) in done.stderr


def test_a_metric_that_is_not_there_is_bad_news_with_the_names_that_are(tmp_path):
    a_run(tmp_path / "run-abc.wandb")
    done = stream(tmp_path / "run-abc.wandb", "--metric", "nope")
    assert done.returncode == 1
    assert "'nope'" in done.stderr
    assert "train/reward" in done.stderr


def test_following_ends_with_the_run(tmp_path):
    path = tmp_path / "run-abc.wandb"
    writer = a_run(path, ended=False)
    with subprocess.Popen(
        [*COMMAND, str(path), "-f", "--json"], stdout=subprocess.PIPE, text=True
    ) as following:
        assert following.stdout is not None
        first = [following.stdout.readline() for _ in range(10)]
        writer.row(5, {"train/reward": 0.9})
        assert json.loads(following.stdout.readline())["step"] == 5
        writer.exit()
        assert following.wait(timeout=20) == 0
    assert len(first) == 10


def test_ctrl_c_ends_following_quietly(tmp_path):
    path = tmp_path / "run-abc.wandb"
    a_run(path, ended=False)
    with subprocess.Popen(
        [*COMMAND, str(path), "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as following:
        assert following.stdout is not None
        following.stdout.readline()
        time.sleep(0.3)
        following.send_signal(signal.SIGINT)
        assert following.wait(timeout=20) == 0
        assert following.stderr is not None
        assert "Traceback" not in following.stderr.read()


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    path = tmp_path / "run-abc.wandb"
    writer = WandbWriter(path)
    for step in range(3000):
        writer.row(step, {"r": 1})
    with subprocess.Popen(
        [*COMMAND, str(path), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as streaming:
        assert streaming.stdout is not None
        streaming.stdout.readline()
        streaming.stdout.close()
        assert streaming.wait(timeout=20) == 0
        assert streaming.stderr is not None
        assert "Error" not in streaming.stderr.read()


def test_a_stored_position_goes_on_where_it_stood(tmp_path):
    path = tmp_path / "run-abc.wandb"
    writer = a_run(path, ended=False)
    first = stream(path, "--json", "--position", tmp_path / "pos")
    writer.row(5, {"train/reward": 0.9})
    second = stream(path, "--json", "--position", tmp_path / "pos")
    assert len(first.stdout.splitlines()) == 10
    assert [json.loads(line)["step"] for line in second.stdout.splitlines()] == [5]
    (tmp_path / "pos").write_text("[")
    assert stream(path, "--position", tmp_path / "pos").returncode == 2


def test_it_stays_small(tmp_path):
    """The command imports none of the heavy parts of the daemon."""
    code = (
        "import sys\nfrom stepguardd.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'httpx', 'numpy', 'rich', 'asyncio', 'fastapi', 'wandb', 'psutil'}\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    a_run(tmp_path / "run-abc.wandb")
    done = subprocess.run(
        [sys.executable, "-c", code, "stream", str(tmp_path / "run-abc.wandb")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "TERM": "dumb"},
    )
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
