"""
A trainer whose worker the kernel kills for memory, and a daemon that sees no process and no cgroup of it.

The daemon is a sidecar with processes of its own (a container), the trainer is in a memory cgroup with a
limit. What the kernel did there only the guard can know.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from requirements import require
from senses.memory_cgroups import limited_memory_cgroup
from stepguard.cgroups import MemoryCgroup
from supervised.container import VOLUME, Container, container, why_not

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

TRAINER = """
import pathlib, subprocess, sys, time
from stepguard import Guard
root = pathlib.Path(sys.argv[1])
with Guard(root / "run", heartbeat_s=0.2):
    while not (root / "eat").exists():
        time.sleep(0.02)
    eaten = "x = []\\nwhile True: x.append(bytearray(1 << 20))"
    worker = subprocess.run([sys.executable, "-c", eaten], check=False)
    (root / "eaten").write_text(str(worker.returncode))
    while not (root / "enough").exists():
        time.sleep(0.02)
"""
CONFIG = """
[run]
name = "night"
run_dir = "{root}/run"
state_dir = "{root}/state"
[web]
enabled = false
"""


@contextlib.contextmanager
def training(root: Path, cgroup: MemoryCgroup) -> Iterator[None]:
    """A trainer with a guard, in a cgroup."""
    into = 'echo $$ >"$0" && exec "$@"'
    words = ["sh", "-c", into, str(cgroup.folder / "cgroup.procs"), sys.executable, "-c", TRAINER, str(root)]
    child = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        yield
    finally:
        (root / "enough").touch()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(10)


def test_a_sidecar_is_told_by_the_guard_of_a_kill_in_the_trainers_container(tmp_path: Path) -> None:
    reason = why_not()
    if reason is not None:
        require("container", reason)
    volume, log = tmp_path / "volume", tmp_path / "daemon.log"
    volume.mkdir()
    (volume / "run.toml").write_text(CONFIG.format(root=VOLUME))
    command = [sys.executable, "-m", "stepguardd", "run", "--config", f"{VOLUME}/run.toml"]

    def trainer(sidecar: Container) -> dict[str, Any]:
        return sidecar.status(VOLUME / "run").get("trainer") or {}

    with limited_memory_cgroup(96 << 20) as cgroup, container(volume, command, log) as sidecar:
        sidecar.until((volume / "run" / "gate").exists, "the gate page")
        with training(volume, cgroup):
            sidecar.until(lambda: trainer(sidecar).get("alive"), "the trainer is seen")
            assert sidecar.status(VOLUME / "run")["host"]["oom_kills"] is None
            (volume / "eat").touch()
            sidecar.until(
                lambda: sidecar.status(VOLUME / "run")["host"]["oom_kills"] == 1, "the kill is counted"
            )
            assert (volume / "eaten").read_text() == "-9", "the kernel killed nobody"
            assert trainer(sidecar)["alive"]
    said = [line for line in log.read_text().splitlines() if "out of memory" in line]
    assert len(said) == 1, said
    assert f"killed a process of the trainer, cgroup {cgroup.name}" in said[0]
