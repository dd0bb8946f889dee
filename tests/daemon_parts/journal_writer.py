"""
Journals written by processes that end badly; run as a program, it prints what it found as one line of JSON.

`kills N FOLDER`: N writers, each SIGKILLed at a moment of chance; what was acknowledged must be there.
`full FOLDER`: a writer whose files may not grow any more for a while.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import select
import signal
import sqlite3
import sys
import time
from pathlib import Path

from stepguardd.core.commands import Command
from stepguardd.core.decide import decide
from stepguardd.core.events import Event, OperatorAsked
from stepguardd.core.state import Mode, Server, Settings, State, initial
from stepguardd.journal import _STATE, Journal, JournalError, encode

BOOT = "a boot"


def first() -> State:
    return initial(Settings(), Mode.ACT, (Server(name="s", managed=True),))


def story(number: int) -> Event:
    """Every other event asks for a restart, and so for an effect."""
    if number % 2:
        return OperatorAsked(verb="restart-server", who="ada", why=f"number {number}", server="s")
    return OperatorAsked(verb="dance", who="ada", why="x" * (number % 7 * 100))


def text(state: State) -> str:
    return encode(state, {"State": _STATE})


async def write(path: Path, acknowledge: int) -> None:
    """Write for ever; the number of each row that is known to be on disk goes down the pipe."""
    journal = Journal(path, boot_id=BOOT)
    restored = journal.restore()
    state = restored.state or first()
    for recorded in restored.after:
        state, _ = decide(state, recorded.event, recorded.at)
    seq = journal.newest
    journal.start()
    for number in range(10**9):
        event, now = story(number), time.monotonic()
        state, commands = decide(state, event, now)
        durable = journal.record(at=now, wall=now, event=event, commands=commands, state=state)
        seq += 1
        if durable is not None:
            await durable
            os.write(acknowledge, f"{seq}\n".encode())


def kills(count: int, folder: Path) -> dict[str, object]:
    """Kill, look, go on with the same journal."""
    path, chance = folder / "journal.db", random.Random(7)
    problems: list[str] = []
    acknowledged = rows = 0
    for turn in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            asyncio.run(write(path, writer))
            os._exit(0)
        os.close(writer)
        select.select([reader], [], [], 10)  # killed before its first row, it would prove nothing
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = b""
        while chunk := os.read(reader, 65536):
            said += chunk
        os.close(reader)
        newest = [int(line) for line in said.decode().split("\n")[:-1]]
        acknowledged += len(newest)
        rows, problem = looked(path, max(newest, default=0))
        problems += [f"kill {turn}: {problem}"] if problem else []
    return {"kills": count, "acknowledged": acknowledged, "rows": rows, "problems": problems}


def looked(path: Path, acknowledged: int) -> tuple[int, str]:
    """How many rows there are, and what is wrong with them."""
    with sqlite3.connect(path) as db:
        sound = db.execute("PRAGMA integrity_check").fetchone()[0]
        seqs = [seq for (seq,) in db.execute("SELECT seq FROM events ORDER BY seq")]
    db.close()
    if sound != "ok":
        return len(seqs), f"integrity: {sound}"
    if seqs != list(range(1, len(seqs) + 1)):
        return len(seqs), "the sequence has a gap"
    if len(seqs) < acknowledged:
        return len(seqs), f"{acknowledged} acknowledged, {len(seqs)} there"
    return len(seqs), ""


async def _full(folder: Path) -> dict[str, object]:
    path = folder / "journal.db"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    journal = Journal(path, boot_id=BOOT)
    journal.restore()
    journal.start()
    state, outcomes, commands = first(), [], ()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def tell(number: int) -> bool:
        nonlocal state, commands
        event, now = story(number), time.monotonic()
        state, commands = decide(state, event, now)
        durable = journal.record(at=now, wall=now, event=event, commands=commands, state=state)
        if durable is None:
            return True
        try:
            await asyncio.wait_for(durable, 10)
        except JournalError as error:
            outcomes.append(str(error))
            return False
        return True

    for number in range(20):
        assert await tell(number)
    size = max(file.stat().st_size for file in folder.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    refused = 0
    for number in range(20, 60):
        refused += not await tell(number)
    failure, lost = journal.failure, journal.lost_rows
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    for number in range(60, 70):
        assert await tell(number), outcomes[-1]
    healed = journal.failure
    await asyncio.to_thread(journal.close)
    again = Journal(path, boot_id=BOOT)
    restored = again.restore()
    found = restored.state
    for recorded in restored.after:
        assert found is not None
        found, _ = decide(found, recorded.event, recorded.at)
    again.close()
    rows, problem = looked(path, 0)
    return {
        "refused": refused,
        "failure": failure,
        "lost": lost,
        "healed": healed is None,
        "same": found is not None and text(found) == text(state),
        "rows": rows,
        "problem": problem,
        "line": outcomes[-1] if outcomes else "",
    }


def replayed(path: Path, state: State) -> tuple[State, list[tuple[Command, ...]]]:
    """All that a journal decides, from a state at its beginning."""
    journal, said = Journal(path, boot_id=BOOT), []
    for recorded in journal.read():
        state, commands = decide(state, recorded.event, recorded.at)
        said.append(commands)
    journal.close()
    return state, said


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[-1])
    found = kills(int(sys.argv[2]), folder) if what == "kills" else asyncio.run(_full(folder))
    print(json.dumps(found))
