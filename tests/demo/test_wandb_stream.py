"""A trainer without the guard, watched by its W&B log alone: a real `wandb`, a real daemon."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stepguardd.control.client import ControlClient, ControlError, NoDaemonError
from stepguardd.control.contract import SOCKET_NAME

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

CONFIG = """
[run]
run_dir = "{run_dir}"
state_dir = "{state_dir}"
mode = "hold"
[stream]
wandb_dir = "{wandb_dir}"
step_key = "train/global_step"
"""


@contextmanager
def daemon(tmp_path: Path, wandb_dir: Path) -> Iterator[ControlClient]:
    with tempfile.TemporaryDirectory(prefix="stepguard-test-") as run_dir:
        config = tmp_path / "config.toml"
        config.write_text(CONFIG.format(run_dir=run_dir, state_dir=tmp_path / "state", wandb_dir=wandb_dir))
        child = subprocess.Popen([sys.executable, "-m", "stepguardd", "run", "--config", str(config)])
        try:
            with ControlClient(Path(run_dir) / SOCKET_NAME) as client:
                yield client
        finally:
            child.terminate()
            assert child.wait(20) == 0, "SIGTERM stops the daemon cleanly"


def settled(client: ControlClient, last_step: int, timeout_s: float = 40.0) -> dict[str, Any]:
    """The status once the stream's last step has arrived."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            status: dict[str, Any] = dict(client.status())
        except (NoDaemonError, ControlError):
            status = {}
        if (status.get("stream") or {}).get("step") == last_step:
            return status
        time.sleep(0.1)
    raise AssertionError(f"step {last_step} never came through the stream")


def train(folder: Path, steps: int, gone_from: int) -> None:
    script = Path(__file__).parent / "wandb_reward_trainer.py"
    subprocess.run(
        [sys.executable, str(script), str(folder), str(steps), str(gone_from)], check=True, timeout=90
    )


def test_a_reward_gone_to_zero_is_told_with_its_step(tmp_path: Path) -> None:
    """No server to blame and no trainer to ask: the hold stands on the page, and a person is called."""
    with daemon(tmp_path, tmp_path / "wandb") as client:
        train(tmp_path, 60, gone_from=41)
        status = settled(client, 60)
    assert status["stream"]["metric"] == "grpo_actor/task_reward/avg"
    assert status["gate"]["order"] == "HOLD"
    assert status["incident"]["cause"] == "reward_collapse"
    assert status["incident"]["onset_step"] == 41


def test_a_healthy_stream_holds_nothing(tmp_path: Path) -> None:
    """The same run without the fault: the test above can fail."""
    with daemon(tmp_path, tmp_path / "wandb") as client:
        train(tmp_path, 60, gone_from=1000)
        status = settled(client, 60)
    assert status["gate"]["order"] == "GO"
    assert status["incident"] is None
