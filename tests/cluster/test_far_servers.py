"""A server on another machine: the head decides, and the agent there starts, ends and watches it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.machines import Machines
from daemon_parts.small_run import MiniTrainer
from grpo.server_process import free_port
from stepguard_grpo.model import write_base_model
from stepguardd import proc

pytestmark = pytest.mark.e2e


class Apart(Machines):
    """The trainer on n1, its server on n2, the head on a third machine."""

    def __init__(self, root: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.starts_file, self.weights = root / "starts", root / "weights"
        root.mkdir()
        write_base_model(self.weights / "model", seed=0)
        serve = f"{sys.executable} -m stepguard_grpo.server --model-path {self.weights}/model"
        note = f'echo "$STEPGUARD_INTENT" >> {self.starts_file}; exec {serve} --port {self.url[17:]}'
        super().__init__(
            root,
            {
                "run": {"mode": "act"},
                "probe": {"interval_s": 0.5},
                "recovery": {"backoff_first_s": 0.01, "backoff_max_s": 0.01},
                "weights": {"sync": "disk", "path": f"{self.weights}/{{version}}"},
                "server": {
                    "url": self.url,
                    "node": "n2",
                    "command": ["bash", "-c", note],
                    "stop_timeout_s": 5,
                },
            },
            nodes=("n1", "n2"),
        )
        self.trainer = MiniTrainer(self.folder("n1"), self.url, self.weights, resync=True)

    def agents_up(self, *, crash_at: str | None = None) -> None:
        self.agent("n1")
        self.agent("n2", "--config", str(self.config), crash_at=crash_at)

    def again(self) -> None:
        """Another agent on n2."""
        self.agent("n2", "--config", str(self.config))

    def server(self) -> tuple[proc.Proc, ...]:
        return proc.marked("STEPGUARD_SERVER", f"{self.root.name}@{self.state_dir}/server")

    def starts(self) -> list[str]:
        """The intents under which server processes were really started."""
        return self.starts_file.read_text().split() if self.starts_file.exists() else []

    def serving(self) -> bool:
        servers = self.status().get("servers")
        return bool(servers) and servers[0]["state"] == "serving"

    def steps(self) -> None:
        """The trainer commits steps from now on."""
        before = self.trainer.committed
        self.until(lambda: self.trainer.committed > before + 2, "steps are taken")

    def died(self, name: str) -> None:
        """The agent ended by its own hand, at the point that it was given."""
        self.until(lambda: self.agents[name].poll() is not None, f"the agent of {name} dies")
        assert self.agents[name].returncode == -signal.SIGKILL

    def kill(self, *procs: proc.Proc) -> None:
        for known in procs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(known.pid, signal.SIGKILL)
        self.until(lambda: not any(proc.alive(known) for known in procs), "they are dead")

    def close(self) -> None:
        self.trainer.stopping.set()
        try:
            if self.trainer.is_alive():
                self.let_go("n1")
                self.trainer.join(timeout=30)
                assert not self.trainer.is_alive(), "the trainer hangs"
        finally:
            super().close()
            self.kill(*self.server())
        if self.trainer.failure is not None:
            raise self.trainer.failure


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Apart]:
    with contextlib.closing(Apart(tmp_path / "r")) as run:
        yield run


def test_a_server_is_started_once_restarted_and_brought_back_with_its_machine(apart: Apart) -> None:
    apart.head_up()
    apart.agents_up(crash_at="start_spawned")
    apart.died("n2")
    assert len(apart.starts()) == 1
    first = apart.server()
    apart.again()
    apart.until(apart.serving, "the server that the dead agent began is taken up")
    assert apart.starts() == apart.starts()[:1], "asked again under the same intent, nothing is started"
    assert apart.server()[0] in first
    assert apart.status()["servers"][0]["pid"] == first[0].pid, "its agent tells of its processes"
    apart.trainer.start()
    apart.steps()

    (scheduler,) = [known for known in apart.server() if known.role == "scheduler"]
    apart.kill(scheduler)
    apart.until(lambda: len(apart.starts()) == 2, "another is started")
    apart.until(apart.serving, "and serves")
    apart.steps()
    parent = proc.stat(apart.server()[0].pid)
    assert parent is not None
    assert parent.ppid == apart.agents["n2"].pid, "by the agent of its machine"
    assert apart.status()["servers"][0]["restarts"] == 1

    apart.kill_agent("n2")
    apart.kill(*apart.server())
    apart.until(lambda: apart.node("n2") == "lost", "the machine is lost")
    apart.until(lambda: apart.status()["servers"][0]["state"] in {"dead", "suspect"}, "and its server")
    assert len(apart.starts()) == 2
    apart.again()
    apart.until(lambda: len(apart.starts()) == 3, "it is started when its machine is back")
    apart.until(apart.serving, "and serves")
    apart.steps()
    assert apart.trainer.garbage == 0
    assert len(set(apart.starts())) == 3, "one process for an intent"


def test_a_head_that_is_killed_after_a_start_finds_what_it_had_begun(apart: Apart) -> None:
    apart.daemon(crash_at="after_StartServer")
    apart.until((apart.state_dir / "cluster.token").exists, "there is a token")
    apart.agents_up()
    apart.crashed("after_StartServer")
    apart.head_up()
    apart.until(apart.serving, "the next head has it started, or finds it")
    assert len(apart.starts()) == 1
