"""The daemon as a unit of a real systemd: ready, watched, killed, stopped, and its server beside it."""

from __future__ import annotations

import pytest

from real_systemd.machine import WATCHDOG_S
from real_systemd.site import SECRET, Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def test_start_returns_when_the_daemon_is_ready_and_runs_as_its_user(site: Site) -> None:
    """READY=1 came from a daemon whose socket answers; STATUS= is there to read."""
    machine = site.machine
    machine.do("systemctl", "stop", site.daemon)
    machine.do("systemctl", "start", site.daemon)
    assert machine.show(site.daemon, "ActiveState") == "active"
    assert site.status()["run"] == site.run
    uid = machine.do("id", "-u", "stepguard").strip()
    assert machine.do("stat", "-c", "%u", f"/proc/{site.main_pid(site.daemon)}").strip() == uid
    machine.until(lambda: "mode act" in machine.show(site.daemon, "StatusText"), "a status line")


def test_a_daemon_that_decides_feeds_its_watchdog(site: Site) -> None:
    """Heard of for twice the watchdog's time, and never restarted."""
    site.steady()
    machine, before, fed = site.machine, site.restarts(), set()
    pid = site.main_pid(site.daemon)

    def heard_enough() -> bool:
        fed.add(machine.show(site.daemon, "WatchdogTimestampMonotonic"))
        return len(fed) > 2 * WATCHDOG_S

    machine.until(heard_enough, "it is heard of every second", timeout_s=30)
    assert (site.main_pid(site.daemon), site.restarts()) == (pid, before)


def test_a_hung_decision_loop_is_ended_by_the_watchdog_and_comes_back(site: Site) -> None:
    site.steady()
    machine, before, hung = site.machine, site.restarts(), site.main_pid(site.daemon)
    serving = machine.show(site.server, "InvocationID")
    machine.kill(hung, "STOP")
    machine.until(
        lambda: machine.show(site.daemon, "Result") == "watchdog", "the watchdog bites", timeout_s=30
    )
    machine.until(lambda: site.restarts() == before + 1, "systemd restarted the daemon", timeout_s=30)
    site.steady()
    assert site.main_pid(site.daemon) != hung
    assert machine.show(site.server, "InvocationID") == serving


def test_a_killed_daemon_comes_back_with_its_pause_and_its_server(site: Site) -> None:
    """SIGKILL: what a person decided still holds, and the server is taken up, not started."""
    site.steady()
    machine, before, killed = site.machine, site.restarts(), site.main_pid(site.daemon)
    serving, server = machine.show(site.server, "InvocationID"), site.policy()
    machine.do("systemctl", "start", f"stepguard-pause@{site.run}.service")
    generation = site.status()["gate"]["generation"]
    machine.kill(killed, "KILL")
    machine.until(lambda: machine.show(site.daemon, "Result") == "signal", "it is dead", timeout_s=10)
    machine.until(lambda: site.restarts() == before + 1, "systemd restarted the daemon", timeout_s=30)
    machine.until(lambda: site.policy().get("state") == "serving", "the server is known again")
    status = site.status()
    assert status["breaker"]["phase"] == "forced_open"
    assert status["gate"]["order"] == "HOLD"
    assert status["gate"]["generation"] >= generation
    assert site.policy()["pid"] == server["pid"]
    assert site.policy()["restarts"] == server["restarts"]
    assert machine.show(site.server, "InvocationID") == serving


def test_a_clean_stop_leaves_the_server_and_the_gate_page(site: Site) -> None:
    site.steady()
    machine, serving = site.machine, site.machine.show(site.server, "InvocationID")
    page = machine.path(f"{site.run_dir}/gate").stat().st_ino
    machine.do("systemctl", "stop", site.daemon)
    assert machine.show(site.daemon, "Result") == "success"
    assert machine.show(site.daemon, "ActiveState") == "inactive"
    assert machine.show(site.server, "ActiveState") == "active"
    machine.do("systemctl", "start", site.daemon)
    assert machine.path(f"{site.run_dir}/gate").stat().st_ino == page
    assert machine.show(site.server, "InvocationID") == serving


