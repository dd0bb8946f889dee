"""
The journal: what happened, what was decided, what was begun and how it ended.

Promise: an intent is on disk before its effect begins; a row that was acknowledged survives the daemon's
SIGKILL at any instruction and, with `synchronous=FULL`, a power loss; the state that comes back is the one
that the recorded events decide.
What it does not do: wait in the decision loop. One thread owns the database; the loop hands rows over, and
a disk that stalls costs rows of the past (counted), never a decision.
"""

import asyncio
import contextlib
import functools
import hashlib
import json
import math
import queue
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from . import clock
from .chronicle.chronicle import EPISODES_KEPT, NOTICES_KEPT, Chronicle, Entry, Episode, Notice
from .chronicle.curve import POINTS_MAX, Curve, Point
from .core import commands, events
from .core.commands import Command, Effect, Notify
from .core.events import EffectEnded, Event, ServerProbed, TreeSampled
from .core.ledger import LedgerRow
from .core.reward import RewardState
from .core.state import State
from .oneline import utf8

VERSION: Final = 1
QUEUE_ROWS_MAX: Final = 10_000
EVENTS_KEPT: Final = 200_000
SNAPSHOT_EVERY: Final = 500
LINGER_S: Final = 0.05
"""How long the first row of a batch waits for company: what a SIGKILL of the daemon may cost."""
LOOK_LINGER_S: Final = 1.0
"""The same for a look at a server from which nothing followed: a daemon that comes back looks again."""

_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
  seq INTEGER PRIMARY KEY, at REAL NOT NULL, wall REAL NOT NULL, kind TEXT NOT NULL,
  body TEXT NOT NULL, commands TEXT NOT NULL);
CREATE TABLE snapshots (seq INTEGER PRIMARY KEY, state TEXT NOT NULL);
CREATE TABLE intents (
  intent TEXT PRIMARY KEY, seq INTEGER NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, begun REAL NOT NULL,
  ended REAL, ok INTEGER, detail TEXT) WITHOUT ROWID;
CREATE TABLE notices (
  id INTEGER PRIMARY KEY, seq INTEGER NOT NULL, wall REAL NOT NULL, incident INTEGER, what TEXT NOT NULL,
  reason TEXT NOT NULL, text TEXT NOT NULL);
INSERT INTO meta VALUES ('version', '1');
"""

# What people look at; made where it is absent, since a decision never depends on it.
_CHRONICLE: Final = """
CREATE TABLE IF NOT EXISTS points (
  id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, step INTEGER NOT NULL, wall REAL NOT NULL, reward REAL);
CREATE TABLE IF NOT EXISTS episodes (number INTEGER PRIMARY KEY, body TEXT NOT NULL);
"""

# What must outlive a reboot, unlike a state, whose times mean nothing after one.
_LEDGER_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS ledger (
  attempt INTEGER NOT NULL, step INTEGER NOT NULL, row TEXT NOT NULL,
  PRIMARY KEY (attempt, step)) WITHOUT ROWID;
"""

_EVENTS: Final[dict[str, TypeAdapter[Any]]] = {
    kind.__name__: TypeAdapter(kind) for kind in events.Event.__args__
}
_COMMANDS: Final[dict[str, TypeAdapter[Any]]] = {
    kind.__name__: TypeAdapter(kind)
    for kind in (commands.PublishGate, commands.MarkPrompts, commands.Notify, *commands.Effect.__args__)
}
_STATE: Final[TypeAdapter[State]] = TypeAdapter(State)
_EPISODE: Final[TypeAdapter[Episode]] = TypeAdapter(Episode)
_LEDGER_ROW: Final[TypeAdapter[LedgerRow]] = TypeAdapter(LedgerRow)


class JournalError(Exception):
    """The journal cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One decision as the journal has it."""

    seq: int
    at: float
    wall: float
    event: Event
    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """
    What a daemon comes back to: a state, the events after it, and the effects that were under way.

    `intents` and `incidents` are how many were named so far: without a state the next one must not repeat a
    name.
    `checkpoints` is the ledger, which outlives a reboot.
    `older` is the state where another version wrote it, for `read_older`, without the fields in `without`;
    `state` is None then. `unreadable` counts the rows behind it that this version cannot read, and
    `unreadable_intents` names the effects under way of which it does not know what they were.
    """

    state: State | None
    after: tuple[Recorded, ...]
    unfinished: tuple[Effect, ...]
    intents: int
    incidents: int = 0
    checkpoints: tuple[LedgerRow, ...] = ()
    older: str | None = None
    without: tuple[str, ...] = ()
    unreadable: int = 0
    unreadable_intents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    at: float
    wall: float
    event: Event
    commands: tuple[Command, ...]
    state: State | None
    entry: Entry | None = None
    durable: "asyncio.Future[None] | None"
    checkpoints: tuple[LedgerRow, ...] | None = None


