"""A small real run: a daemon process, the embedded server under it, a trainer with a guard in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from grpo.server_process import free_port
from stepguard import Guard, RollbackRequested, StopRequested
from stepguard.gate import GateError, GatePage
from stepguardd import proc
from stepguardd.control.client import ControlClient, ControlError, NoDaemonError

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


class SmallRun:
    """The run's folders, its config, and the processes that are started for it."""

    def __init__(self, root: Path, model: Path, *, push: bool, **extra: str) -> None:
        self.root = root
        self.run_dir, self.state_dir, self.weights = root / "run", root / "state", root / "weights"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.starts_file = root / "starts"
        self.log = root / "daemon.log"
        self.name = root.name
        self.weights.mkdir(parents=True)
        (self.weights / "model").symlink_to(model, target_is_directory=True)
        self.config = root / "config.toml"
        serve = f"{sys.executable} -m stepguard_grpo.server --model-path {model} --port {self.port}"
        note = f'echo "$STEPGUARD_INTENT" >> {self.starts_file}; exec {serve}'
        lines = {
            "run": {"name": self.name, "mode": "act", "servers_on_stop": "keep"}
            | {"run_dir": str(self.run_dir), "state_dir": str(self.state_dir)},
            "probe": {"interval_s": 0.5},
            "recovery": {"restart_budget": 50, "backoff_first_s": 0.01, "backoff_max_s": 0.01},
            "web": {"listen": "127.0.0.1:0"},
            "weights": {"sync": "disk"} | ({"path": f"{self.weights}/{{version}}"} if push else {}),
            "server": {"url": self.url, "command": ["bash", "-c", note], "stop_timeout_s": 5} | extra,
        }
        text = ""
        for table, values in lines.items():
            text += f"[{table}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
        self.config.write_text(text)
        self.daemons: list[subprocess.Popen[bytes]] = []

    def daemon(self, crash_at: str | None = None) -> subprocess.Popen[bytes]:
        """Start a daemon; with a point at which it is to be killed."""
        environment = dict(os.environ)
        environment.pop("STEPGUARD_CRASH_AT", None)
        if crash_at is not None:
            environment["STEPGUARD_CRASH_AT"] = crash_at
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "stepguardd", "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self.daemons.append(child)
        return child

    def replace_daemon(self, crash_at: str | None = None) -> None:
        """End the daemon in an orderly way, and have another take up the run that goes on."""
        self.daemons[-1].terminate()
        assert self.daemons[-1].wait(timeout=20) == 0, self.story()
        self.daemon(crash_at)
        self.until(self.serving, "another daemon takes up the run")

    def status(self) -> dict[str, Any]:
        """What the daemon says of itself; {} while nobody answers."""
        try:
            with ControlClient(self.run_dir / "control.sock") as client:
                return dict(client.status())
        except (NoDaemonError, ControlError):
            return {}

    def ask(self, verb: Any, **args: object) -> None:
        with ControlClient(self.run_dir / "control.sock") as client:
            client.ask(verb, "a test", args)

    def order(self) -> str:
        """The order on the page, as the trainer sees it; "" where no living daemon stands behind it."""
        try:
            page = GatePage.open(self.run_dir / "gate", writable=False)
        except GateError:
            return ""
        with contextlib.closing(page):
            half = page.daemon()
        if half is None or half.lease_deadline_ns < time.monotonic_ns():
            return ""
        return half.order.name

    def serving(self) -> bool:
        """The page says GO, and the daemon says that the server is proven."""
        if self.order() != "GO":
            return False
        status = self.status()
        return bool(status) and status["servers"][0]["state"] == "serving"

    def tree(self) -> tuple[proc.Proc, ...]:
        """The server's processes."""
        return proc.marked("STEPGUARD_SERVER", f"{self.name}@{self.state_dir}/server")

    def kill_scheduler(self) -> None:
        scheduler = [known for known in self.tree() if known.role == "scheduler"]
        assert len(scheduler) == 1, self.tree()
        os.kill(scheduler[0].pid, signal.SIGKILL)

    def starts(self) -> list[str]:
        """The intents under which server processes were really started."""
        return self.starts_file.read_text().split() if self.starts_file.exists() else []

    def until(self, holds: Callable[[], object], what: str, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"not in time: {what}\n{self.story()}"
            time.sleep(0.03)

    def story(self) -> str:
        """What the daemon logged and says, for a failing test."""
        return f"{self.status()}\n{self.log.read_text()[-6000:]}"

    def close(self) -> None:
        for daemon in self.daemons:
            if daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait(timeout=10)
        for known in self.tree():
            with contextlib.suppress(ProcessLookupError):
                os.kill(known.pid, signal.SIGKILL)


@contextlib.contextmanager
def small_run(root: Path, model: Path, *, push: bool, **extra: str) -> Iterator[SmallRun]:
    """A run that leaves no process behind."""
    run = SmallRun(root, model, push=push, **extra)
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
