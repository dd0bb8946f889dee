"""A trainer that is a unit of its own, beside the daemon's and the server's, rolled back by a fourth."""

from __future__ import annotations

import pytest

from grpo.server_process import free_port
from real_systemd.machine import Machine
from real_systemd.site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def test_starting_the_rollback_unit_takes_a_training_run_back_in_place(machine: Machine) -> None:
    """Checkpoints are vetted inside the daemon's sandbox, and the folder named at install is written to."""
    site = Site(machine, "day", port=free_port())
    site.steady()
    machine.do("systemctl", "start", site.trainer)
    machine.until(lambda: (site.status()["trainer"]["committed_step"] or 0) >= 22, "22 steps", timeout_s=120)
    pid = site.main_pid(site.trainer)
    machine.do("systemctl", "start", f"stepguard-rollback@{site.run}.service")
    goes_on(site, attempt=1)
    site.stepguard("rollback", "--before-step", "12", "--yes")
    goes_on(site, attempt=2)
    assert site.main_pid(site.trainer) == pid
    assert machine.show(site.trainer, "NRestarts") == "0"
    aside = machine.path(f"{site.training}/checkpoints/quarantine")
    assert [path.name for path in aside.iterdir() if path.name.startswith("before-12-")], (
        "nothing was set aside"
    )
    machine.do("systemctl", "stop", site.trainer, site.daemon, site.server)


def goes_on(site: Site, *, attempt: int) -> None:
    """Wait until steps of this attempt are committed."""
    machine = site.machine
    machine.until(lambda: site.status()["trainer"]["attempt"] == attempt, f"attempt {attempt}")
    back_at = site.status()["trainer"]["committed_step"]
    machine.until(lambda: site.status()["trainer"]["committed_step"] > back_at, "it goes on")
