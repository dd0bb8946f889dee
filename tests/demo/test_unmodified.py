"""Zero integration: a script that knows nothing of Stepguard is started again from what is whole."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepguardd.control.client import ControlClient, ControlError, NoDaemonError
from stepguardd.control.contract import SOCKET_NAME

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

EXAMPLE = Path(__file__).parents[2] / "examples/unmodified"
STEPS = 200


class Run:
    """The example's folder, copied, and a daemon that runs it by the example's own config."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        for name in ("train.py", "config.toml"):
            shutil.copy(EXAMPLE / name, folder / name)
        self.folder, self.run_dir = folder, run_dir
        self.checkpoints = folder / "out/checkpoints"
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "OMP_NUM_THREADS": "1",
            "STEPGUARD__RUN__RUN_DIR": str(run_dir),
            "STEPGUARD__RUN__STATE_DIR": str(folder / "state"),
            "STEPGUARD__TRAINER__ON_STOP": "stop",
            "STEPGUARD__RECOVERY__BACKOFF_FIRST_S": "1",
            "STEPGUARD__WEB__LISTEN": "127.0.0.1:0",
        }
        self.log = (folder / "daemon.log").open("wb")
        command = [sys.executable, "-m", "stepguardd", "run", "--config", "config.toml"]
        self.daemon = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )

    def status(self) -> dict[str, Any]:
        try:
            with ControlClient(self.run_dir / SOCKET_NAME) as client:
                return dict(client.status())
        except (NoDaemonError, ControlError):
            return {}

    def script(self) -> int:
        """The pid of train.py in this folder."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                here = entry.name.isdigit() and (entry / "cwd").readlink() == self.folder
                if here and b"train.py" in (entry / "cmdline").read_bytes():
                    return int(entry.name)
        raise AssertionError("train.py does not run")

    def until(self, holds: Callable[[dict[str, Any]], object], what: str) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            status = self.status()
            if holds(status):
                return status
            time.sleep(0.1)
        raise AssertionError(f"{what}\n{self.status()}\n{(self.folder / 'daemon.log').read_text()[-4000:]}")

    def close(self) -> None:
        self.daemon.terminate()
        self.daemon.wait(40)
        self.log.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with tempfile.TemporaryDirectory(prefix="stepguard-test-") as run_dir:
        made = Run(tmp_path, Path(run_dir))
        yield made
        made.close()


def logged(status: dict[str, Any]) -> int:
    return int((status.get("stream") or {}).get("step") or 0)


def torn(folder: Path) -> Path:
    """A checkpoint as a kill in the middle of its saving leaves it, with the highest number of all."""
    source = next(folder.glob("checkpoint-*"))
    path = folder / f"checkpoint-{STEPS - 1}"
    shutil.copytree(source, path)
    (path / "trainer_state.json").unlink()
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return path


def test_a_killed_script_goes_on_from_its_newest_whole_checkpoint(run: Run) -> None:
    assert "import stepguard" not in (EXAMPLE / "train.py").read_text()
    run.until(lambda status: logged(status) >= 50, "the run did not get going")
    bad = torn(run.checkpoints)
    os.kill(run.script(), signal.SIGKILL)
    status = run.until(lambda status: (status.get("trainer") or {}).get("left") == "finished", "no good end")
    incident = status["last_incident"] or status["incident"]
    assert (incident["cause"], incident["relaunches"]) == ("trainer_exited", 1)
    assert "code -9" in (run.folder / "daemon.log").read_text(), "nobody killed it"
    assert not bad.exists(), "the torn one would have been resumed from"
    assert list(run.folder.rglob(f"*/checkpoint-{STEPS - 1}/model.safetensors")), "set aside, not deleted"
    log = (run.folder / "state/trainer.log").read_text()
    resumed = [line for line in log.splitlines() if line.startswith("resuming from")]
    assert len(resumed) == 1
    assert int(resumed[0].rsplit("-", 1)[1]) >= 40
    assert logged(status) == 300
    assert (run.checkpoints / "checkpoint-300").is_dir()


def test_without_stepguard_the_torn_checkpoint_is_the_end(tmp_path: Path) -> None:
    """The fault above is one: the script's own resume takes the highest number."""
    folder = tmp_path / "out/checkpoints"
    command = [sys.executable, str(EXAMPLE / "train.py"), str(folder)]
    subprocess.run([*command, "20"], check=True, timeout=100, capture_output=True)
    torn(folder)
    again = subprocess.run([*command, "40"], check=False, timeout=100, capture_output=True, text=True)
    assert again.returncode == 1
    assert f"resuming from {folder / f'checkpoint-{STEPS - 1}'}" in again.stdout
