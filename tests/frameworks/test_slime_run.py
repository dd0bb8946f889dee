"""slime from its launch script to its end, with the three lines of the example, under a real daemon."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from frameworks.slime_prompts import write
from frameworks.sources import HOME, source
from stepguardd.control.client import ControlClient, ControlError, NoDaemonError
from stepguardd.control.contract import SOCKET_NAME

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
ROLLOUTS = 12


def example() -> list[str]:
    """The lines of the example, as the shell that sources it sees them."""
    shell = 'source examples/slime_arguments.sh; printf "%s\\n" "${STEPGUARD_ARGS[@]}"'
    printed = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True)
    return printed.stdout.split()


class Job:
    """The daemon, which starts the server and the job, and what they write."""

    def __init__(self, folder: Path, run_dir: Path, *own: str, weights: str) -> None:
        self._weights = weights
        self.folder, self.run_dir = folder, run_dir
        write(folder)
        (folder / "saved").mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = [sys.executable, "-m", "stepguard_grpo.server"]
        server += ["--model-path", str(folder / "base"), "--port", str(port)]
        job = [sys.executable, str(Path(__file__).with_name("slime_job.py")), str(HOME / "slime")]
        job += [*example(), *self._arguments(port), *own]
        paths = [ROOT / "trainer", ROOT / "tests", HOME / "needs"]
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
            "SLIME_HOST_IP": "127.0.0.1",
            "WANDB_MODE": "disabled",
        }
        (folder / "config.toml").write_text(self._config(port, server, job, environment))
        self._log = (folder / "daemon.log").open("wb")
        self.daemon = subprocess.Popen(
            [sys.executable, "-m", "stepguardd", "run", "--config", str(folder / "config.toml")],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def _arguments(self, port: int) -> list[str]:
        """Of a run of slime on engines of its own: what to learn, how much of it, and weights over a disk."""
        values = {
            "rollout-external-engine-addrs": f"127.0.0.1:{port}",
            "hf-checkpoint": self.folder / "base",
            "prompt-data": self.folder / "prompts.jsonl",
            "label-key": "label",
            "custom-rm-path": "frameworks.slime_job.reward",
            "num-rollout": ROLLOUTS,
            "rollout-batch-size": 8,
            "n-samples-per-prompt": 4,
            "global-batch-size": 32,
            "rollout-max-response-len": 4,
            "lr": "1e-3",
            "save": self.folder / "saved",
            "load": self.folder / "saved",
            "save-interval": 3,
            "save-debug-rollout-data": f"{self.folder}/batch-{{rollout_id}}.pt",
            "update-weight-transport": "disk",
            "update-weight-disk-dir": self.folder / "weights",
            "actor-num-gpus-per-node": 1,
            "num-gpus-per-node": 1,
        }
        return [f"--{name}={value}" for name, value in values.items()]

    def _config(self, port: int, server: list[str], job: list[str], environment: dict[str, str]) -> str:
        variables = ", ".join(f"{name} = {json.dumps(value)}" for name, value in environment.items())
        return f"""
            [run]
            name = "slime-{port}"
            mode = "act"
            run_dir = "{self.run_dir}"
            state_dir = "{self.folder / "state"}"
            servers_on_stop = "stop"
            [server]
            url = "http://127.0.0.1:{port}"
            backend = "process"
            command = {json.dumps(server)}
            env = {{ {variables}, SGLANG_PYSPY_DUMP_BEFORE_CRASH = "0" }}
            log = "{self.folder / "server.log"}"
            [trainer]
            backend = "process"
            command = {json.dumps(job)}
            env = {{ {variables} }}
            log = "{self.folder / "job.log"}"
            on_stop = "stop"
            [weights]
            {self._weights}
            [checkpoints]
            dir = "{self.folder / "saved"}"
            framework = "slime"
            [web]
            listen = "127.0.0.1:0"
        """

    def status(self) -> dict[str, Any]:
        try:
            with ControlClient(self.run_dir / SOCKET_NAME) as client:
                return dict(client.status())
        except (NoDaemonError, ControlError):
            return {}

    def steps(self) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.folder / "saved/steps.jsonl").read_text().splitlines()]
        return []

    def until(self, holds: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if holds():
                return
            if (self.status().get("breaker") or {}).get("phase") == "locked_out":
                break
            time.sleep(0.1)
        logs = [(self.folder / name) for name in ("daemon.log", "job.log")]
        said = "\n".join(log.read_text()[-5000:] for log in logs if log.exists())
        raise AssertionError(f"{what}\n{self.status()}\n{said}")

    def ended(self) -> bool:
        return (self.status().get("trainer") or {}).get("left") == "finished"

    def scheduler(self) -> psutil.Process:
        """The server's own child, which has the model."""
        (scheduler,) = psutil.Process(int(self.status()["servers"][0]["pid"])).children()
        return scheduler

    def close(self) -> None:
        self.daemon.terminate()
        self.daemon.wait(60)
        self._log.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    source("slime", "train.py")
    jobs: list[Job] = []
    with tempfile.TemporaryDirectory(prefix="stepguard-test-") as run_dir:

        def make(*own: str, weights: str) -> Job:
            jobs.append(Job(tmp_path, Path(run_dir), *own, weights=weights))
            return jobs[-1]

        yield make
        for job in jobs:
            job.close()


