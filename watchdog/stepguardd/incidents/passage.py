"""
The journal's passage about one incident, read beside a running daemon.

Promises to change nothing, and to be decided again to the same states: a passage begins at a state that the
journal keeps, and carries the state with which each daemon came up within it. Bounded in rows.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from ..core.commands import Command
from ..core.decide import decide
from ..core.events import DaemonStarted, Event
from ..core.state import State
from ..journal import JournalError, Recorded, decode_command, decode_event, decode_state

ROWS_MAX: Final = 50_000
CURVE_ROWS_MAX: Final = 4_000
_CURVE_KINDS: Final = ("BatchReported", "StepCommitted", "RewardLogged", "CheckpointSaved")


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """An effect: when it was begun and how it ended. Times are of the monotonic clock; None: under way."""

    intent: str
    kind: str
    server: str | None
    begun: float
    ended: float | None
    ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """
    What the journal has of one incident.

    Args:
        number: the incident's.
        opened: the row in which it was opened.
        start: the state before `rows[0]`.
        rows: from the newest state that is kept from before the opening, to the end of the incident.
        come_up: the state after each row in which a daemon came up, by the row's number.
        acts: the effects that were begun from the opening on.
        curve: rows that hold rewards and checkpoints, from further back.
        cut: whether there were more rows than may be read.

    """

    number: int
    opened: Recorded
    start: State
    rows: tuple[Recorded, ...]
    come_up: Mapping[int, State]
    acts: tuple[Act, ...]
    curve: tuple[Recorded, ...]
    cut: bool

    def walk(self) -> Iterator[tuple[Recorded, State, State]]:
        """Each row with the state before and after it, decided again."""
        state = self.start
        for row in self.rows:
            before = state
            state, _ = again(state, row, self.come_up.get(row.seq))
            yield row, before, state


def again(state: State, row: Recorded, came_up: State | None) -> tuple[State, tuple[Command, ...]]:
    """
    Decide a recorded event again.

    Where a daemon came up, its config may have changed, and with it what decisions rest on: that is taken
    from the state that it wrote.
    """
    if isinstance(row.event, DaemonStarted) and came_up is not None:
        known = {server.name: server for server in state.servers}
        servers = tuple(
            replace(known[server.name], managed=server.managed) if server.name in known else server
            for server in came_up.servers
        )
        state = replace(state, settings=came_up.settings, servers=servers)
    return decide(state, row.event, row.at)


def incidents(journal: Path) -> list[int]:
    """The numbers of the incidents that a journal tells of, in order."""
    with _opened(journal) as db:
        found = db.execute("SELECT DISTINCT incident FROM notices WHERE incident IS NOT NULL ORDER BY 1")
        return [number for (number,) in found]


def has_notice(journal: Path, number: int, what: str) -> bool:
    """Whether the journal has this notice of an incident already. Raises JournalError."""
    with _opened(journal) as db:
        found = db.execute("SELECT 1 FROM notices WHERE incident = ? AND what = ? LIMIT 1", (number, what))
        return found.fetchone() is not None


def read_passage(journal: Path, number: int) -> Passage | None:
    """
    The passage about an incident; None where the journal does not tell of it, or no longer all of it.

    Raises:
        JournalError: it cannot be read, or was written by another version.

    """
    with _opened(journal) as db:
        first, last, resolved = db.execute(
            "SELECT min(seq), max(seq), max(CASE what WHEN 'resolved' THEN seq END) FROM notices "
            "WHERE incident = ?",
            (number,),
        ).fetchone()
        if first is None:
            return None
        start = db.execute(
            "SELECT seq, state FROM snapshots WHERE seq < ? ORDER BY seq DESC LIMIT 1", (first,)
        ).fetchone()
        if start is None:
            return None
        end = resolved if resolved == last else None
        found = db.execute(
            "SELECT seq, at, wall, kind, body, commands FROM events WHERE seq > ? AND seq <= ? ORDER BY seq "
            "LIMIT ?",
            (start[0], (1 << 62) if end is None else end, ROWS_MAX + 1),
        )
        rows = [_recorded(*row) for row in found]
        opened = next((row for row in rows if row.seq == first), None)
        if opened is None:
            return None
        cut, rows = len(rows) > ROWS_MAX, rows[:ROWS_MAX]
        came_up = {
            row.seq: state
            for row in rows
            if isinstance(row.event, DaemonStarted) and (state := _state_at(db, row.seq)) is not None
        }
        return Passage(
            number=number,
            opened=opened,
            start=decode_state(start[1]),
            rows=tuple(rows),
            come_up=came_up,
            acts=tuple(_acts(db, first, rows[-1].seq)),
            curve=tuple(_curve(db, rows[-1].seq)),
            cut=cut,
        )


@contextlib.contextmanager
def _opened(journal: Path) -> Iterator[sqlite3.Connection]:
    """The database, for reading; also where nobody has it open and this user may not write beside it."""
    if not journal.is_file():
        raise JournalError(f"{journal}: there is no journal; is run.state_dir right?")
    address = f"file:{quote(str(journal.absolute()))}"
    try:
        db = sqlite3.connect(f"{address}?mode=ro", uri=True, timeout=5.0)
        try:
            db.execute("SELECT count(*) FROM meta").fetchone()
        except sqlite3.OperationalError:
            db.close()
            db = sqlite3.connect(f"{address}?mode=ro&immutable=1", uri=True, timeout=5.0)
        with contextlib.closing(db):
            yield db
    except sqlite3.Error as error:
        raise JournalError(f"{journal}: cannot be read ({error})") from error


def _recorded(seq: int, at: float, wall: float, kind: str, body: str, commands: str) -> Recorded:
    event: Event = decode_event(kind, body)
    decided = tuple(decode_command(name, json.dumps(fields)) for name, fields in json.loads(commands))
    return Recorded(seq=seq, at=at, wall=wall, event=event, commands=decided)


def _state_at(db: sqlite3.Connection, seq: int) -> State | None:
    row = db.execute("SELECT state FROM snapshots WHERE seq = ?", (seq,)).fetchone()
    return None if row is None else decode_state(row[0])


def _acts(db: sqlite3.Connection, first: int, last: int) -> Iterator[Act]:
    found = db.execute(
        "SELECT intent, kind, body, begun, ended, ok, detail FROM intents WHERE seq BETWEEN ? AND ? "
        "ORDER BY begun, CAST(intent AS INTEGER)",
        (first, last),
    )
    for intent, kind, body, begun, ended, ok, detail in found:
        fields: Any = json.loads(body)
        yield Act(
            intent=intent,
            kind=kind,
            server=fields.get("server"),
            begun=begun,
            ended=ended,
            ok=None if ok is None else bool(ok),
            detail=detail or "",
        )


def _curve(db: sqlite3.Connection, last: int) -> list[Recorded]:
    marks = ", ".join("?" * len(_CURVE_KINDS))
    found = db.execute(
        f"SELECT seq, at, wall, kind, body, '[]' FROM events WHERE seq <= ? AND kind IN ({marks}) "  # noqa: S608
        "ORDER BY seq DESC LIMIT ?",
        (last, *_CURVE_KINDS, CURVE_ROWS_MAX),
    )
    return [_recorded(*row) for row in found][::-1]
