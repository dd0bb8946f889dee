"""`stepguard exec` with the real daemon: the command's business is its own, whatever the daemon does."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stepguardd import proc

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

LIMIT_S = 60.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run without servers."""
    path = tmp_path / "run.toml"
    path.write_text(f'[run]\nname = "exec-{os.getpid()}"\nrun_dir = "r"\nstate_dir = "s"\n')
    return path


def command(config: Path, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", "stepguardd", "exec", "--config", str(config), *options, "--", *words]


def run(config: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, *words, options=options), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


@contextmanager
def running(
    config: Path, *words: str, options: tuple[str, ...] = (), **how: Any
) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(command(config, *words, options=options), **how)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
        child.wait(LIMIT_S)


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.05)


def daemons(child: int) -> list[int]:
    """The daemons below a process."""
    found = []
    for known in proc.tree(child):
        try:
            words = Path(f"/proc/{known.pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:4] == [b"-m", b"stepguardd", b"run"]:
            found.append(known.pid)
    return found


def test_the_exit_code_and_the_output_are_the_commands_own(config: Path) -> None:
    """The gate page is there before the command begins, and the command is told where."""
    done = run(config, "sh", "-c", 'test -e "$STEPGUARD_RUN_DIR/gate" && echo held by nobody; exit 7')
    assert (done.returncode, done.stdout) == (7, "held by nobody\n")


def test_a_command_that_dies_of_a_signal_is_said_as_shells_say_it(config: Path) -> None:
    done = run(config, "sh", "-c", "echo words; kill -TERM $$", options=("--json",))
    assert done.returncode == 128 + signal.SIGTERM
    assert json.loads(done.stdout) == {"exit_code": 143, "daemon_restarts": 0}
    assert "words" in done.stderr


def test_signals_go_on_to_the_command(config: Path, tmp_path: Path) -> None:
    """What a batch system sends (USR1, then TERM) is for the trainer to act on, in its own time."""
    heard = tmp_path / "heard"
    script = f"trap 'echo usr1 >>{heard}' USR1; trap 'echo term >>{heard}; exit 3' TERM; echo up >>{heard}\n"
    script += "while :; do sleep 0.05; done"
    with running(config, "sh", "-c", script) as child:
        until(heard.exists)
        child.send_signal(signal.SIGUSR1)
        until(lambda: "usr1" in heard.read_text())
        child.send_signal(signal.SIGTERM)
        assert child.wait(LIMIT_S) == 3
    assert heard.read_text().split() == ["up", "usr1", "term"]


def test_a_terminals_interrupt_reaches_the_command_once(config: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole foreground group: handed on as well it would count as two."""
    heard = tmp_path / "heard"
    script = f"trap 'echo int >>{heard}' INT; echo up >>{heard}\nwhile :; do sleep 0.05; done"
    terminal, theirs = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with running(
        config, "sh", "-c", script, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=take_terminal,
    ) as child:  # fmt: skip
        os.close(theirs)
        until(heard.exists)
        os.write(terminal, b"\x03")
        until(lambda: "int" in heard.read_text())
        child.send_signal(signal.SIGUSR2)  # ends the script: whatever the first signal was to do is done
        child.wait(LIMIT_S)
    os.close(terminal)
    assert heard.read_text().split() == ["up", "int"]


def test_a_killed_daemon_is_started_again_and_the_command_notices_nothing(
    config: Path, tmp_path: Path
) -> None:
    begun, stop = tmp_path / "begun", tmp_path / "stop"
    script = f"touch {begun}; while [ ! -e {stop} ]; do sleep 0.05; done; echo done"
    with running(
        config, "sh", "-c", script, options=("--json",), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        until(begun.exists)
        before = daemons(child.pid)
        assert len(before) == 1
        os.kill(before[0], signal.SIGKILL)
        until(lambda: bool(daemons(child.pid)) and daemons(child.pid) != before)
        until((tmp_path / "r/control.sock").exists)
        stop.touch()
        out, err = child.communicate(timeout=LIMIT_S)
    assert json.loads(out) == {"exit_code": 0, "daemon_restarts": 1}
    assert b"was killed by SIGKILL" in err
    assert b"done" in err


def test_what_was_started_beside_the_command_ends_with_it(config: Path, tmp_path: Path) -> None:
    """An orphan in a session of its own, as a server is whose daemon died, is adopted and ended."""
    left = tmp_path / "left"
    done = run(
        config,
        "sh",
        "-c",
        f"setsid sh -c 'echo $$ >{left}; exec sleep 600' & until [ -s {left} ]; do sleep 0.05; done",
    )
    assert done.returncode == 0
    assert proc.stat(int(left.read_text())) is None
    assert "ending what was started under this command (1 process" in done.stderr


@pytest.mark.parametrize(
    ("options", "words", "said"),
    [
        (("--set", "run.no_such=1"), ("true",), "no_such"),
        ((), ("no-such-command",), "no-such-command: not found"),
        (("--set", "run.run_dir=/proc/none"), ("touch",), "the daemon did not start"),
    ],
)
def test_what_cannot_work_is_said_before_the_command_begins(
    config: Path, options: tuple[str, ...], words: tuple[str, ...], said: str
) -> None:
    done = run(config, *words, options=options)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_wait_that_fails_is_the_end_of_it(config: Path, tmp_path: Path) -> None:
    """Nothing listens: the command never begins."""
    with config.open("a") as file:
        file.write('[server]\nname = "policy"\nurl = "http://127.0.0.1:9"\nbackend = "none"\n')
    begun = tmp_path / "begun"
    done = run(config, "touch", str(begun), options=("--wait", "--timeout-s", "3"))
    assert done.returncode == 1
    assert "policy: nothing listens" in done.stderr
    assert not begun.exists()