def killed_on_the_way(job: Job) -> str:
    """The scheduler of its engine is, after some steps; the daemon's log once the job is over."""
    job.until(lambda: len(job.steps()) >= 5, "slime does not train")
    job.scheduler().send_signal(signal.SIGKILL)
    job.until(job.ended, "the job did not come to its end")
    log = (job.folder / "daemon.log").read_text()
    assert "server_died" in log, "nothing died"
    return log


def trained_on(job: Job, step: dict[str, Any]) -> set[str]:
    """The versions of the weights with which the batch of this step was generated."""
    batch = torch.load(job.folder / f"batch-{step['rollout']}.pt", weights_only=False)["samples"]
    return {version for sample in batch for version in sample["weight_versions"]}


def test_a_killed_engine_is_restarted_with_the_weights_of_the_step_and_the_job_ends_well(
    start: Callable[..., Job], tmp_path: Path
) -> None:
    job = start(
        "--update-weight-disk-keep-files", weights=f'path = "{tmp_path}/weights/weight_v{{version:06d}}"'
    )
    log = killed_on_the_way(job)
    assert "pushed from disk" in log
    steps = job.steps()
    assert [step["rollout"] for step in steps] == [*range(ROLLOUTS)], "each step once"
    assert sum(step["masked"] for step in steps) == 1, "the trajectory whose reward function fails"
    for step in steps:
        assert trained_on(job, step) == {str(step["weights"])} == {str(step["rollout"] + 1)}


def test_where_weights_go_by_nccl_the_job_is_started_again_after_its_engine(
    start: Callable[..., Job],
) -> None:
    """
    The daemon sees no version and has no folder, and slime has no handler: as where NCCL brings the weights.

    The job resumes by slime's own `--load`, and pushes its weights as at any start.
    """
    job = start(weights='sync = "nccl"')
    log = killed_on_the_way(job)
    assert "starting the trainer again: weights_unproven" in log
    rollouts = [step["rollout"] for step in job.steps()]
    again = next(at for at, (one, other) in enumerate(pairwise(rollouts), 1) if other <= one)
    assert rollouts[again] % 3 == 0, "from a checkpoint on: they are of rollouts 2, 5, 8 and 11"
    assert rollouts == [*range(rollouts[again - 1] + 1), *range(rollouts[again], ROLLOUTS)]
    for step in job.steps()[again:]:
        assert trained_on(job, step) == {str(step["weights"])}
