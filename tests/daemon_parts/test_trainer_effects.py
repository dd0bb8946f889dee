"""The trainer's back-ends keep one contract: started once an intent, found again, ended whole."""

import asyncio
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stepguardd import proc
from stepguardd.config import LaunchSettings
from stepguardd.effects.trainer import ProcessTrainer, Resume, TrainerBackend, trainer_backend

pytestmark = pytest.mark.e2e

SLEEP = "import time; time.sleep(60)"
BODY = """
here={here}
alive() {{ [ -s "$here/pid" ] && kill -0 "$(cat "$here/pid")" 2>/dev/null; }}
begin() {{
  alive && return
  setsid sleep 60 >/dev/null 2>&1 &
  echo $! > "$here/pid"; echo "$*" >> "$here/starts"
}}
finish() {{ alive && kill -KILL "$(cat "$here/pid")"; while alive; do sleep 0.01; done; : > "$here/pid"; }}
"""
SYSTEMCTL = """
case " $* " in
*" start "*) begin "$@" ;;
*" stop "*) finish ;;
*MainPID*) alive && cat "$here/pid" || echo 0 ;;
*ActiveState*) alive && echo ActiveState=active && exit 0
  printf '%s\\n' ActiveState=inactive Result=success ExecMainStatus=15 ;;
esac; exit 0
"""
DOCKER = """
case "$1" in
start) begin "$@" ;;
stop) finish ;;
inspect) case "$*" in
  *Pid*) alive && cat "$here/pid" || echo 0 ;;
  *) alive && echo true 0 || echo false 0 ;;
  esac ;;
esac; exit 0
"""
RAY = """
case "$2" in
submit) begin "$@" ;;
stop) finish ;;
list) [ -s "$here/starts" ] && grep -o 'stepguard-[a-z0-9-]*' "$here/starts" ;;
status) [ -s "$here/starts" ] && grep -q -- "$3" "$here/starts" || exit 1
  alive && echo "Status for job: RUNNING" || echo "Status for job: STOPPED" ;;
esac; exit 0
"""


@dataclass(frozen=True, slots=True)
class Site:
    """One back-end, twice over: as this daemon and as the next one have it."""

    name: str
    root: Path
    made: list[TrainerBackend] = field(default_factory=list)

    def backend(self) -> TrainerBackend:
        settings = {
            "process": {"command": (sys.executable, "-c", SLEEP)},
            "systemd": {"unit": "trainer.service"},
            "docker": {"container": "trainer"},
            "ray": {"command": ("train",)},
        }[self.name]
        made = trainer_backend(
            f"run@{self.root}",
            LaunchSettings(backend=self.name, stop_timeout_s=2, **settings),  # type: ignore[arg-type]
            run_dir=self.root,
            log=self.root / "trainer.log",
            systemctl=("systemctl",),
        )
        assert made is not None
        self.made.append(made)
        return made

    def pids(self) -> list[int]:
        """What really runs."""
        if self.name == "process":
            return [one.pid for one in proc.marked("STEPGUARD_TRAINER", f"run@{self.root}")]
        file = self.root / "pid"
        text = file.read_text().strip() if file.exists() else ""
        return [int(text)] if text and proc.stat(int(text)) is not None else []


@pytest.fixture(params=["process", "systemd", "docker", "ray"])
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name, body in (("systemctl", SYSTEMCTL), ("docker", DOCKER), ("ray", RAY)):
        script = tmp_path / name
        script.write_text("#!/bin/bash\n" + BODY.format(here=tmp_path) + body)
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    made = Site(request.param, tmp_path)
    yield made
    for backend in made.made:
        assert asyncio.run(backend.stop(backend.find())).ok
    assert made.pids() == []


def test_an_intent_starts_one_trainer_however_often_it_is_carried_out(site: Site) -> None:
    first, next_one = site.backend(), site.backend()
    assert asyncio.run(first.start("1-start-trainer", Resume())).ok
    (pid,) = site.pids()
    again = asyncio.run(next_one.start("1-start-trainer", Resume()))
    assert again.ok, again.detail
    assert site.pids() == [pid]


def test_the_next_daemon_finds_what_the_last_one_started(site: Site) -> None:
    asyncio.run(site.backend().start("1-start-trainer", Resume()))
    other = site.backend()
    found = other.find()
    assert [one.pid for one in found] == (site.pids() if site.name != "ray" else [])
    assert asyncio.run(other.standing()).running is True


def test_a_stop_ends_it_and_a_second_stop_is_content(site: Site) -> None:
    backend = site.backend()
    asyncio.run(backend.start("1-start-trainer", Resume()))
    procs = backend.find()
    assert asyncio.run(backend.stop(procs)).ok
    assert site.pids() == []
    assert asyncio.run(backend.stop(procs)).ok
    standing = asyncio.run(backend.standing())
    assert standing.running is False


def test_it_is_told_what_to_resume_from(tmp_path: Path) -> None:
    note = "import os, sys; print(sys.argv[1:], os.environ['STEPGUARD_RESUME_STEP'], flush=True); "
    settings = LaunchSettings(
        backend="process", command=(sys.executable, "-c", note + SLEEP), resume_args=("--from", "{path}")
    )
    backend = ProcessTrainer(f"run@{tmp_path}", settings, tmp_path, tmp_path / "log")
    asyncio.run(backend.start("1-start-trainer", Resume(step=20, path="/c/20")))
    deadline = time.monotonic() + 20
    while "/c/20" not in (said := (tmp_path / "log").read_text()):
        assert time.monotonic() < deadline, said
        time.sleep(0.02)
    assert "['--from', '/c/20'] 20" in said
    asyncio.run(backend.stop(backend.find()))


def test_a_second_trainer_beside_a_living_one_is_refused(tmp_path: Path) -> None:
    settings = LaunchSettings(backend="process", command=(sys.executable, "-c", SLEEP))
    backend = ProcessTrainer(f"run@{tmp_path}", settings, tmp_path, tmp_path / "log")
    asyncio.run(backend.start("1-start-trainer", Resume()))
    outcome = asyncio.run(backend.start("2-start-trainer", Resume()))
    assert not outcome.ok
    assert "another trainer of this run lives" in outcome.detail
    asyncio.run(backend.stop(backend.find()))


def test_ranks_are_the_topmost_processes_with_their_number(tmp_path: Path) -> None:
    """What a rank starts inherits the variable, and is no rank."""
    ranks = "for r in 0 1; do RANK=$r bash -c 'sleep 60 & wait' & done; wait"
    settings = LaunchSettings(backend="process", command=("bash", "-c", ranks))
    backend = ProcessTrainer(f"run@{tmp_path}", settings, tmp_path, tmp_path / "log")
    asyncio.run(backend.start("1-start-trainer", Resume()))
    procs = backend.find()
    assert len(procs) == 5
    assert sorted(proc.ranks(procs).values()) == [0, 1]
    asyncio.run(backend.stop(procs))
