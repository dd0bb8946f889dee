"""The small service manager with daemons that are scripts: silent ones, ones that never come up."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

# It changes its whole process (signals, orphans), so each run has one of its own.
DRIVER = """
import sys
from stepguardd.supervision import Supervised, SupervisionError, supervise
plan = Supervised(command=("sh", "-c", sys.argv[2]), daemon=(sys.executable, "-c", sys.argv[1]),
                  ready_timeout_s=5.0, watchdog_s=1.0, end_timeout_s=1.0)
try:
    ended = supervise(plan, lambda said: print(said, flush=True))
    print("ended", ended.code, ended.daemon_restarts)
except SupervisionError as error:
    print("refused", error.code, error)
"""
NOTIFY = """
import os, pathlib, socket, sys, time
def tell(word):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(word, os.environ["NOTIFY_SOCKET"].replace("@", chr(0), 1))
lives = pathlib.Path("lives")
lives.write_text(lives.read_text() + "x" if lives.exists() else "x")
"""


def drive(folder: Path, daemon: str, script: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, NOTIFY + daemon, script],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=folder,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_silent_daemon_is_ended_and_started_again(tmp_path: Path) -> None:
    """Its first life says that it is ready, and then nothing any more."""
    silent = 'tell(b"READY=1")\nwhile True:\n    time.sleep(0.2)\n'
    silent += '    if lives.read_text() != "x": tell(b"WATCHDOG=1")\n'
    said = drive(tmp_path, silent, 'until [ "$(cat lives)" = xx ]; do sleep 0.05; done')
    assert said[0].startswith("the daemon has not been heard of for")
    assert said[1].startswith("the daemon was killed by SIGKILL; it is started again")
    assert said[-1] == "ended 0 1"


def test_a_daemon_that_exits_at_once_again_and_again_never_ends_the_command(tmp_path: Path) -> None:
    crashes = 'tell(b"READY=1")\ntime.sleep(0.3)\nsys.exit(1)\n'
    said = drive(tmp_path, crashes, 'until [ "$(cat lives)" = xxx ]; do sleep 0.05; done; exit 5')
    waits = [line.partition("started again in ")[2].partition(",")[0] for line in said if "again in" in line]
    assert waits[:2] == ["0.5 s", "1 s"]
    assert said[-1].startswith("ended 5 ")


def test_a_daemon_that_never_gets_ready_is_no_reason_to_begin(tmp_path: Path) -> None:
    said = drive(tmp_path, "time.sleep(60)", "touch begun")
    assert said[-1].startswith("refused 1 the daemon was not ready within 5 s")
    assert not (tmp_path / "begun").exists()


def test_only_the_daemon_is_heard(tmp_path: Path) -> None:
    """Another process that knows the address cannot keep a dead loop looking alive."""
    other = 'tell(b"READY=1")\nif os.fork() == 0:\n'
    other += '    while True:\n        tell(b"WATCHDOG=1")\n        time.sleep(0.2)\n'
    other += "time.sleep(60)\n"
    said = drive(tmp_path, other, 'until [ "$(cat lives)" = xx ]; do sleep 0.05; done')
    assert said[0].startswith("the daemon has not been heard of for")
