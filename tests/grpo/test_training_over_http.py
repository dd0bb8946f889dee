"""The trainer against the embedded server: two processes of the real thing, faults included."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from grpo.server_process import ServerProcess, running
from grpo.test_training import config, same_bits, truths, weights
from stepguard_grpo import ground_truth, task
from stepguard_grpo.config import Failures, WeightSyncMode
from stepguard_grpo.local import LocalServer
from stepguard_grpo.model import load_policy
from stepguard_grpo.rollout import HttpSampler, RolloutError
from stepguard_grpo.train import Outcome, RunRecord, main, train
from stepguard_grpo.weights import DiskSync, GroupSync, ServerClient, WeightPushError

pytestmark = pytest.mark.e2e


@pytest.fixture
def start(base_model: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    with ExitStack() as stack:

        def start(**more: Any) -> ServerProcess:
            log = tmp_path / f"server-{time.monotonic_ns()}.log"
            return stack.enter_context(
                running(base_model, log, "--crash-diagnostics-s", "0", **more)
            ).until_up()

        yield start


def over_http(url: str, run_root: Path, **more: Any) -> RunRecord:
    return train(config(run_root, **({"request_timeout_s": 5.0} | more), server_url=url))


@pytest.mark.parametrize("mode", list(WeightSyncMode))
def test_a_run_over_http_is_the_run_in_process_bit_for_bit(
    base_model: Path, server_url: str, tmp_path: Path, mode: WeightSyncMode
) -> None:
    local = LocalServer(base_model)
    train(config(tmp_path / "local", steps=4, save_every=4), sampler=local, sync=local)
    record = over_http(server_url, tmp_path / "http", steps=4, save_every=4, weight_sync=mode)
    assert (record.outcome, record.failed_pushes, record.garbage_steps) == (Outcome.FINISHED, 0, 0)
    first, second = (tmp_path / name / "checkpoints" / "checkpoint-4" for name in ("local", "http"))
    assert same_bits(weights(first), weights(second))
    assert httpx.get(server_url + "/model_info").json()["weight_version"] == "4"


def test_disk_sync_keeps_the_newest_two_versions(base_model: Path, server_url: str, tmp_path: Path) -> None:
    policy = load_policy(base_model)
    sync = DiskSync(ServerClient(server_url), tmp_path / "weights")
    for version in ("8", "9", "10", "9"):  # 9 again: after a rollback
        sync.push(policy, version)
    sync.close()
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["10", "9"]
    info = httpx.get(server_url + "/model_info").json()
    assert (info["weight_version"], info["model_path"]) == ("9", str(tmp_path / "weights" / "9"))


def test_a_group_dies_with_the_server_and_is_built_anew(
    base_model: Path, tmp_path: Path, start: Callable[..., ServerProcess]
) -> None:
    first = start()
    policy = load_policy(base_model)
    sync = GroupSync(ServerClient(first.url))
    with pytest.raises(WeightPushError, match="built anew"):
        sync.push(policy, "0")
    sync.rebuild()
    sync.push(policy, "1")
    sync.rebuild()  # also while the old one is there
    sync.push(policy, "2")
    first.process.kill()
    first.exit_code()
    with pytest.raises(WeightPushError):
        sync.push(policy, "3")
    second = start(port=first.port)
    with pytest.raises(WeightPushError, match="built anew"):
        sync.push(policy, "3")
    assert httpx.get(second.url + "/model_info").json()["weight_version"] == "default"
    sync.rebuild()
    sync.push(policy, "3")
    assert httpx.get(second.url + "/model_info").json()["weight_version"] == "3"
    sync.close()


def test_nobody_there_fails_fast_and_silence_in_time() -> None:
    request = task.batch(seed=0, step=1, groups=1, group_size=2)[0]

    async def roll_out(url: str) -> None:
        sampler = HttpSampler(url, timeout_s=0.3)
        try:
            await sampler(request)
        finally:
            await sampler.aclose()

    import asyncio

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(RolloutError, match=r"no answer within 0\.3 s"):
            asyncio.run(roll_out(f"http://127.0.0.1:{port}"))
    with pytest.raises(RolloutError, match="Connect"):
        asyncio.run(roll_out(f"http://127.0.0.1:{port}"))


def kill_at(run_root: Path, step: int, server: ServerProcess, then: Callable[[], object]) -> threading.Thread:
    """Watch the ground truth and SIGKILL the server's tree once that step is committed."""

    def watch() -> None:
        path = run_root / "ground_truth.jsonl"
        deadline = time.monotonic() + 40
        while ground_truth.summary(path).steps < step and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(server.process.pid, signal.SIGKILL)
        server.exit_code()
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_unguarded_a_killed_server_means_garbage_to_the_end(
    tmp_path: Path, start: Callable[..., ServerProcess]
) -> None:
    """Incident A over real processes: more than 20 steps on nothing but failures."""
    server = start()
    thread = kill_at(tmp_path, 5, server, then=lambda: None)
    record = over_http(server.url, tmp_path, steps=30, failures=Failures.ZERO)
    thread.join(timeout=10)
    assert server.process.poll() == -signal.SIGKILL
    assert record.steps == 30
    assert record.garbage_steps > 20
    assert record.final_reward == 0.0
    assert truths(tmp_path)[-1].failed_in_loss == 16


def test_unguarded_a_restarted_server_outside_the_group_serves_base_weights_for_good(
    tmp_path: Path, start: Callable[..., ServerProcess]
) -> None:
    """Incident A's second half: the handshake died with the server, the trainer believes its pushes."""
    server = start()
    thread = kill_at(tmp_path, 5, server, then=lambda: start(port=server.port))
    record = over_http(
        server.url,
        tmp_path,
        steps=60,
        failures=Failures.ZERO,
        weight_sync=WeightSyncMode.GROUP,
        min_step_s=0.08,
    )
    thread.join(timeout=30)
    assert record.garbage_steps > 20
    last = truths(tmp_path)[-1]
    assert (last.failed_in_loss, last.stale_in_loss) == (0, 16)


def test_the_command_runs_logs_and_says_what_it_came_to(server_url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stepguard_grpo.train", "--server-url", server_url, "--steps", "2"]
    command += ["--run-root", str(tmp_path), "--groups", "2", "--group-size", "2", "--save-every", "2"]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "STEPGUARD"))
    }
    done = subprocess.run(
        command,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["outcome"], record["steps"], record["garbage_steps"]) == ("finished", 2, 0)
    logs = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(logs) == 1
    assert b"grpo_actor/task_reward/avg" in logs[0].read_bytes()
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "trainer_state.json").is_file()


def test_the_command_dies_with_1_when_there_is_no_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--server-url", "http://127.0.0.1:9", "--run-root", str(tmp_path), "--server-wait-s", "0"]
    assert main([*command, "--no-guard", "--no-wandb"]) == 1
    assert "no server answered" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
