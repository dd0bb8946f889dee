"""
The daemon as a sidecar that sees no process and no cgroup of the trainer or the server.

Its container is made by hand. The pod of kubernetes-sidecar.yaml is one whole incident; and a trainer in a
memory cgroup with a limit loses a worker, which only the guard can know.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.server_process import free_port
from requirements import require
from senses.memory_cgroups import limited_memory_cgroup
from stepguard.cgroups import MemoryCgroup
from stepguard_grpo import ground_truth
from stepguard_grpo.model import write_base_model
from stepguardd.demo.faults import Fault, strike
from stepguardd.demo.supervisor import Supervisor
from supervised.container import VOLUME, Container, container, why_not

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

EXAMPLE = Path(__file__).parents[2] / "docs/deploy/examples/kubernetes-sidecar.yaml"
STEPS = 60
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


class Pod:
    """
    What kubernetes-sidecar.yaml describes, in a folder of this machine, by its own words.

    Args:
        root: what the pod mounts as /state, and where it keeps /run.

    """

    def __init__(self, root: Path) -> None:
        config, job = yaml.safe_load_all(EXAMPLE.read_text())
        spec = job["spec"]["template"]["spec"]
        self._policy, self._sidecar = spec["initContainers"]
        assert not spec["shareProcessNamespace"]
        assert self._policy["restartPolicy"] == "Always"
        self.root, self.port = root, free_port()
        self.run_dir = root / "run"
        text = config["data"]["run.toml"].replace("/run/stepguard/night", str(self.run_dir))
        text = text.replace('"/state', f'"{root}').replace(":30000", f":{self.port}")
        (root / "run.toml").write_text(text)
        (variable,) = spec["containers"][0]["env"]
        assert (variable["name"], variable["value"]) == ("STEPGUARD_RUN_DIR", "/run/stepguard/night")

    @property
    def serve(self) -> list[str]:
        """The server's command, of the embedded one."""
        here = {
            "python": sys.executable,
            "sglang.launch_server": "stepguard_grpo.server",
            "/state/base": str(self.root / "base"),
            "30000": str(self.port),
        }
        return [here.get(word, word) for word in self._policy["command"]]

    @property
    def watch(self) -> list[str]:
        """The sidecar's command."""
        return self._stepguard(self._sidecar["command"])

    @property
    def started(self) -> list[str]:
        """What says that the trainer may begin."""
        return self._stepguard(self._sidecar["startupProbe"]["exec"]["command"])

    def _stepguard(self, words: list[str]) -> list[str]:
        assert words[0] == "stepguard"
        here = {"/etc/stepguard/run.toml": str(self.root / "run.toml")}
        return [sys.executable, "-m", "stepguardd", *(here.get(word, word) for word in words[1:])]

    @contextlib.contextmanager
    def trains(self) -> Iterator[subprocess.Popen[bytes]]:
        """The reference trainer."""
        command = [sys.executable, "-m", "stepguard_grpo.train", "--run-root", str(self.root), "--no-wandb"]
        command += ["--server-url", f"http://127.0.0.1:{self.port}", "--steps", str(STEPS)]
        environment = os.environ | {"STEPGUARD_RUN_DIR": str(self.run_dir), "OMP_NUM_THREADS": "1"}
        with (self.root / "trainer.log").open("wb") as log:
            child = subprocess.Popen(
                [*command, "--min-step-s", "0.1"], env=environment, stdout=log, stderr=log
            )
        try:
            yield child
        finally:
            child.kill()
            child.wait(10)

    def steps(self) -> int:
        return len(ground_truth.read(self.root / "ground_truth.jsonl"))


def test_a_sidecar_lets_the_run_go_on_with_a_server_that_kubernetes_has_started_again(tmp_path: Path) -> None:
    """Its death is seen by the probes alone: held, its weights pushed when it is back, no step on garbage."""
    reason = why_not()
    if reason is not None:
        require("container", reason)
    pod = Pod(tmp_path)
    write_base_model(tmp_path / "base", seed=0)
    server = Supervisor(pod.serve, tmp_path / "server.log", restart=True)
    server.start()
    try:
        with container(tmp_path, pod.watch, tmp_path / "daemon.log") as sidecar:
            sidecar.until((pod.run_dir / "control.sock").exists, "the daemon answers")
            sidecar.until(lambda: sidecar.asked(*pod.started).returncode == 0, "the startup probe")
            with pod.trains() as trainer:
                sidecar.until(lambda: pod.steps() >= 5, "five steps")
                before = sidecar.status(pod.run_dir)
                assert (before["servers"][0]["pid"], before["incidents"]) == (None, 0)
                assert server.pid is not None
                strike(Fault.STALE, server.pid)
                sidecar.until(lambda: sidecar.status(pod.run_dir).get("incidents") == 1, "the death is seen")
                sidecar.until(lambda: trainer.poll() is not None, "the trainer's end")
                after = sidecar.status(pod.run_dir)
    finally:
        server.stop()
    assert (trainer.returncode, pod.steps()) == (0, STEPS), (tmp_path / "trainer.log").read_text()[-3000:]
    assert server.starts == 2
    assert after["last_incident"]["restarts"] == 0
    assert ground_truth.summary(tmp_path / "ground_truth.jsonl").garbage_steps == 0
