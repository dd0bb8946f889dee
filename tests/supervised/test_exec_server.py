"""`stepguard exec` whose daemon dies beside a server that it owns: there is one server before and after."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon_parts.small_run import SmallRun, small_run
from stepguard_grpo.model import write_base_model
from stepguardd import proc

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


class Supervised:
    """`stepguard exec` on a run with a server, and a command that runs until it is told to stop."""

    def __init__(self, run: SmallRun) -> None:
        self.run, self._stop = run, run.root / "stop"
        script = f"until [ -e {self._stop} ]; do sleep 0.05; done"
        words = [sys.executable, "-m", "stepguardd", "exec", "--config", str(run.config), "--wait", "--json"]
        words += ["--daemon-log", str(run.log), "--", "sh", "-c", script]
        self.child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def daemon(self) -> int:
        """The daemon's process, of which there is never more than one."""
        found = [
            known.pid
            for known in proc.tree(self.child.pid)
            if Path(f"/proc/{known.pid}/cmdline").read_bytes().split(b"\0")[1:4]
            == [b"-m", b"stepguardd", b"run"]
        ]
        assert len(found) == 1, found
        return found[0]

    def back_after(self, killed: int) -> None:
        """Another daemon has taken the run up, and its server serves."""

        def back() -> bool:
            with contextlib.suppress(AssertionError, FileNotFoundError):
                return self.daemon() != killed and self.run.serving()
            return False

        self.run.until(back, "another daemon takes up the run")

    def server(self) -> tuple[proc.Proc, ...]:
        """The server's processes; all of them live under `exec`, whoever started them."""
        found = self.run.started()
        assert {known.pid for known in found} <= {known.pid for known in proc.tree(self.child.pid)}
        return found

    def ended(self) -> dict[str, int]:
        """The command is told to end; what `exec` says of it."""
        self._stop.touch()
        out, err = self.child.communicate(timeout=60)
        assert self.child.returncode == 0, err
        found: dict[str, int] = json.loads(out)
        return found


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    write_base_model(tmp_path / "base", seed=0)
    with small_run(tmp_path / "run", tmp_path / "base", push=False) as run:
        one = Supervised(run)
        try:
            run.until(run.serving, "the first start")
            yield one
        finally:
            if one.child.poll() is None:
                one.child.terminate()
            one.child.communicate(timeout=60)


def roles(procs: tuple[proc.Proc, ...]) -> list[str]:
    return sorted(known.role for known in procs)


def test_a_killed_daemon_comes_back_to_the_server_that_it_had(supervised: Supervised) -> None:
    """SIGKILL: the same processes serve on, and none was started beside them."""
    before, killed = supervised.server(), supervised.daemon()
    os.kill(killed, signal.SIGKILL)
    supervised.back_after(killed)
    assert supervised.server() == before
    assert len(supervised.run.starts()) == 1
    assert supervised.run.status()["servers"][0]["pid"] in {known.pid for known in before}
    assert supervised.ended() == {"exit_code": 0, "daemon_restarts": 1}
    assert supervised.run.started() == ()


def test_a_server_that_died_while_no_daemon_was_there_is_replaced_by_one(supervised: Supervised) -> None:
    """Both are killed, and `exec` reaps the server: the next daemon starts exactly one more."""
    before, killed = supervised.server(), supervised.daemon()
    os.kill(killed, signal.SIGKILL)
    for known in before:
        with contextlib.suppress(ProcessLookupError):  # a scheduler ends with its parent
            os.kill(known.pid, signal.SIGKILL)
    supervised.back_after(killed)
    after = supervised.server()
    assert not {known.pid for known in after} & {known.pid for known in before}
    assert roles(after) == roles(before)
    assert len(supervised.run.starts()) == 2
    assert supervised.ended() == {"exit_code": 0, "daemon_restarts": 1}
    assert supervised.run.started() == ()
