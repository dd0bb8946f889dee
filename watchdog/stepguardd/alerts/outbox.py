"""
The outbox: what is to be sent and was not yet, and what people were told so far. Tables of the journal.

Memory first, disk as its shadow: a message is on disk before it is sent, unless the disk refuses, which must
not cost the alert. A daemon that was killed between a sending and its record sends that one message again.
Only one thread uses the database, and the loop never waits for it but where a message is about to go out.
"""

import asyncio
import json
import logging
import sqlite3
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from pydantic import TypeAdapter

from ..core.alerts.book import Book, Notice
from ..core.alerts.words import Message
from ..core.commands import Notify
from ..journal import decode_command
from ..oneline import utf8

log = logging.getLogger("stepguardd")

QUEUED_MAX: Final = 1000
ROWS_KEPT: Final = 10_000
UNSEEN_MAX: Final = 1000
DISK_TIMEOUT_S: Final = 5.0

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS outbox (
  number INTEGER NOT NULL, channel TEXT NOT NULL, thread INTEGER NOT NULL, wall REAL NOT NULL,
  message TEXT NOT NULL, sent REAL, receipt TEXT, failure TEXT, PRIMARY KEY (number, channel)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS alert_book (one INTEGER PRIMARY KEY CHECK (one = 1), book TEXT NOT NULL);
"""
_BOOK: Final = TypeAdapter(Book)
_MESSAGE: Final = TypeAdapter(Message)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Posting:
    """One message for one channel."""

    channel: str
    message: Message


class Outbox:
    """
    One run's.

    Args:
        path: the journal's database; the journal itself made it.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.book = Book()
        self.failure: str | None = None
        self._queues: dict[str, deque[Posting]] = {}
        self._roots: dict[tuple[str, int], str] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outbox")
        self._db: sqlite3.Connection | None = None

    async def open(self) -> list[Notice]:
        """Load what an earlier daemon left; returns the notices that it recorded and did not take up."""
        found = await self._on_disk(self._load)
        if found is None:
            return []
        book, postings, roots, unseen = found
        self.book = book or Book()
        for posting in postings:
            self.queue(posting.channel).append(posting)
        self._roots = roots
        return unseen

    def queue(self, channel: str) -> deque[Posting]:
        """What waits for a channel, the oldest first. Bounded: beyond it the oldest is lost."""
        return self._queues.setdefault(channel, deque(maxlen=QUEUED_MAX))

    def root(self, channel: str, thread: int) -> str | None:
        """The receipt of a thread's first message there."""
        return self._roots.get((channel, thread)) if thread else None

    async def save(self, book: Book, postings: list[Posting]) -> None:
        """Keep the book, and queue the messages that it counts as told."""
        text = utf8(_BOOK.dump_json(book).decode())
        rows = [
            (one.message.number, one.channel, one.message.thread, one.message.wall, _text(one.message))
            for one in postings
        ]

        def write(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO alert_book VALUES (1, ?)", (text,))
            db.executemany(
                "INSERT OR REPLACE INTO outbox (number, channel, thread, wall, message) "
                "VALUES (?, ?, ?, ?, ?)",
                rows,
            )
            newest = max((row[0] for row in rows), default=0)
            db.execute(
                "DELETE FROM outbox WHERE number < ? AND (sent IS NOT NULL OR failure IS NOT NULL)",
                (newest - ROWS_KEPT,),
            )

        self.book = book
        await self._on_disk(lambda: self._transaction(write))
        for posting in postings:
            self.queue(posting.channel).append(posting)

    async def sent(self, posting: Posting, receipt: str | None, wall: float) -> None:
        """A message arrived."""
        self._take_off(posting)
        thread = posting.message.thread
        if receipt is not None and thread:
            self._roots.setdefault((posting.channel, thread), receipt)
        await self._ended(posting, "sent = ?, receipt = ?", (wall, receipt))

    async def dropped(self, posting: Posting, why: str) -> None:
        """A message will not be sent."""
        self._take_off(posting)
        await self._ended(posting, "failure = ?", (utf8(why),))

    async def close(self) -> None:
        """Let the disk finish, within its time."""
        await self._on_disk(self._close)
        self._thread.shutdown(wait=False)

    def _take_off(self, posting: Posting) -> None:
        queue = self.queue(posting.channel)
        if queue and queue[0] is posting:
            queue.popleft()

    async def _ended(self, posting: Posting, what: str, values: tuple[object, ...]) -> None:
        where = (posting.message.number, posting.channel)

        def write(db: sqlite3.Connection) -> None:
            db.execute(f"UPDATE outbox SET {what} WHERE number = ? AND channel = ?", (*values, *where))  # noqa: S608 - `what` is one of two literals above

        await self._on_disk(lambda: self._transaction(write))

    # ---- on its thread -------------------------------------------------------------------------------

    async def _on_disk(self, work: Callable[[], T]) -> T | None:
        """The work's result; None, with a line in the log, where the disk refuses or takes too long."""
        try:
            async with asyncio.timeout(DISK_TIMEOUT_S):
                result = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, ValueError, TimeoutError) as error:
            if self.failure is None:
                log.error("alerts go on without the disk: %s: %s", self.path, error or "no answer in time")
            self.failure = str(error) or "no answer in time"
            return None
        self.failure = None
        return result

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            db = sqlite3.connect(self.path, isolation_level=None, timeout=2.0)
            db.execute("PRAGMA synchronous=FULL")
            db.executescript(_SCHEMA)
            self._db = db
        return self._db

    def _transaction(self, write: Callable[[sqlite3.Connection], None]) -> None:
        db = self._opened()
        db.execute("BEGIN IMMEDIATE")
        try:
            write(db)
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()

    def _load(
        self,
    ) -> tuple[Book | None, list[Posting], dict[tuple[str, int], str], list[Notice]]:
        db = self._opened()
        row = db.execute("SELECT book FROM alert_book").fetchone()
        book = None if row is None else _BOOK.validate_json(row[0])
        waiting = db.execute(
            "SELECT channel, message FROM outbox WHERE sent IS NULL AND failure IS NULL ORDER BY number"
        )
        postings = [Posting(channel=name, message=_MESSAGE.validate_json(text)) for name, text in waiting]
        receipts = db.execute(
            "SELECT channel, thread, receipt FROM outbox WHERE receipt IS NOT NULL ORDER BY number"
        )
        roots: dict[tuple[str, int], str] = {}
        for channel, thread, receipt in receipts:
            roots.setdefault((channel, thread), receipt)
        return book, postings, roots, [] if book is None else _unseen(db, book)


def _unseen(db: sqlite3.Connection, book: Book) -> list[Notice]:
    """The notices after the newest that the book took: they were recorded, and then the daemon was killed."""
    if book.last_wall is None:
        after = 0
    else:
        row = db.execute("SELECT max(seq) FROM events WHERE wall = ?", (book.last_wall,)).fetchone()
        if row[0] is None:  # its row never came to the disk: wall time is the next best
            row = db.execute("SELECT max(seq) FROM events WHERE wall < ?", (book.last_wall,)).fetchone()
        after = row[0] or 0
    rows = db.execute(
        "SELECT at, wall, commands FROM events WHERE seq > ? "
        "AND seq IN (SELECT seq FROM notices WHERE seq > ?) ORDER BY seq LIMIT ?",
        (after, after, UNSEEN_MAX),
    )
    return [
        Notice(at=at, wall=wall, notify=command)
        for at, wall, commands in rows
        for kind, body in json.loads(commands)
        if kind == Notify.__name__ and isinstance(command := decode_command(kind, json.dumps(body)), Notify)
    ]


def _text(message: Message) -> str:
    return utf8(_MESSAGE.dump_json(message).decode())
