"""The shim: W&B's rows reach a file at once, and nothing that fails in it reaches the trainer."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepguardd.config import Config
from stepguardd.core.events import Event, RewardLogged
from stepguardd.sources.stream import RewardStream

SHIM = Path(__file__).parents[2] / "trainer/stepguard/shim"

# A W&B of no version at all: the two things that the shim touches.
STAND_IN = """
class Run:
    step = 7
    def __init__(self):
        self.rows = []
    def log(self, data, step=None, commit=None, sync=None):
        self.rows.append((data, step, commit))
        return "logged"
"""


def run(folder: Path, code: str, *, file: Path | None, wandb: str = STAND_IN, **more: str) -> Any:
    """Run a script in an environment with the shim, and with a stand-in for W&B."""
    package = folder / "site/wandb/sdk"
    package.mkdir(parents=True)
    (folder / "site/wandb/__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "wandb_run.py").write_text(wandb)
    path = os.pathsep.join([str(SHIM), str(folder / "site"), more.pop("path", "")]).rstrip(os.pathsep)
    environment = {key: value for key, value in os.environ.items() if key != "STEPGUARD_SHIM_FILE"}
    environment |= {"PYTHONPATH": path, **more}
    if file is not None:
        environment["STEPGUARD_SHIM_FILE"] = str(file)
    script = "from wandb.sdk.wandb_run import Run\nrun = Run()\n" + code
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_row_is_there_before_wandb_has_it_and_wandb_gets_what_was_given(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    code = f"""
first = {{"reward": 0.5, "note": "text", "nested": {{"kl": 1}}}}
assert run.log(first, step=3) == "logged"
assert len(open({str(file)!r}).readlines()) == 1
run.log({{"reward": 0.75}}, 4, False)
run.log({{"reward": float("nan")}})
assert run.rows[:2] == [(first, 3, None), ({{"reward": 0.75}}, 4, False)]
"""
    done = run(tmp_path, code, file=file)
    assert (done.returncode, done.stderr) == (0, "")
    found = rows(file)
    assert found[:2] == [{"reward": 0.5, "nested.kl": 1, "_step": 3}, {"reward": 0.75, "_step": 4}]
    assert found[2]["_step"] == 7, "the run's own counter, where the caller named no step"


@pytest.mark.parametrize(
    ("what", "code", "wandb"),
    [
        ("a file that cannot be written", 'run.log({"a": 1})\nrun.log({"a": 2})', STAND_IN),
        ("a value that raises", "class Bad(float):\n def __repr__(self): raise OSError('no')\n"
         "class Odd:\n size = 1\n item = 1\n def __float__(self): raise RuntimeError('no')\n"
         'run.log({"a": Odd()})\nrun.log({"a": 2})', STAND_IN),
        ("a row that is none", "run.log(7)\nrun.log(None)", STAND_IN),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) and len(value) < 40 else "",
)  # fmt: skip
def test_whatever_fails_in_it_is_said_once_and_wandb_goes_on(
    tmp_path: Path, what: str, code: str, wandb: str
) -> None:
    file = tmp_path / ("no/folder/rows" if "file" in what else "rows.jsonl")
    done = run(tmp_path, code + "\nassert len(run.rows) == 2", file=file, wandb=wandb)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stepguard shim:") == 1, what
    assert "W&B goes on without it" in done.stderr


def test_a_wandb_that_has_no_such_class_is_said_and_left_alone(tmp_path: Path) -> None:
    done = run(tmp_path, "", file=tmp_path / "rows.jsonl", wandb="def Run(): return 1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stepguard shim:") == 1


def test_without_its_variable_nothing_is_wrapped(tmp_path: Path) -> None:
    done = run(tmp_path, 'assert not hasattr(Run.log, "__wrapped__")', file=None)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_environments_own_sitecustomize_runs_as_well(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import os\nos.environ['OWN'] = 'ran'\n")
    code = 'import os\nassert os.environ["OWN"] == "ran"\nassert hasattr(Run.log, "__wrapped__")'
    done = run(tmp_path, code, file=tmp_path / "rows.jsonl", path=str(own))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_trainer_without_wandb_never_notices(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(SHIM), "STEPGUARD_SHIM_FILE": str(tmp_path / "rows")}
    done = subprocess.run(
        [sys.executable, "-c", "import json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "rows").exists()


@pytest.mark.e2e
def test_with_the_real_wandb_a_row_logged_with_its_step_is_there_at_once(tmp_path: Path) -> None:
    """W&B itself keeps such a row back until the next step; a SIGKILL then loses it."""
    file = tmp_path / "rows.jsonl"
    code = """
import os, signal, sys, wandb
run = wandb.init(project="p", mode="offline", dir=sys.argv[1], settings=wandb.Settings(silent=True))
for step in range(1, 4):
    wandb.log({"train/reward": step / 10}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(SHIM), "STEPGUARD_SHIM_FILE": str(file)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    assert "stepguard" not in done.stderr
    assert rows(file) == [{"train/reward": step / 10, "_step": step} for step in (1, 2, 3)]


def test_the_daemon_reads_its_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    config = Config.model_validate({"stream": {"jsonl": str(file)}, "reward": {"metric": "train/reward"}})
    events: list[Event] = []
    stream = RewardStream.of(config, None, events.append)
    assert stream is not None
    asyncio.run(stream.look())  # a file that is not there yet is waited for
    file.write_text('{"train/reward": 0.5, "_step": 3}\n')
    asyncio.run(stream.look())
    assert [(one.step, one.reward) for one in events if isinstance(one, RewardLogged)] == [(3, 0.5)]
    position = next(one.position for one in events if isinstance(one, RewardLogged))
    with file.open("a") as more:
        more.write('{"train/reward": 0.75, "_step": 4}\n')
    later: list[Event] = []
    again = RewardStream.of(config, position, later.append)
    assert again is not None
    asyncio.run(again.look())
    assert [one.step for one in later if isinstance(one, RewardLogged)] == [4]
