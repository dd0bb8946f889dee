"""In which company tests run: a small run of pytest under our own conftest.py, with two workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOTED = """
import json, os, pytest
{mark}
@pytest.mark.parametrize("number", range(4))
def test_notes_who_ran_it(request, number):
    with open({log!r}, "a") as log:
        log.write(json.dumps([request.node.nodeid, os.environ["PYTEST_XDIST_WORKER"]]) + "\\n")
    assert number != {fails}
"""
RAY = "@pytest.mark.xdist_group('ray')"


def test_a_group_is_one_workers_alone_and_those_that_take_longest_begin(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    ours = HERE / "conftest.py"
    one_at_a_time = pytestconfig.pluginmanager.getplugin(str(ours)).ONE_AT_A_TIME
    shutil.copy(ours, tmp_path)
    log = tmp_path / "log"
    files = {
        "browser/test_a.py": ("", "browser"),
        "browser/test_b.py": ("", "browser"),
        "real_sglang/test_c.py": ("", "real_sglang"),
        "real_sglang/test_d.py": ("", "real_sglang"),
        "some/test_e.py": (RAY, "ray"),
        "others/test_f.py": (RAY, "ray"),
        "others/test_g.py": ("", "g"),
        "others/test_h.py": ("@pytest.mark.e2e", None),
    }
    for name, (mark, _) in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(NOTED.format(mark=mark, log=str(log), fails=3 if name == "others/test_g.py" else -1))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "xdist",
        "-q",
        "-n",
        "2",
        "--dist",
        "loadgroup",
        "-o",
        "markers=e2e",
    ]
    outer = {"PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"}
    environment = {key: value for key, value in os.environ.items() if key not in outer}
    environment |= {"TMPDIR": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert "1 failed, 31 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED others/test_g.py::test_notes_who_ran_it[3] - " in done.stdout, "its name is its own"

    workers: dict[str, set[str]] = {}
    ran: dict[str, list[str]] = {"gw0": [], "gw1": []}
    for line in log.read_text().splitlines():
        name, worker = json.loads(line)
        group = files[name.partition("::")[0]][1] or name
        workers.setdefault(group, set()).add(worker)
        ran[worker].append(group)
    assert len(workers) == 8
    assert all(len(who) == 1 for who in workers.values()), workers
    assert {groups[0] for groups in ran.values()} == {"real_sglang", "ray"}, "the longest begin"
    ranks = {group: number for number, group in enumerate(one_at_a_time)} | {"g": 2 * len(one_at_a_time)}
    for groups in ran.values():
        begun = [ranks.get(group, len(one_at_a_time)) for group in groups]
        assert begun == sorted(begun), groups
    assert list(tmp_path.glob("stepguard-groups-*")) == [], "nothing is left behind"
