"""The guard says why the process ends, and nothing of it when the process is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROLOGUE = "import os, sys, signal\nfrom stepguard import Guard\nguard = Guard(sys.argv[1])\n"


def last_words(run_dir: Path, code: str) -> list[dict[str, object]]:
    """The goodbyes of a process that runs this."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
        wire.bind(str(run_dir / "reports.sock"))
        wire.setblocking(False)
        subprocess.run([sys.executable, "-c", PROLOGUE + code, str(run_dir)], timeout=60, check=False)
        found = []
        while True:
            try:
                found.append(json.loads(wire.recv(1 << 16)))
            except BlockingIOError:
                return [one for one in found if one["kind"] == "bye"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("", "finished"),
        ("guard.close()", "finished"),
        ("guard.close(); guard.close()", "finished"),
        ("with guard: pass", "finished"),
        ("raise ValueError('no')", "failed"),
        ("raise KeyboardInterrupt", "stopped"),
        ("guard.close(ValueError('no'))", "failed"),
        ("if os.fork() == 0: sys.exit(0)\nos.wait()", "finished"),
    ],
)
def test_every_orderly_end_is_told_once_and_with_its_reason(tmp_path: Path, code: str, why: str) -> None:
    assert [one["why"] for one in last_words(tmp_path, code)] == [why]


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSEGV])
def test_a_death_says_nothing(tmp_path: Path, what: signal.Signals) -> None:
    assert os.name == "posix"
    assert last_words(tmp_path, f"os.kill(os.getpid(), {int(what)})") == []
