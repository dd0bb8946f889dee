"""Without root: the units of `install-service --user`, in a user's own manager of a real systemd."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from grpo.server_process import free_port
from real_systemd.machine import Machine
from real_systemd.site import PROGRAM

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

USER = "stepguard"  # any that is not root; this one is there
HOME, RUNTIME = "/var/lib/alice", "/run/alice"
RUN = "own"
DAEMON, SERVER = f"stepguardd@{RUN}.service", f"stepguard-server@{RUN}.service"
RUN_DIR = f"{RUNTIME}/stepguard/{RUN}"

# What logind and user@.service do for somebody who logs in or lingers.
MANAGER = f"""
[Unit]
DefaultDependencies=no
[Service]
Type=notify
User={USER}
Delegate=yes
StateDirectory=alice
RuntimeDirectory=alice
RuntimeDirectoryMode=0700
Environment=HOME={HOME} XDG_RUNTIME_DIR={RUNTIME}
ExecStart=/lib/systemd/systemd --user
TimeoutStartSec=30
TimeoutStopSec=20
"""
CONFIG = """
[run]
mode = "act"
[[servers]]
name = "policy"
url = "http://127.0.0.1:{port}"
backend = "systemd"
unit = "{server}"
start_timeout_s = 60
stop_timeout_s = 5
[probe]
interval_s = 0.25
[recovery]
backoff_first_s = 0.2
backoff_max_s = 1
"""


class Alice:
    """A user who has a manager of her own, and nothing else."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def do(self, *command: str) -> str:
        """A command of hers that has to succeed."""
        settings = (f"HOME={HOME}", f"XDG_RUNTIME_DIR={RUNTIME}")
        return self.machine.do("runuser", "-u", USER, "--", "env", *settings, *command)

    def writes(self, path: str, text: str) -> None:
        """A file of hers."""
        self.do("sh", "-c", 'mkdir -p "$(dirname "$0")" && printf %s "$1" >"$0"', f"{HOME}/{path}", text)

    def show(self, unit: str, name: str) -> str:
        return self.do("systemctl", "--user", "show", f"--property={name}", "--value", unit).strip()

    def status(self) -> dict[str, Any]:
        done = self.machine.run(PROGRAM, "status", "--json", "--run-dir", RUN_DIR)
        return dict(json.loads(done.stdout or "{}"))

    def policy(self) -> dict[str, Any]:
        return dict((self.status().get("servers") or [{}])[0])

    def steady(self) -> None:
        """Her server serves, and nothing is held."""
        self.machine.until(
            lambda: self.policy().get("state") == "serving" and self.status()["gate"]["order"] == "GO",
            "her server serves",
            timeout_s=90,
        )


@pytest.fixture
def alice(machine: Machine) -> Alice:
    machine.path("/run/systemd/system/alice.service").write_text(MANAGER)
    machine.do("systemctl", "daemon-reload")
    machine.do("systemctl", "start", "alice.service")
    return Alice(machine)


def test_a_users_own_units_start_watch_and_come_back_without_any_privilege(alice: Alice) -> None:
    port = free_port()
    alice.do(PROGRAM, "install-service", "--user", "--json")
    alice.writes(f".config/stepguard/{RUN}.toml", CONFIG.format(port=port, server=SERVER))
    serve = f"{sys.executable} -m stepguard_grpo.server --model-path /run/shared/training/base --port {port}"
    alice.writes(f".config/stepguard/servers/{RUN}.env", f"OMP_NUM_THREADS=1\nSERVER={serve}\n")

    alice.do("systemctl", "--user", "start", DAEMON)
    assert alice.show(DAEMON, "ActiveState") == "active"
    alice.steady()
    known, daemon = alice.policy(), alice.show(DAEMON, "MainPID")
    assert str(known["pid"]) == alice.show(SERVER, "MainPID")

    # The daemon is killed: her manager starts it again, and it takes up the server that runs.
    alice.do("kill", "-KILL", daemon)
    alice.machine.until(lambda: alice.show(DAEMON, "NRestarts") == "1", "her manager restarted it")
    alice.steady()
    assert alice.show(DAEMON, "MainPID") != daemon
    assert alice.policy()["pid"] == known["pid"]

    # The server is killed: the daemon starts it again, with no leave but her own.
    alice.do("kill", "-KILL", str(known["pid"]))
    alice.machine.until(lambda: alice.policy().get("restarts") == 1, "the daemon restarts the server")
    alice.steady()
    assert alice.policy()["pid"] != known["pid"]
    alice.do("systemctl", "--user", "stop", DAEMON, SERVER)
    assert alice.show(DAEMON, "Result") == "success"
    alice.machine.do("systemctl", "stop", "alice.service")
