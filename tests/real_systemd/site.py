"""A run on a real systemd: Stepguard as its installer leaves it, one server, and questions to both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from real_systemd.machine import Machine

PROGRAM = str(Path(sys.executable).with_name("stepguard"))
SECRET = "canary-5e1f"

CONFIG = """
[run]
mode = "act"
[[servers]]
name = "policy"
url = "http://127.0.0.1:{port}"
backend = "systemd"
unit = "stepguard-server@{run}.service"
log = "/var/log/stepguard/server-{run}.log"
start_timeout_s = 60
stop_timeout_s = 5
[weights]
sync = "disk"
path = "{training}/weights/{{version}}"
[checkpoints]
dir = "{training}/checkpoints"
[probe]
interval_s = 0.25
[recovery]
backoff_first_s = 0.2
backoff_max_s = 1
"""


def install(machine: Machine) -> None:
    """What a person does once on a machine, and a unit that is not Stepguard's."""
    machine.path("/run/systemd/system/other.service").write_text(
        "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=sleep 600\n"
    )
    machine.do("mkdir", "-p", "/var/lib/training")
    machine.do(PROGRAM, "install-service", "--writes", "/var/lib/training", "--json")
    machine.path("/etc/stepguard/credentials/wandb").write_text(SECRET)


class Site:
    """
    One run on a machine: its config, its server's and its trainer's commands. Nothing is started.

    Args:
        machine: a booted systemd with Stepguard installed.
        run: the run's name, and the instance's of each unit.
        port: where the server is to listen.
        serve: arguments of the server beside those.

    """

    def __init__(self, machine: Machine, run: str, *, port: int, serve: str = "") -> None:
        self.machine = machine
        self.run = run
        self.daemon = f"stepguardd@{run}.service"
        self.server = f"stepguard-server@{run}.service"
        self.trainer = f"stepguard-trainer@{run}.service"
        self.run_dir = f"/run/stepguard/{run}"
        self.training = f"/var/lib/training/{run}"
        machine.do("cp", "-r", "/run/shared/training", self.training)
        machine.do("chown", "-R", "stepguard:stepguard", self.training)
        config = CONFIG.format(port=port, run=run, training=self.training)
        machine.path(f"/etc/stepguard/{run}.toml").write_text(config)
        python = f"OMP_NUM_THREADS=1\nHOME=/tmp\n{{}}={sys.executable} -m"
        server = f"stepguard_grpo.server --model-path {self.training}/base --port {port} {serve}\n"
        machine.path(f"/etc/stepguard/servers/{run}.env").write_text(f"{python.format('SERVER')} {server}")
        trainer = f"stepguard_grpo.train --server-url http://127.0.0.1:{port} --run-root {self.training} "
        trainer += "--steps 100000 --save-every 5 --no-wandb --guard\n"
        machine.path(f"/etc/stepguard/trainers/{run}.env").write_text(f"{python.format('TRAINER')} {trainer}")

    def steady(self) -> None:
        """The daemon runs, nothing is held, and the server serves: from wherever the last test left it."""
        machine = self.machine
        machine.do("systemctl", "start", self.daemon)
        self.stepguard("resume")
        machine.until(self._settled, "the server serves and nothing is held", timeout_s=90)

    def stepguard(self, *arguments: str) -> None:
        """A `stepguard` command on the run, as root; the daemon may refuse."""
        self.machine.run(PROGRAM, *arguments, "--run-dir", self.run_dir)

    def status(self) -> dict[str, Any]:
        """`stepguard status --json`."""
        done = self.machine.run(PROGRAM, "status", "--json", "--run-dir", self.run_dir)
        return dict(json.loads(done.stdout or "{}"))

    def policy(self) -> dict[str, Any]:
        """What the daemon says of the server."""
        return dict((self.status().get("servers") or [{}])[0])

    def main_pid(self, unit: str) -> int:
        """A unit's main process, by its pid inside."""
        return int(self.machine.show(unit, "MainPID"))

    def restarts(self) -> int:
        """How often systemd has restarted the daemon."""
        return int(self.machine.show(self.daemon, "NRestarts"))

    def starts_of_server(self) -> int:
        """How many servers ever came up, by their own log."""
        log = self.machine.path(f"/var/log/stepguard/server-{self.run}.log")
        return log.read_text().count("fired up and ready to roll") if log.exists() else 0

    def _settled(self) -> bool:
        status = self.status()
        servers = status.get("servers") or [{}]
        return bool(servers[0].get("state") == "serving" and status["gate"]["order"] == "GO")
