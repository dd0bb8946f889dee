"""The documented ways to start agents, with stand-ins for Slurm and Kubernetes: each starts the same one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import ValidationError, validate

from cluster.machines import Machines
from grpo.server_process import free_port

EXAMPLES = Path(__file__).parents[2] / "docs/deploy/examples"

# srun on one machine, a task a node. A node has a /dev/shm of its own: here each has a folder in its place.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do [[ "$1" == --exclude=* ]] && without="${1#*=}"; shift; done
shm="/dev/shm/stepguard-$SLURM_JOB_ID" root="$(dirname "$0")" tasks=() code=0
trap 'kill "${tasks[@]}"' TERM
for node in n0 n1 n2; do
  [[ "$node" == "${without:-}" ]] && continue
  place="$shm"; [[ "$node" == n0 ]] || place="$root/$node"
  SLURMD_NODENAME="$node" STEPGUARD_RUN_DIR="$place" "${@//$shm/$place}" & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""
TRAINER = """
import os, pathlib
from stepguard import Guard
guard = Guard.from_env()
for step in range(1, 21):
    while not guard.admit(step, [1] * 4, rewards=[0.7, 1.0, 0.4, 0.7]).ok:
        pass
    guard.before_step(step)
    guard.after_step(step, reward=0.7)
pathlib.Path("steps-" + os.environ["SLURMD_NODENAME"]).write_text(str(step))
guard.close()
"""


@pytest.mark.e2e
def test_a_slurm_job_on_three_nodes_trains_with_an_agent_on_each_but_the_first(tmp_path: Path) -> None:
    job, port = f"test-{os.getpid()}", free_port()
    script = (EXAMPLES / "agents.sbatch").read_text()
    for address in ("0.0.0.0:8723", "$head:8723"):
        assert script.count(address) == 1
        script = script.replace(address, f"127.0.0.1:{port}")
    programs = {
        "agents.sbatch": script,
        "srun": SRUN,
        "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames n[0-2]" ] && printf "n0\\nn1\\nn2\\n"\n',
        "stepguard": f'#!/bin/sh\nexec {sys.executable} -m stepguardd "$@"\n',
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        "train.py": TRAINER,
        "run.toml": "[web]\nenabled = false\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "n[0-2]",
    }
    child = subprocess.Popen(
        ["bash", "agents.sbatch"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = child.communicate(timeout=150)
    finally:
        child.kill()
        child.wait()
    log = tmp_path / f"stepguard-{job}.log"
    told = said + (log.read_text() if log.exists() else "")
    assert child.returncode == 0, told
    assert {path.name: path.read_text() for path in tmp_path.glob("steps-*")} == {
        "steps-n0": "20",
        "steps-n1": "20",
        "steps-n2": "20",
    }
    assert all(f"node {name} is with its head" in told for name in ("n1", "n2")), told
    left = [
        tmp_path / f"stepguard-{job}.token",
        *(Path(at) / f"stepguard-{job}" for at in ("/dev/shm", "/tmp")),
    ]
    assert [path for path in left if path.exists()] == []


def documents() -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all((EXAMPLES / "agents.yaml").read_text())


def test_kubernetes_would_take_the_daemonset_and_its_pod_has_what_it_mounts() -> None:
    for document in documents():
        validate(document, "1.29", strict=True)
        with pytest.raises(ValidationError, match="no_such_key"):
            validate({**document, "no_such_key": 1}, "1.29", strict=True)
    secret, daemonset = documents()
    template = daemonset["spec"]["template"]
    assert daemonset["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    (container,) = template["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["token"]["secret"] == {"secretName": secret["metadata"]["name"], "defaultMode": 0o400}
    assert f"--run-dir={mounts['run']}" in container["command"]
    assert f"--token-file={mounts['token']}/{next(iter(secret['stringData']))}" in container["command"]


@pytest.mark.e2e
def test_the_daemonsets_command_starts_an_agent_that_its_head_takes_in(tmp_path: Path) -> None:
    _, daemonset = documents()
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    with contextlib.closing(Machines(tmp_path / "r", nodes=("n1",))) as run:
        run.head_up()
        found = {
            "night-head:8723": f"127.0.0.1:{run.port}",
            "$(NODE_NAME)": "n1",
            "/run/stepguard/night": str(run.folder("n1")),
            "/etc/stepguard": str(run.state_dir),
        }
        words = container["command"][1:]
        for name, there in found.items():
            assert any(name in word for word in words)
            words = [word.replace(name, there) for word in words]
        with run.log.open("ab") as log:
            run.agents["n1"] = subprocess.Popen(
                [sys.executable, "-m", "stepguardd", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        run.until(lambda: run.node("n1") == "present", "the head has it")
        run.until(lambda: run.page_order("n1") == "GO", "and its page goes on")
