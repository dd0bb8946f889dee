"""The unit files themselves: sound, in a tight sandbox, and installed as this machine needs them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from requirements import require
from stepguardd.service import UNITS, Installation, ServiceError, for_system, for_user

EXPOSURE_MAX = 2.0
SANDBOXED = ("stepguardd@.service", "stepguard-pause@.service", "stepguard-rollback@.service")
PROGRAM = str(Path(sys.executable).with_name("stepguard"))


@pytest.fixture
def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        require("systemd", "systemd-analyze is not installed (see .ci/packages)")
    return found


def written(plan: Installation, folder: Path) -> list[Path]:
    """The units of a plan, as instances in a folder."""
    paths = []
    for file in plan.files:
        if file.path.name in UNITS:
            paths.append(folder / file.path.name.replace("@.", "@run."))
            paths[-1].write_text(file.text)
    assert len(paths) == len(UNITS)
    return paths


@pytest.mark.parametrize("manager", ["--system", "--user"])
def test_systemd_finds_nothing_to_say_about_the_units(analyze: str, manager: str, tmp_path: Path) -> None:
    plan = (
        for_user(PROGRAM, config_home=tmp_path)
        if manager == "--user"
        else for_system(PROGRAM, user="root", group="root", writes=[Path("/srv")])
    )
    for path in written(plan, tmp_path):
        done = subprocess.run(
            [analyze, manager, "verify", str(path)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
        )
        assert (done.returncode, done.stderr) == (0, ""), path.name


@pytest.mark.parametrize("name", SANDBOXED)
def test_a_taken_over_daemon_would_not_reach_far(analyze: str, name: str, tmp_path: Path) -> None:
    """`systemd-analyze security` puts each of our own processes at 2.0 or less of 10."""
    plan = for_system(PROGRAM, user="stepguard", group="stepguard", writes=[])
    unit = next(path for path in written(plan, tmp_path) if path.name == name.replace("@.", "@run."))
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=tmp_path,
    )
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= EXPOSURE_MAX


def test_another_user_is_named_everywhere_or_nowhere() -> None:
    plan = for_system("/opt/sg/bin/stepguard", user="alice", group="ml", writes=[Path("/srv/ckpt")])
    texts = {file.path.name: file.text for file in plan.files}
    for name in UNITS:
        assert "User=alice\nGroup=ml\n" in texts[name]
    assert "ExecStart=/opt/sg/bin/stepguard run " in texts["stepguardd@.service"]
    assert "ReadWritePaths=/srv/ckpt\n" in texts["10-writes.conf"]
    assert 'subject.user !== "alice"' in texts["50-stepguard.rules"]
    assert re.findall(r"(?m)^d (\S+) +\d+ alice +ml$", texts["stepguard.conf"]) == [
        "/run/stepguard",
        "/var/lib/stepguard",
        "/var/log/stepguard",
    ]
    assert not any("sysusers" in str(file.path) for file in plan.files), "no user is made where one was named"


def test_a_path_that_a_unit_cannot_name_is_refused() -> None:
    for program in ("/opt/my env/bin/stepguard", "/opt/%i/stepguard", "/opt/$HOME/stepguard"):
        with pytest.raises(ServiceError, match="cannot name a path"):
            for_system(program, user="stepguard", group="stepguard", writes=[])


def test_a_users_units_ask_for_no_privilege(tmp_path: Path) -> None:
    plan = for_user(PROGRAM, config_home=tmp_path)
    for file in plan.files:
        assert file.path.is_relative_to(tmp_path / "systemd" / "user")
        for key in (
            "User=",
            "Group=",
            "ProtectSystem=",
            "LoadCredential=",
            "OOMScoreAdjust=",
            "DevicePolicy=",
        ):
            assert f"\n{key}" not in file.text, file.path.name
    assert plan.commands == (("systemctl", "--user", "daemon-reload"),)


def install(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepguardd", "install-service", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_dry_run_shows_every_file_and_writes_none() -> None:
    done = install("--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["installed"] is False
    assert "/etc/systemd/system/stepguardd@.service" in shown["files"]
    assert not Path("/etc/systemd/system/stepguardd@.service").exists()
    assert ["systemctl", "daemon-reload"] in shown["commands"]
    assert max(map(len, install("--dry-run").stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run-as", "no-such-user"], "there is no user 'no-such-user'"),
        (["--user", "--run-as", "root"], "--user takes neither"),
        (["--user", "--writes", "/srv"], "--user takes neither"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], words: str) -> None:
    done = install("--dry-run", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
