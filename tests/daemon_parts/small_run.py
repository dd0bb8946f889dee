"""A small real run: a daemon process, the embedded server under it, a trainer with a guard in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from daemon_parts.own_daemons import OwnDaemons
from grpo.server_process import free_port
from stepguard import Guard, RollbackRequested, StopRequested
from stepguardd import proc

ROLLOUTS = 4
PROMPT = [1, 2, 3]


class MiniTrainer(threading.Thread):
    """
    Rolls out, asks, steps, publishes new weights; counts the steps that it took on garbage.

    Weights are folders, one a version, all of them links to one model: what is looked at is the version.
    """

    def __init__(self, run_dir: Path, url: str, weights: Path, *, resync: bool) -> None:
        super().__init__(name="mini-trainer", daemon=True)
        self._run_dir, self._url, self._weights, self._resync = run_dir, url, weights, resync
        self.committed = 0
        self.garbage = 0
        self.resyncs = 0
        self.failure: BaseException | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        guard = Guard(self._run_dir, heartbeat_s=0.2)
        try:
            with httpx.Client(base_url=self._url, timeout=10, trust_env=False, verify=False) as http:
                if self._resync:
                    guard.on_resync(lambda: self._resynced(http))
                self._publish(http, tries=200)
                guard.weights(str(self.committed))
                while not self.stopping.is_set():
                    self._one(guard, http)
                    time.sleep(0.05)
        except (StopRequested, RollbackRequested):
            pass
        except BaseException as error:
            self.failure = error
        finally:
            guard.close()

    def _one(self, guard: Guard, http: httpx.Client) -> None:
        step = self.committed + 1
        outcomes = asyncio.run(guard.gather([self._rollout() for _ in range(ROLLOUTS)]))
        versions = [one.get("version") if isinstance(one, dict) else None for one in outcomes]
        rewards = [0.7 if isinstance(one, dict) else None for one in outcomes]
        batch = guard.admit(step, outcomes, rewards=rewards, weight_versions=versions)
        if not batch.ok:
            return
        guard.before_step(step)
        wrong = [v for v, counts in zip(versions, batch.flat_mask, strict=True) if counts]
        self.garbage += any(version != str(self.committed) for version in wrong)
        self.committed = step
        with contextlib.suppress(httpx.HTTPError):
            self._publish(http)
        guard.after_step(step, reward=0.7, weight_version=str(step))

    async def _rollout(self) -> dict[str, Any]:
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2, "temperature": 1.0}}
        async with httpx.AsyncClient(base_url=self._url, timeout=10, trust_env=False, verify=False) as http:
            reply = (await http.post("/generate", json=body)).raise_for_status().json()
        return {"version": reply["meta_info"]["weight_version"]}

    def _resynced(self, http: httpx.Client) -> None:
        self.resyncs += 1
        self._publish(http)

    def _publish(self, http: httpx.Client, tries: int = 1) -> None:
        version = str(self.committed)
        folder = self._weights / version
        if not folder.exists():
            folder.symlink_to(self._weights / "model", target_is_directory=True)
        for turn in range(tries):
            try:
                body = {"model_path": str(folder), "weight_version": version}
                http.post("/update_weights_from_disk", json=body).raise_for_status()
                return
            except httpx.HTTPError:
                if turn == tries - 1:
                    raise
                time.sleep(0.1)


class SmallRun(OwnDaemons):
    """A run whose server is the daemon's own to start."""

    def __init__(
        self,
        root: Path,
        model: Path,
        *,
        push: bool,
        probe: Mapping[str, float] = {},
        **extra: str,
    ) -> None:
        self.weights = root / "weights"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.starts_file = root / "starts"
        self.name = root.name
        self.weights.mkdir(parents=True)
        (self.weights / "model").symlink_to(model, target_is_directory=True)
        serve = f"{sys.executable} -m stepguard_grpo.server --model-path {model} --port {self.port}"
        note = f'echo "$STEPGUARD_INTENT" >> {self.starts_file}; exec {serve}'
        super().__init__(
            root,
            {
                "run": {"servers_on_stop": "keep"},
                "probe": {"interval_s": 0.5, **probe},
                "recovery": {"restart_budget": 50, "backoff_first_s": 0.01, "backoff_max_s": 0.01},
                "web": {"listen": "127.0.0.1:0"},
                "weights": {"sync": "disk"} | ({"path": f"{self.weights}/{{version}}"} if push else {}),
                "server": {"url": self.url, "command": ["bash", "-c", note], "stop_timeout_s": 5} | extra,
            },
        )

    def taken_up(self) -> bool:
        return self.serving()

    def serving(self) -> bool:
        """The page says GO, and the daemon says that the server is proven."""
        if self.order() != "GO":
            return False
        status = self.status()
        return bool(status) and status["servers"][0]["state"] == "serving"

    def started(self) -> tuple[proc.Proc, ...]:
        """The server's processes."""
        return proc.marked("STEPGUARD_SERVER", f"{self.name}@{self.state_dir}/server")

    def kill_scheduler(self) -> None:
        scheduler = [known for known in self.started() if known.role == "scheduler"]
        assert len(scheduler) == 1, self.started()
        os.kill(scheduler[0].pid, signal.SIGKILL)

    def starts(self) -> list[str]:
        """The intents under which server processes were really started."""
        return self.starts_file.read_text().split() if self.starts_file.exists() else []


@contextlib.contextmanager
def small_run(
    root: Path, model: Path, *, push: bool, probe: Mapping[str, float] = {}, **extra: str
) -> Iterator[SmallRun]:
    """A run that leaves no process behind."""
    run = SmallRun(root, model, push=push, probe=probe, **extra)
    try:
        yield run
    finally:
        run.close()


@contextlib.contextmanager
def training(run: SmallRun, *, resync: bool = False) -> Iterator[MiniTrainer]:
    """A trainer in this process, until the block is left."""
    trainer = MiniTrainer(run.run_dir, run.url, run.weights, resync=resync)
    trainer.start()
    try:
        yield trainer
    finally:
        trainer.stopping.set()
        trainer.join(timeout=20)
        assert not trainer.is_alive(), "the trainer hangs"
        if trainer.failure is not None:
            raise trainer.failure
