"""The kernel kills a server for its unit's memory limit: the watchdog stays, and starts it with less."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.server_process import free_port
from real_systemd.machine import Machine, booted, memory_cgroups, why_not
from real_systemd.site import Site, install
from requirements import require
from stepguard_grpo.model import write_base_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

REQUEST_BYTES = 2 << 20
ROOM_FOR = 48  # of a step's 64 rollouts; the next rung of the ladder has 32 at a time


class Memory:
    """A unit's memory cgroup, in either version."""

    def __init__(self, site: Site) -> None:
        self._site, machine = site, site.machine
        legacy = machine.cgroups == "hybrid"
        root = "/sys/fs/cgroup/memory" if legacy else "/sys/fs/cgroup"
        self._folder = machine.path(root + machine.show(site.server, "ControlGroup"))
        self._limit, self._used = ("memory.limit_in_bytes", "rss") if legacy else ("memory.max", "anon")

    def used_bytes(self) -> int:
        """What the kernel cannot take back by itself."""
        rows = (line.split() for line in (self._folder / "memory.stat").read_text().splitlines())
        return next(int(value) for name, value in rows if name == self._used)

    def limit(self, limit_bytes: int) -> None:
        """`systemctl set-property`. Version 1 refuses less than is in use: then between two batches."""
        deadline = time.monotonic() + 60
        while not self._limited(limit_bytes):
            assert time.monotonic() < deadline, "the limit was never set"
            words = ("set-property", "--runtime", self._site.server, f"MemoryMax={limit_bytes}")
            self._site.machine.do("systemctl", *words)

    def _limited(self, limit_bytes: int) -> bool:
        try:
            text = (self._folder / self._limit).read_text().strip()
        except OSError:
            return True  # the unit was killed in this moment, and its cgroup with it
        return text.isdigit() and int(text) <= limit_bytes


@pytest.fixture
def limiting(tmp_path: Path) -> Iterator[Machine]:
    """A machine whose systemd can limit a unit's memory, by the cgroups that this kernel has."""
    cgroups = memory_cgroups()
    reason = why_not() or (None if cgroups else "no memory cgroup can be made here")
    if reason is not None or cgroups is None:
        require("systemd", str(reason))
    write_base_model(tmp_path / "shared" / "training" / "base", seed=0)
    with booted(tmp_path, cgroups) as machine:
        install(machine)
        yield machine


def test_a_kernel_kill_in_the_servers_unit_leaves_the_watchdog_and_costs_one_restart(
    limiting: Machine,
) -> None:
    """A real kill, told as host memory; the packaged unit takes the lower rung, as a plain user's daemon."""
    machine = limiting
    site = Site(machine, "short", port=free_port(), serve=f"--request-bytes {REQUEST_BYTES}")
    site.steady()
    memory = Memory(site)
    idle_bytes = memory.used_bytes()
    machine.do("systemctl", "start", site.trainer)
    machine.until(lambda: committed(site) >= 3, "3 steps", timeout_s=120)
    watching, restarted, known = site.main_pid(site.daemon), site.restarts(), site.policy()["restarts"]
    killed = machine.show(site.server, "InvocationID")

    memory.limit(idle_bytes + ROOM_FOR * REQUEST_BYTES)
    machine.until(lambda: incident(site).get("closed_at") is not None, "the incident is over", timeout_s=120)

    assert machine.show(site.daemon, "ActiveState") == "active"
    assert (site.main_pid(site.daemon), site.restarts()) == (watching, restarted)
    assert machine.show(site.server, "InvocationID") != killed
    assert site.policy()["restarts"] == known + 1
    told = incident(site)
    assert told["cause"] == "server_died"
    said = "\n".join(told["actions"])
    assert "the kernel killed a process of policy" in said
    assert "policy ran out of host memory: max_running_requests unset → 32" in said
    assert "old arguments" not in said
    running = machine.path(f"/proc/{site.main_pid(site.server)}/cmdline").read_text().split("\0")
    assert running[running.index("--max-running-requests") + 1] == "32"
    back_at = committed(site)
    machine.until(lambda: committed(site) >= back_at + 3, "the trainer goes on")
    machine.do("systemctl", "stop", site.trainer, site.daemon, site.server)


def committed(site: Site) -> int:
    return int(site.status()["trainer"]["committed_step"] or 0)


def incident(site: Site) -> dict[str, Any]:
    """The incident that there is, or was."""
    status = site.status()
    return dict(status.get("incident") or status.get("last_incident") or {})