def test_a_server_unit_whose_main_process_was_killed_is_started_once_more_by_the_daemon(site: Site) -> None:
    """As the user stepguard, through polkit: the unit's one more start is the daemon's own."""
    site.steady()
    machine, before, known = site.machine, site.starts_of_server(), site.policy()
    serving, killed = machine.show(site.server, "InvocationID"), site.main_pid(site.server)
    assert known["pid"] == killed
    machine.kill(killed, "KILL")
    machine.until(lambda: site.policy().get("restarts") == known["restarts"] + 1, "the daemon restarts it")
    site.steady()
    assert machine.show(site.server, "InvocationID") != serving
    assert site.policy()["pid"] == site.main_pid(site.server) != killed
    assert site.starts_of_server() == before + 1
    assert machine.show(site.server, "NRestarts") == "0"


def test_pause_holds_and_a_refused_rollback_fails_with_the_daemons_reason(site: Site) -> None:
    site.steady()
    machine = site.machine
    machine.do("systemctl", "start", f"stepguard-pause@{site.run}.service")
    assert site.status()["gate"]["order"] == "HOLD"
    rollback = f"stepguard-rollback@{site.run}.service"
    assert machine.run("systemctl", "start", rollback).returncode != 0
    assert machine.show(rollback, "ExecMainStatus") == "1"
    assert "no trainer reports to this run" in (machine.shared / "stepguard-rollback.log").read_text()


def test_the_secret_reaches_the_unit_and_nobody_else(site: Site) -> None:
    site.steady()
    machine, pid = site.machine, site.main_pid(site.daemon)
    environment = machine.path(f"/proc/{pid}/environ").read_text().split("\0")
    folder = next(line.partition("=")[2] for line in environment if line.startswith("CREDENTIALS_DIRECTORY="))

    def reads(user: str) -> str:
        """The file as the unit's own mounts show it, read by a user."""
        entered = ("nsenter", "-t", str(pid), "-m", "runuser", "-u", user, "--")
        return machine.run(*entered, "cat", f"{folder}/secrets_wandb").stdout

    assert reads("stepguard") == SECRET
    assert reads("nobody") == ""
    assert not any(SECRET in line for line in environment)
    assert SECRET not in machine.do("systemctl", "show", site.daemon)


def test_the_daemons_user_may_start_its_servers_and_nothing_else(site: Site) -> None:
    machine = site.machine

    def asks(*words: str) -> int:
        asked = ("runuser", "-u", "stepguard", "--", "systemctl", "--no-ask-password", *words)
        return machine.run(*asked).returncode

    assert asks("start", site.server) == 0
    assert asks("start", "other.service") != 0
    assert asks("stop", site.daemon) != 0
    assert asks("start", "stepguard-server@../other.service") != 0
    assert asks("set-property", "--runtime", site.server, "TasksMax=5") != 0
    assert asks("daemon-reload") != 0
    assert machine.show("other.service", "ActiveState") == "inactive"


def test_what_the_daemon_writes_is_its_own_alone(site: Site) -> None:
    """The journal and the sockets of a run are closed to other users."""
    site.steady()
    for path, mode in (
        (site.run_dir, "750"),
        (f"/var/lib/stepguard/{site.run}", "750"),
        (f"{site.run_dir}/control.sock", "660"),
    ):
        assert site.machine.do("stat", "-c", "%a %U", path).split() == [mode, "stepguard"], path
    assert site.machine.run("runuser", "-u", "nobody", "--", "ls", site.run_dir).returncode != 0


def test_the_daemon_can_read_its_servers_log(site: Site) -> None:
    """systemd opens it as root; the folder is the daemon's user's, and closed to others."""
    site.steady()
    log = f"/var/log/stepguard/server-{site.run}.log"
    assert "ready to roll" in site.machine.do("runuser", "-u", "stepguard", "--", "cat", log)
    assert site.machine.run("runuser", "-u", "nobody", "--", "cat", log).returncode != 0
