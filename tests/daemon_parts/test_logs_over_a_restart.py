"""What a log said while no daemon was there is read by the next one: no line is lost, none is seen twice."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon_parts.own_daemons import SIGKILLED, OwnDaemons
from stepguardd import proc
from stepguardd.core.signs import Sign
from stepguardd.sources.signatures import SIGNATURES

pytestmark = pytest.mark.e2e


class LoggedRun(OwnDaemons):
    """A server and a trainer of somebody else's, of which only the logs are there."""

    def __init__(self, root: Path) -> None:
        self.server_log, self.trainer_log = root / "server.log", root / "trainer.log"
        super().__init__(
            root,
            {
                "run": {"mode": "shadow"},
                "server": {"backend": "none", "url": "http://127.0.0.1:9", "log": str(self.server_log)},
                "trainer": {"log": str(self.trainer_log)},
                "web": {"enabled": False},
            },
        )

    def started(self) -> tuple[proc.Proc, ...]:
        return ()

    def rows(self, kind: str) -> list[dict[str, object]]:
        """The events of one kind that are in the journal."""
        with contextlib.closing(sqlite3.connect(f"file:{self.state_dir}/journal.db?mode=ro", uri=True)) as db:
            rows = db.execute("SELECT body FROM events WHERE kind = ? ORDER BY seq", (kind,)).fetchall()
        return [json.loads(body) for (body,) in rows]

    def seen(self) -> Counter[tuple[str | None, str]]:
        """How often each sign was seen, by the server whose log it was; None is the trainer's."""
        total: Counter[tuple[str | None, str]] = Counter()
        for row in self.rows("LogSeen"):
            server, sign, count = row["server"], row["sign"], row["count"]
            assert server is None or isinstance(server, str)
            assert isinstance(sign, str)
            assert isinstance(count, int)
            total[server, sign] += count
        return total


@pytest.fixture
def run(tmp_path: Path) -> Iterator[LoggedRun]:
    logged = LoggedRun(tmp_path)
    try:
        yield logged
    finally:
        logged.close()


def says(log: Path, *signs: Sign, half: str = "") -> None:
    lines = [next(row.example for row in SIGNATURES if row.sign is sign) for sign in signs]
    with log.open("a") as end:
        end.write("".join(f"noise\n{line}\n" for line in lines) + half)


def test_lines_written_while_no_daemon_was_there_are_seen_once(run: LoggedRun) -> None:
    """It is killed; meanwhile one log grows and is rotated, the other says its first word."""
    says(run.server_log, Sign.SCHEDULER_CRASHED)  # before anybody watched
    says(run.trainer_log, Sign.RAY_NODE_DIED)
    run.daemon()
    run.until(lambda: run.status() and len(run.rows("LogRead")) == 2, "both logs are followed")
    says(run.server_log, Sign.NCCL_TIMEOUT)
    run.until(lambda: run.seen()["server", "nccl_timeout"], "a line is seen at once")
    run.daemons[-1].send_signal(signal.SIGKILL)
    assert run.daemons[-1].wait(timeout=20) == SIGKILLED

    says(run.server_log, Sign.DISK_FULL, Sign.CANCELLED, Sign.CANCELLED)
    run.server_log.rename(run.server_log.with_suffix(".log.1"))
    says(run.server_log, Sign.RAY_ACTOR_DIED, half="asyncio.exceptions.Canc")
    says(run.trainer_log, Sign.CUDA_ERROR)
    run.daemon()
    run.until(lambda: run.seen()["server", "ray_actor_died"], "the rotated log is read to its end first")
    with run.server_log.open("a") as end:
        end.write("elledError\n")
    run.until(lambda: run.seen()["server", "cancelled"] == 3, "half a line is waited for")
    run.until(lambda: run.seen()[None, "cuda_error"], "the trainer's log is read on as well")

    run.replace_daemon()
    says(run.server_log, Sign.XID)
    says(run.trainer_log, Sign.XID)
    run.until(lambda: run.seen()["server", "xid"] and run.seen()[None, "xid"], "a third goes on")
    assert run.seen() == {
        ("server", "nccl_timeout"): 1,
        ("server", "disk_full"): 1,
        ("server", "cancelled"): 3,
        ("server", "ray_actor_died"): 1,
        ("server", "xid"): 1,
        (None, "cuda_error"): 1,
        (None, "xid"): 1,
    }
