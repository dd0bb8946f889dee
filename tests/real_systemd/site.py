"""A run on a real systemd: Stepguard as its installer leaves it, one server, and questions to both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from real_systemd.machine import Machine

RUN = "night"
DAEMON = f"stepguardd@{RUN}.service"
SERVER = "stepguard-server@policy.service"
RUN_DIR = f"/run/stepguard/{RUN}"
SECRET = "canary-5e1f"
SERVER_LOG = "/var/log/stepguard/server-policy.log"

CONFIG = """
[run]
mode = "act"
[[servers]]
name = "policy"
url = "http://127.0.0.1:{port}"
backend = "systemd"
unit = "stepguard-server@policy.service"
log = "/var/log/stepguard/server-policy.log"
start_timeout_s = 60
stop_timeout_s = 5
[weights]
sync = "none"
[probe]
interval_s = 0.25
[recovery]
backoff_first_s = 0.2
backoff_max_s = 1
"""


class Site:
    """
    The machine with a run on it.

    Args:
        machine: a booted systemd.
        port: where the server is to listen.

    """

    def __init__(self, machine: Machine, *, port: int) -> None:
        self.machine = machine
        self._port = port

    def install(self) -> None:
        """What a person does: install, configure, drop a secret in, have systemd read it all."""
        write = self._write
        write(
            "/run/systemd/system/other.service",
            "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=sleep 600\n",
        )
        self.machine.do(str(Path(sys.executable).with_name("stepguard")), "install-service", "--json")
        write(f"/etc/stepguard/{RUN}.toml", CONFIG.format(port=self._port))
        command = (
            f"{sys.executable} -m stepguard_grpo.server --model-path /run/shared/model --port {self._port}"
        )
        write("/etc/stepguard/servers/policy.env", f"SERVER={command}\nOMP_NUM_THREADS=1\n")
        write("/etc/stepguard/credentials/wandb", SECRET)
        self.machine.do("systemctl", "daemon-reload")

    def steady(self) -> None:
        """The daemon runs, nothing is held, and the server serves: from wherever the last test left it."""
        machine = self.machine
        machine.do("systemctl", "start", DAEMON)
        self.stepguard("resume")
        machine.until(self._settled, "the server serves and nothing is held", timeout_s=90)

    def stepguard(self, *arguments: str) -> None:
        """A `stepguard` command on the run, as root; the daemon may refuse."""
        program = Path(sys.executable).with_name("stepguard")
        self.machine.run(str(program), *arguments, "--run-dir", RUN_DIR)

    def status(self) -> dict[str, Any]:
        """`stepguard status --json`."""
        program = Path(sys.executable).with_name("stepguard")
        done = self.machine.run(str(program), "status", "--json", "--run-dir", RUN_DIR)
        return dict(json.loads(done.stdout or "{}"))

    def server(self) -> dict[str, Any]:
        """What the daemon says of the server."""
        return dict((self.status().get("servers") or [{}])[0])

    def main_pid(self, unit: str) -> int:
        """A unit's main process, by its pid inside."""
        return int(self.machine.show(unit, "MainPID"))

    def restarts(self) -> int:
        """How often systemd has restarted the daemon."""
        return int(self.machine.show(DAEMON, "NRestarts"))

    def starts_of_server(self) -> int:
        """How many servers ever came up, by their own log."""
        log = self.machine.path(SERVER_LOG)
        return log.read_text().count("fired up and ready to roll") if log.exists() else 0

    def _settled(self) -> bool:
        status = self.status()
        servers = status.get("servers") or [{}]
        return bool(servers[0].get("state") == "serving" and status["gate"]["order"] == "GO")

    def _write(self, inside: str, text: str) -> None:
        self.machine.path(inside).write_text(text)
