"""A daemon whose server lives in a Ray actor: the actor is ended for good, and the trainer makes another."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon_parts.own_daemons import OwnDaemons
from daemon_parts.ray_engine import Engine
from daemon_parts.small_run import training
from grpo.server_process import free_port
from stepguardd import proc

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("ray"), pytest.mark.timeout(240)]


class Engines(threading.Thread):
    """The trainer's keeper of its engine: one that is dead is made again."""

    def __init__(self, name: str, command: list[str]) -> None:
        super().__init__(name="engines", daemon=True)
        self._name, self._command = name, command
        self.engine = Engine(name, command)
        self.made = 1
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.2):
            if not self.engine.lives():
                with contextlib.suppress(ValueError):  # the name is not free yet
                    self.engine = Engine(self._name, self._command)
                    self.made += 1


class RayRun(OwnDaemons):
    """A run whose one server is the child of an actor's worker."""

    def __init__(self, root: Path, model: Path, cluster: str) -> None:
        self.weights = root / "weights"
        self.weights.mkdir(parents=True)
        (self.weights / "model").symlink_to(model, target_is_directory=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        serve = [sys.executable, "-m", "stepguard_grpo.server", "--model-path", str(model)]
        self.engines = Engines(root.name, [*serve, "--port", str(self.port)])
        super().__init__(
            root,
            {
                "probe": {"interval_s": 0.5},
                "web": {"enabled": False},
                "weights": {"sync": "disk", "path": f"{self.weights}/{{version}}"},
                "server": {
                    "url": self.url,
                    "backend": "ray",
                    "actor": root.name,
                    "ray_address": cluster,
                    "ray_namespace": "runs",
                },
            },
        )

    def started(self) -> tuple[proc.Proc, ...]:
        return ()

    def server(self) -> tuple[proc.Proc, ...]:
        """The server's processes."""
        owner = proc.port_owner(self.port)
        return () if owner is None else proc.tree(owner)

    def serving(self) -> bool:
        status = self.status()
        return bool(status) and self.order() == "GO" and status["servers"][0]["state"] == "serving"

    def close(self) -> None:
        super().close()
        self.engines.over.set()
        self.engines.join(timeout=90)
        left = self.server()
        self.engines.engine.end()
        for known in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(known.pid, signal.SIGKILL)


@pytest.fixture
def run(tmp_path: Path, base_model: Path, ray_cluster: str) -> Iterator[RayRun]:
    made = RayRun(tmp_path / "engine", base_model, ray_cluster)
    try:
        made.engines.start()
        yield made
    finally:
        made.close()


def test_a_dead_server_in_a_hung_actor_is_ended_with_it_and_made_again_by_the_trainer(run: RayRun) -> None:
    """The worker stands still: Ray's own kill would leave it, and nobody could make another of its name."""
    run.daemon()
    run.until(run.serving, "the actor's server is found, looked at and proven")
    with training(run) as trainer:
        run.until(lambda: trainer.committed >= 3, "steps are taken")
        first = run.engines.engine.worker
        os.kill(first, signal.SIGSTOP)
        (scheduler,) = (known for known in run.server() if known.role == "scheduler")
        os.kill(scheduler.pid, signal.SIGKILL)
        run.until(lambda: run.engines.made == 2, "the trainer makes another")
        before = trainer.committed
        run.until(lambda: trainer.committed >= before + 3, "the run goes on")
    assert trainer.garbage == 0
    assert not Path(f"/proc/{first}").exists()
    (server,) = run.status()["servers"]
    assert (server["state"], server["restarts"]) == ("serving", 1)