def encode(value: object, adapters: dict[str, TypeAdapter[Any]]) -> str:
    """One value as JSON. NaN stays NaN: it is a reading, and null would make it unknown."""
    return _json(adapters[type(value).__name__].dump_python(value, mode="json"))


def _json(value: object) -> str:
    return utf8(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def decode_event(kind: str, body: str) -> Event:
    """The event of a row; raises `JournalError` for a kind that this version does not have."""
    return _decode(_EVENTS, kind, body)  # type: ignore[no-any-return]


def decode_command(kind: str, body: str) -> Command:
    """The command of a row; raises `JournalError` for a kind that this version does not have."""
    return _decode(_COMMANDS, kind, body)  # type: ignore[no-any-return]


def encode_command(command: Command) -> str:
    """A command as the journal keeps it, byte for byte the same for equal commands."""
    return encode(command, _COMMANDS)


def encode_event(event: Event) -> str:
    """An event as the journal keeps it."""
    return encode(event, _EVENTS)


def encode_commands(commands: tuple[Command, ...]) -> str:
    """All commands of one decision as the row of the journal has them: equal decisions, equal bytes."""
    return _json(
        [[type(c).__name__, _COMMANDS[type(c).__name__].dump_python(c, mode="json")] for c in commands]
    )


def encode_state(state: State) -> str:
    """A whole state as the journal keeps it."""
    return _json(_STATE.dump_python(state, mode="json"))


def decode_state(text: str) -> State:
    """The state that was written; raises `JournalError` where this version cannot read it."""
    try:
        return _STATE.validate_json(text)
    except ValueError as error:
        raise JournalError(f"a state of the journal cannot be read: {error}") from error


def _decode(adapters: dict[str, TypeAdapter[Any]], kind: str, body: str) -> Any:
    try:
        return adapters[kind].validate_json(body)
    except (KeyError, ValueError) as error:
        raise JournalError(f"the journal has a row of kind {kind} that cannot be read: {error}") from error


def _recorded(row: tuple[int, float, float, str, str, str]) -> Recorded:
    seq, at, wall, kind, body, commands_json = row
    decided = tuple(decode_command(name, json.dumps(fields)) for name, fields in json.loads(commands_json))
    return Recorded(seq=seq, at=at, wall=wall, event=decode_event(kind, body), commands=decided)


@functools.cache
def judge_shape() -> str:
    """What the judge's memory looks like, as a short word that changes whenever a field of it does."""
    schema = TypeAdapter(RewardState).json_schema()
    return hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """
    One run's journal, opened for writing by one daemon.

    Args:
        path: the database; its folder must exist.
        boot_id: this boot's id. Times of another boot mean nothing here, so its state does not come back.

    Raises:
        JournalError: it cannot be opened, is no journal, or was written by a newer version.

    """

    def __init__(self, path: Path, *, boot_id: str) -> None:
        self.path = path
        self.lost_rows = 0
        self._boot_id = boot_id
        self._judge = judge_shape()
        self._rows: queue.Queue[_Row | None] = queue.Queue(maxsize=QUEUE_ROWS_MAX)
        self._since_snapshot = SNAPSHOT_EVERY  # the first row carries the state: what came before is settled
        self._gap = False
        self._failed: str | None = None
        self._pruned = 0
        self._last_point = 0
        self._checkpoints: tuple[LedgerRow, ...] | None = None
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        except sqlite3.Error as error:
            raise JournalError(f"{path}: cannot be opened ({error}); is its folder ours?") from error
        try:
            self._prepare()
        except JournalError:
            self._db.close()
            raise
        except (sqlite3.Error, ValueError) as error:
            self._db.close()
            raise JournalError(
                f"{path}: not usable as a journal ({error}); move it aside to start a new one"
            ) from error
        self._seq: int = self._db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        self._thread = threading.Thread(target=self._write_all, name="journal", daemon=True)

    def _prepare(self) -> None:
        db = self._db
        mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise JournalError(f"{self.path}: its file system offers no WAL; put state_dir on a local disk")
        db.execute("PRAGMA synchronous=FULL")
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            db.executescript("BEGIN;" + _SCHEMA + "COMMIT;")
        db.executescript(_LEDGER_SCHEMA)
        row = db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        version = int(row[0]) if row is not None else 0
        if version < 1:
            raise JournalError(f"{self.path}: a database without a version; move it aside to start a new one")
        if version > VERSION:
            raise JournalError(
                f"{self.path}: written by a newer version (layout {version}, this one reads up to "
                f"{VERSION}); install that version, or move the file aside"
            )
        db.executescript(f"BEGIN;{_CHRONICLE}COMMIT;")

    def restore(self) -> Restored:
        """What was known and what was under way when the last daemon of this run ended."""
        try:
            return self._restore()
        except sqlite3.Error as error:
            raise JournalError(f"{self.path}: cannot be read ({error}); move the file aside") from error

    def _restore(self) -> Restored:
        self._settle_boot()
        names = self._db.execute("SELECT coalesce(max(CAST(intent AS INTEGER)), 0) FROM intents").fetchone()
        told = self._db.execute("SELECT coalesce(max(incident), 0) FROM notices").fetchone()
        newest = self._db.execute("SELECT seq, state FROM snapshots ORDER BY seq DESC LIMIT 1").fetchone()
        if newest is None:
            return Restored(
                state=None,
                after=(),
                unfinished=(),
                intents=names[0],
                incidents=told[0],
                checkpoints=self._ledger(),
            )
        state, without = None, () if self._same_judge() else ("reward",)
        if not without:
            with contextlib.suppress(JournalError):
                state = decode_state(newest[1])
        under_way = self._db.execute(
            "SELECT intent, kind, body FROM intents WHERE ended IS NULL ORDER BY seq"
        ).fetchall()
        unfinished: list[Effect] = []
        unreadable_intents = []
        for intent, kind, body in under_way:
            try:
                effect = decode_command(kind, body)
            except JournalError:
                unreadable_intents.append(intent)
                continue
            if not isinstance(effect, commands_without_intent):
                unfinished.append(effect)
        after, unreadable = self._after(newest[0])
        return Restored(
            state=state,
            after=after,
            unfinished=tuple(unfinished),
            intents=names[0],
            incidents=told[0],
            checkpoints=self._ledger() if state is None else (),
            older=newest[1] if state is None else None,
            without=without,
            unreadable=unreadable,
            unreadable_intents=tuple(unreadable_intents),
        )

    def _same_judge(self) -> bool:
        """
        Whether the states were written by a judge whose memory has the shape of today's.

        Its memory is written by position, so another shape may read well and mean something else.
        """
        row = self._db.execute("SELECT value FROM meta WHERE key = 'judge'").fetchone()
        return row is None or row[0] == self._judge

    def _after(self, seq: int) -> tuple[tuple[Recorded, ...], int]:
        """The decisions after a row, and how many of them cannot be read."""
        rows = self._db.execute(
            "SELECT seq, at, wall, kind, body, commands FROM events WHERE seq > ? ORDER BY seq", (seq,)
        )
        found, unreadable = [], 0
        for row in rows:
            try:
                found.append(_recorded(row))
            except JournalError:
                unreadable += 1
        return tuple(found), unreadable

    def _settle_boot(self) -> None:
        """After a reboot nothing is under way, and the times of the states mean nothing any more."""
        row = self._db.execute("SELECT value FROM meta WHERE key = 'boot_id'").fetchone()
        if row is not None and row[0] == self._boot_id:
            return
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("DELETE FROM snapshots")
        self._db.execute("UPDATE intents SET ended = begun, ok = 0, detail = 'rebooted' WHERE ended IS NULL")
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('boot_id', ?)", (self._boot_id,))
        self._db.execute("COMMIT")

    def _ledger(self) -> tuple[LedgerRow, ...]:
        rows = self._db.execute("SELECT row FROM ledger ORDER BY attempt, step").fetchall()
        found = []
        for (text,) in rows:
            with contextlib.suppress(ValueError):  # of another version: a checkpoint that is not known
                found.append(_LEDGER_ROW.validate_json(text))
        return tuple(found)

    def read(self, *, after: int = 0) -> Iterator[Recorded]:
        """The decisions after a row, in order. Only before `start`: then the writer owns the database."""
        rows = self._db.execute(
            "SELECT seq, at, wall, kind, body, commands FROM events WHERE seq > ? ORDER BY seq", (after,)
        )
        yield from map(_recorded, rows)

    def restore_chronicle(self, chronicle: Chronicle) -> None:
        """Bring back the incidents and what was told. Only before `start`; an unreadable row is left out."""
        episodes = self._db.execute(
            "SELECT body FROM episodes ORDER BY number DESC LIMIT ?", (EPISODES_KEPT,)
        )
        found = []
        for (body,) in reversed(episodes.fetchall()):
            with contextlib.suppress(ValueError):
                found.append(_EPISODE.validate_json(body))
        notices = self._db.execute(
            "SELECT id, wall, incident, what, reason, text FROM notices ORDER BY id DESC LIMIT ?",
            (NOTICES_KEPT,),
        )
        keys = ("id", "wall", "incident", "what", "reason", "text")
        told = [Notice(**dict(zip(keys, row, strict=True))) for row in reversed(notices.fetchall())]
        self._last_point = self._db.execute("SELECT coalesce(max(id), 0) FROM points").fetchone()[0]
        chronicle.restore(found, told)

    def read_curve(self) -> Curve:
        """
        The points of earlier daemons; none where they cannot be read.

        Beside the writer, on a connection of its own: a long curve is for a thread of the caller's.
        """
        curve = Curve()
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=2.0)) as db,
        ):
            rows = db.execute(
                "SELECT attempt, step, wall, reward FROM points WHERE id <= ? ORDER BY id",
                (self._last_point,),
            )
            for attempt, step, wall, reward in rows:
                curve.append(Point(attempt=attempt, step=step, wall=wall, reward=reward))
        return curve

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def record(
        self,
        *,
        at: float,
        wall: float,
        event: Event,
        commands: tuple[Command, ...],
        state: State,
        entry: Entry | None = None,
    ) -> "asyncio.Future[None] | None":
        """
        Hand one decision to the writer.

        Returns:
            None, or for a decision with effects in it a future that is done once the row is on disk: no
            effect may begin before. It fails with `JournalError` when the disk refuses.

        """
        effects = any(not isinstance(command, commands_without_intent) for command in commands)
        self._since_snapshot += 1
        snapshot = effects or self._since_snapshot >= SNAPSHOT_EVERY
        if snapshot:
            self._since_snapshot = 0
        ledger = None if state.checkpoints is self._checkpoints else state.checkpoints
        self._checkpoints = state.checkpoints
        durable = asyncio.get_running_loop().create_future() if effects else None
        row = _Row(
            at=at,
            wall=wall,
            event=event,
            commands=commands,
            state=state if snapshot else None,
            entry=entry,
            checkpoints=ledger,
            durable=durable,
        )
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self.lost_rows += 1
            self._checkpoints = None
            self._since_snapshot = SNAPSHOT_EVERY  # the next row that fits carries the whole state
            if durable is not None:
                durable.set_exception(JournalError(f"{self.path}: the disk does not keep up"))
        return durable

    @property
    def newest(self) -> int:
        """The number of the newest row on disk."""
        return self._seq

    @property
    def failure(self) -> str | None:
        """Why the newest write failed; None while the disk takes what it is given."""
        return self._failed

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is left and close. Idempotent."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._rows.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)
        if not self._thread.is_alive():  # else the disk hangs, and closing would hang with it
            self._db.close()

    def _write_all(self) -> None:
        batch: list[_Row] = []
        while True:
            row = self._rows.get()
            closing = row is None
            until = math.inf
            while row is not None:
                batch.append(row)
                until = min(until, clock.monotonic() + _linger_s(row))
                # Whoever waits for the disk must not wait for company, and a stream without a gap for none.
                left_s = 0.0 if row.durable else until - clock.monotonic()
                try:
                    if len(batch) >= QUEUE_ROWS_MAX:
                        break
                    row = self._rows.get(timeout=left_s) if left_s > 0 else self._rows.get_nowait()
                    closing = row is None
                except queue.Empty:
                    break
            self._write(batch)
            batch.clear()
            if closing:
                return

    def _write(self, batch: list[_Row]) -> None:
        """
        One batch in one transaction: all of it or nothing.

        After rows were lost the next one must carry the whole state, or what comes back would not be what the
        rows decide; until it comes, rows are lost as well.
        """
        outcome: JournalError | None = None
        first = next((index for index, row in enumerate(batch) if row.state is not None), len(batch))
        kept = batch[first:] if self._gap else batch
        try:
            self._db.execute("BEGIN")
            for number, row in enumerate(kept, self._seq + 1):
                self._insert(row, number)
            self._prune(self._seq + len(kept))
            self._db.execute("COMMIT")
        except (sqlite3.Error, ValueError, TypeError) as error:
            self._failed = str(error)
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            self.lost_rows += len(batch)
            self._gap = True
            self._checkpoints = None
            self._since_snapshot = SNAPSHOT_EVERY
            outcome = JournalError(
                f"{self.path}: cannot be written ({error}); make room or fix its permissions"
            )
        else:
            self._seq += len(kept)
            self.lost_rows += len(batch) - len(kept)
            self._gap = self._gap and not kept
            self._failed = None
        for row in batch:
            if row.durable is not None:
                _resolve(row.durable, outcome)

    def _insert(self, row: _Row, seq: int) -> None:
        event, db = row.event, self._db
        db.execute(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)",
            (
                seq,
                row.at,
                row.wall,
                type(event).__name__,
                encode(event, _EVENTS),
                encode_commands(row.commands),
            ),
        )
        if row.state is not None:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('judge', ?)", (self._judge,))
            db.execute("INSERT INTO snapshots VALUES (?, ?)", (seq, encode_state(row.state)))
            db.execute("DELETE FROM snapshots WHERE seq <= ?", (seq - 20 * SNAPSHOT_EVERY,))
        if row.entry is not None:
            self._insert_entry(row.entry)
        if row.checkpoints is not None:
            db.execute("DELETE FROM ledger")
            db.executemany(
                "INSERT INTO ledger VALUES (?, ?, ?)",
                [
                    (one.attempt, one.step, _json(_LEDGER_ROW.dump_python(one, mode="json")))
                    for one in row.checkpoints
                ],
            )
        if isinstance(event, EffectEnded):
            db.execute(
                "UPDATE intents SET ended = ?, ok = ?, detail = ? WHERE intent = ?",
                (row.at, int(event.ok), utf8(event.detail), utf8(event.intent)),
            )
        for command in row.commands:
            if isinstance(command, Notify):
                db.execute(
                    "INSERT INTO notices (seq, wall, incident, what, reason, text) VALUES (?, ?, ?, ?, ?, ?)",
                    (seq, row.wall, command.incident, command.what, command.reason, utf8(command.text)),
                )
            elif not isinstance(command, commands_without_intent):
                db.execute(
                    "INSERT OR IGNORE INTO intents (intent, seq, kind, body, begun) VALUES (?, ?, ?, ?, ?)",
                    (command.intent, seq, type(command).__name__, encode_command(command), row.at),
                )

    def _insert_entry(self, entry: Entry) -> None:
        point, episode = entry.point, entry.episode
        if point is not None:
            self._db.execute(
                "INSERT INTO points (attempt, step, wall, reward) VALUES (?, ?, ?, ?)",
                (point.attempt, point.step, point.wall, point.reward),
            )
        if episode is not None:
            body = _json(_EPISODE.dump_python(episode, mode="json"))
            self._db.execute("INSERT OR REPLACE INTO episodes VALUES (?, ?)", (episode.number, body))

    def _prune(self, seq: int) -> None:
        """Forget what is too old, now and then; an intent that is under way is never too old."""
        if seq - self._pruned < SNAPSHOT_EVERY:
            return
        self._pruned = seq
        last = (seq - EVENTS_KEPT,)
        self._db.execute("DELETE FROM events WHERE seq <= ?", last)
        self._db.execute("DELETE FROM notices WHERE seq <= ?", last)
        self._db.execute("DELETE FROM points WHERE id <= (SELECT max(id) FROM points) - ?", (POINTS_MAX,))
        self._db.execute("DELETE FROM intents WHERE seq <= ? AND ended IS NOT NULL", last)


def _linger_s(row: _Row) -> float:
    look = isinstance(row.event, ServerProbed | TreeSampled) and not row.commands
    return LOOK_LINGER_S if look else LINGER_S


commands_without_intent = (commands.PublishGate, commands.MarkPrompts, commands.Notify)


def _resolve(durable: "asyncio.Future[None]", outcome: JournalError | None) -> None:
    """Settle a future of the loop from the writer's thread; a loop that is gone waits for nothing."""

    def settle() -> None:
        if durable.done():
            return
        if outcome is None:
            durable.set_result(None)
        else:
            durable.set_exception(outcome)

    with contextlib.suppress(RuntimeError):
        durable.get_loop().call_soon_threadsafe(settle)


def last_notices(path: Path, count: int) -> list[tuple[float, int | None, str, str, str]]:
    """The newest notices of a journal that a daemon may have open: (wall, incident, what, reason, text)."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2.0)) as db:
        rows = db.execute(
            "SELECT wall, incident, what, reason, text FROM notices ORDER BY id DESC LIMIT ?", (count,)
        )
        return list(reversed(rows.fetchall()))
