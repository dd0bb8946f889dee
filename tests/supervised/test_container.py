"""
A whole incident in a container: no systemd, no kernel log, none of the host's processes.

`stepguard exec` is process 1 there, by the command of compose.yaml; the server is its daemon's child, the
trainer is the reference one, and what must outlive the container is on a volume. Everything is real.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from grpo.server_process import SCHEDULER, free_port
from requirements import require
from stepguard_grpo import ground_truth
from stepguard_grpo.model import write_base_model
from supervised.container import VOLUME, Container, container, why_not

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEPS = 80
EXAMPLES = Path(__file__).parents[2] / "docs/deploy/examples"
COMPOSE = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]["train"]
RUN_DIR = Path("/run/stepguard/night")

CONFIG = """
[run]
name = "night"
run_dir = "{run_dir}"
state_dir = "{volume}/state"
mode = "act"
servers_on_stop = "stop"
[server]
name = "policy"
url = "{url}"
command = ["{python}", "-m", "stepguard_grpo.server", "--model-path", "{volume}/run/base", "--port", "{port}"]
[weights]
sync = "disk"
path = "{volume}/run/weights/{{version}}"
[checkpoints]
dir = "{volume}/run/checkpoints"
[web]
listen = "127.0.0.1:0"
"""


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A run's folders on the host: its base model, and its configuration with the container's paths."""
    reason = why_not()
    if reason is not None:
        require("container", reason)
    folder = tmp_path / "volume"
    write_base_model(folder / "run" / "base", seed=0)
    port = free_port()
    text = CONFIG.format(
        run_dir=RUN_DIR, volume=VOLUME, url=f"http://127.0.0.1:{port}", python=sys.executable, port=port
    )
    (folder / "run.toml").write_text(text)
    (folder / "url").write_text(f"http://127.0.0.1:{port}")
    return folder


def shown(words: Sequence[str]) -> list[str]:
    """A command of compose.yaml, with the program and the configuration of this machine."""
    here = {
        "stepguard": [sys.executable, "-m", "stepguardd"],
        "/etc/stepguard/run.toml": [f"{VOLUME}/run.toml"],
    }
    return [word for one in words for word in here.get(one, [one])]


def command(volume: Path) -> list[str]:
    """compose.yaml's own, for the reference trainer."""
    trainer = [sys.executable, "-m", "stepguard_grpo.train", "--server-url", (volume / "url").read_text()]
    trainer += ["--run-root", f"{VOLUME}/run", "--steps", str(STEPS), "--min-step-s", "0.1", "--no-wandb"]
    words = shown(COMPOSE["command"])
    at = words.index("--")
    assert words[at:] == ["--", "python", "train.py"]
    return [*words[:at], "--json", "--", *trainer]


def steps(volume: Path) -> int:
    return len(ground_truth.read(volume / "run" / "ground_truth.jsonl"))


def processes(running: Container) -> dict[int, bytes]:
    """Every process that the container knows of, with its command line."""
    found = {}
    for folder in running.path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                found[int(folder.name)] = (folder / "cmdline").read_bytes()
    return found


def schedulers(running: Container) -> list[int]:
    return [pid for pid, words in processes(running).items() if SCHEDULER in words.decode().split("\0")]


def breaker(running: Container) -> str | None:
    phase: str | None = (running.status(RUN_DIR).get("breaker") or {}).get("phase")
    return phase


def test_an_incident_in_a_container_ends_well_and_its_report_outlives_it(volume: Path) -> None:
    """The server is killed: held, restarted, its weights pushed; the run ends with no step on garbage."""
    with container(volume, command(volume), volume.parent / "container.log") as running:
        running.until(lambda: steps(volume) >= 5, "five steps")

        # It is the place that it is meant to be: nothing of the host's, and what is unseen is said.
        inside = processes(running)
        assert inside[1].split(b"\0")[1:4] == [b"-m", b"stepguardd", b"exec"]
        assert len(inside) < 20, "it sees processes that are not its own"
        assert not running.path("/dev/kmsg").exists()
        assert not running.path("/run/systemd").exists()
        before = running.status(RUN_DIR)
        assert "/dev/kmsg" in before["unseen"]["kernel log"]
        assert before["incidents"] == 0

        # compose.yaml's health check: a held run is unhealthy, and nothing is restarted for that.
        check = shown(COMPOSE["healthcheck"]["test"][1:])
        assert check[-3:] == ["--run-dir", str(RUN_DIR), "--json"]
        running.run(*check)
        running.run(*shown(["stepguard", "pause", "--run-dir", str(RUN_DIR)]))
        assert running.asked(*check).returncode == 1
        running.run(*shown(["stepguard", "resume", "--run-dir", str(RUN_DIR)]))
        running.until(lambda: running.asked(*check).returncode == 0, "it is healthy again")

        # The parent dies and leaves its scheduler an orphan, which is process 1's to find.
        (server,), (scheduler,) = before["servers"], schedulers(running)
        running.run("kill", "-KILL", str(server["pid"]))
        running.until(lambda: running.status(RUN_DIR).get("incidents") == 1, "the death is seen")
        running.until(lambda: breaker(running) == "closed", "all is well")
        (restarted,) = running.status(RUN_DIR)["servers"]
        assert (restarted["restarts"], restarted["state"]) == (1, "serving")
        assert restarted["pid"] != server["pid"]
        assert len(schedulers(running)) == 1
        assert schedulers(running) != [scheduler]
        assert running.outer.wait(timeout=120) == 0, running.story()

    assert json.loads(running.story().splitlines()[-1]) == {"exit_code": 0, "daemon_restarts": 0}
    record = json.loads((volume / "run" / "run_record.json").read_text())
    assert (record["outcome"], record["steps"], record["garbage_steps"]) == ("finished", STEPS, 0)
    told = [sys.executable, "-m", "stepguardd", "report", "--state-dir", str(volume / "state"), "--json"]
    done = subprocess.run(told, capture_output=True, text=True, timeout=60, check=True)
    report = json.loads(done.stdout)
    assert (report["incident"], report["reason"], report["stage"]) == (1, "server_died", "closed")
    assert report["cost"]["garbage_steps"] == 0
