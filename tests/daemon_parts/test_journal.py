"""What was acknowledged survives; what comes back is what was decided; what cannot be read says so."""

import asyncio
import json
import math
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from daemon_parts.conftest import until
from daemon_parts.journal_writer import BOOT, first, replayed, story, text
from stepguardd.core.commands import Command, Notify, PublishGate, RunCanary
from stepguardd.core.decide import decide
from stepguardd.core.events import (
    BatchReported,
    CheckpointSaved,
    EffectEnded,
    Event,
    OperatorAsked,
    StepCommitted,
    Tick,
)
from stepguardd.core.ledger import LedgerRow
from stepguardd.core.state import Mode, Server, Settings, State, initial
from stepguardd.journal import (
    _EVENTS,
    EVENTS_KEPT,
    QUEUE_ROWS_MAX,
    SNAPSHOT_EVERY,
    Journal,
    JournalError,
    _Row,
    decode_event,
    encode,
    encode_command,
    last_notices,
)
from stepguardd.testing import World

WRITER = Path(__file__).with_name("journal_writer.py")
Told = tuple[float, Event, tuple[Command, ...], State]


def written(path: Path, rows: list[Told], *, boot: str = BOOT) -> None:
    """A daemon's life: open, restore, write these rows, close."""

    async def write() -> None:
        journal = Journal(path, boot_id=boot)
        journal.restore()
        journal.start()
        for at, event, commands, state in rows:
            durable = journal.record(at=at, wall=at, event=event, commands=commands, state=state)
            if durable is not None:
                await durable
        await asyncio.to_thread(journal.close)

    asyncio.run(write())


def restored(path: Path, boot: str = BOOT) -> tuple[State | None, tuple[str, ...], int]:
    """What another daemon comes back to: its state, unfinished intents, and how many intents there were."""
    with closing(Journal(path, boot_id=boot)) as journal:
        found = journal.restore()
    state = found.state
    for recorded in found.after:
        assert state is not None
        state, _ = decide(state, recorded.event, recorded.at)
    return state, tuple(effect.intent for effect in found.unfinished), found.intents


class Recording(World):
    """A world that keeps each decision that a daemon would keep."""

    def __init__(self, settings: Settings | None = None, mode: str = "act") -> None:
        self.rows: list[Told] = []
        super().__init__(settings=settings, mode=mode)

    def feed(self, event: Event) -> tuple[Command, ...]:
        before = self.state
        commands = super().feed(event)
        if self.state is not before or commands or isinstance(event, EffectEnded):
            self.rows.append((self.now, event, commands, self.state))
        return commands


@pytest.fixture(scope="module")
def night() -> Recording:
    """Deaths, stale weights, zeros, NaN, people: a night with something of everything."""
    world = Recording()
    world.steps(12)
    world.kill()
    world.run(30)
    world.feed(
        StepCommitted(attempt=0, step=13, reward=math.nan, metrics={"loss": math.inf, "kl": -math.inf})
    )
    world.feed(CheckpointSaved(attempt=0, step=13, path="/c/13"))
    world.fake.version = "base"
    world.run(20)
    world.batch(math.nan)
    world.run(10)
    world.ask("resume")
    world.ask("rollback", before_step=5)
    world.run(20)
    world.ask("restart-server", server="s")
    return world


def test_a_night_comes_back_as_it_was(night: Recording, tmp_path: Path) -> None:
    written(tmp_path / "journal.db", night.rows)
    state, unfinished, _ = restored(tmp_path / "journal.db")
    assert state is not None
    assert text(state) == text(night.state)
    repair = night.server().repair
    assert repair is not None
    assert unfinished == (repair.intent,)


@pytest.mark.parametrize("cut", [1, 2, 40, 77, 100, 140])
def test_every_beginning_of_a_night_comes_back_as_it_was(night: Recording, tmp_path: Path, cut: int) -> None:
    rows = night.rows[:cut]
    written(tmp_path / "journal.db", rows)
    state, _, _ = restored(tmp_path / "journal.db")
    assert state is not None
    assert text(state) == text(rows[-1][3])


def test_a_replay_gives_the_same_bytes(night: Recording, tmp_path: Path) -> None:
    """I9: the commands and reasons of a recorded night, decided again."""
    path = tmp_path / "journal.db"
    written(path, night.rows)
    state, said = replayed(path, first_of(night))
    assert [[encode_command(c) for c in commands] for commands in said] == [
        [encode_command(c) for c in row[2]] for row in night.rows
    ]
    assert text(state) == text(night.state)


def first_of(night: Recording) -> State:
    """The state before a night's first row."""
    server = Server(name="s", managed=True, since=night.rows[0][0])
    return initial(Settings(push_weights=True), Mode.ACT, (server,))


def test_commands_are_read_as_they_were_written(night: Recording, tmp_path: Path) -> None:
    written(tmp_path / "journal.db", night.rows)
    with closing(Journal(tmp_path / "journal.db", boot_id=BOOT)) as journal:
        read = [(recorded.event, recorded.commands) for recorded in journal.read()]
    assert len(read) == len(night.rows)
    for (_, commands), row in zip(read, night.rows, strict=True):
        assert commands == row[2]
    kinds = {type(event).__name__ for event, _ in read}
    assert len(kinds) >= 11


def test_the_sequence_goes_on_where_the_last_daemon_ended(night: Recording, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    for part in (night.rows[:30], night.rows[30:31], night.rows[31:90]):
        written(path, part)
    with closing(sqlite3.connect(path)) as db:
        seqs = [seq for (seq,) in db.execute("SELECT seq FROM events ORDER BY seq")]
    assert seqs == list(range(1, 91))


def test_an_intent_is_on_disk_before_its_effect_may_begin(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    state, commands = decide(first(), story(1), 1.0)

    async def look() -> list[tuple[str, float | None]]:
        journal = Journal(path, boot_id=BOOT)
        journal.restore()
        journal.start()
        durable = journal.record(at=1.0, wall=1.0, event=story(1), commands=commands, state=state)
        assert durable is not None
        await durable
        with closing(sqlite3.connect(path)) as db:
            found = db.execute("SELECT intent, ended FROM intents").fetchall()
        await asyncio.to_thread(journal.close)
        return found

    assert asyncio.run(look()) == [("1-stop", None)]


def test_an_intent_ends_with_its_outcome_even_where_nobody_waited_for_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    one, first_commands = decide(first(), story(1), 1.0)
    late = EffectEnded(intent="1-stop", ok=False, detail="overtaken by events")
    written(path, [(1.0, story(1), first_commands, one), (2.0, late, (), one)])
    assert restored(path)[1] == ()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT ok, detail FROM intents").fetchall() == [(0, "overtaken by events")]


def test_a_reboot_forgets_the_state_settles_the_intents_and_repeats_no_name(tmp_path: Path) -> None:
    """Times of another boot mean nothing; a name used twice would take one start for another."""
    path = tmp_path / "journal.db"
    state, commands = decide(first(), story(1), 1.0)
    written(path, [(1.0, story(1), commands, state)])
    assert restored(path, "another boot") == (None, (), 1)
    assert restored(path, "another boot") == (None, (), 1)  # and not at the next start either
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT ok, detail FROM intents").fetchall() == [(0, "rebooted")]
        assert db.execute("SELECT count(*) FROM events").fetchone() == (1,)


def test_text_that_no_file_takes_does_not_make_a_journal_unreadable(tmp_path: Path) -> None:
    """JSON from a hostile server or trainer may hold lone surrogates."""
    path = tmp_path / "journal.db"
    event = OperatorAsked(verb="dance\ud800", who="a\udc80", why="\0", mode="\udfff")
    state, commands = decide(first(), event, 1.0)
    assert any(isinstance(command, Notify) for command in commands)
    written(path, [(1.0, event, commands, state)])
    with closing(Journal(path, boot_id=BOOT)) as journal:
        assert [recorded.seq for recorded in journal.read()] == [1]
    assert restored(path)[0] is not None
    assert last_notices(path, 1)[0][4].endswith("by a?: \0")


def test_the_newest_notices_are_read_beside_a_running_daemon(night: Recording, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    written(path, night.rows)
    told = night.all(Notify)
    assert [row[4] for row in last_notices(path, 3)] == [notice.text for notice in told[-3:]]


# ---- what cannot be read ---------------------------------------------------------------------------


def spoiled(path: Path, how: Callable[[sqlite3.Connection], object]) -> str:
    """What a daemon says to a journal that was spoiled."""
    written(path, [(1.0, story(0), (), first())])
    with closing(sqlite3.connect(path)) as db, db:
        how(db)

    def opened() -> None:
        with closing(Journal(path, boot_id=BOOT)) as journal:
            journal.restore()
            list(journal.read())

    with pytest.raises(JournalError) as caught:
        opened()
    return str(caught.value)


def test_a_journal_of_a_newer_version_is_refused_with_its_version(tmp_path: Path) -> None:
    said = spoiled(
        tmp_path / "j.db", lambda db: db.execute("UPDATE meta SET value = '7' WHERE key='version'")
    )
    assert "newer version (layout 7, this one reads up to 1)" in said
    assert str(tmp_path / "j.db") in said


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE meta SET value = 'x' WHERE key='version'", "move it aside"),
        ("DELETE FROM meta", "without a version"),
        ("DROP TABLE meta", "move it aside"),
        ("DROP TABLE snapshots", "move the file aside"),
        ("UPDATE events SET kind = 'Dance'", "kind Dance"),
        ("UPDATE events SET body = 'x'", "cannot be read"),
    ],
)
def test_a_journal_that_is_none_is_refused_with_a_remedy(tmp_path: Path, statement: str, words: str) -> None:
    assert words in spoiled(tmp_path / "j.db", lambda db: db.execute(statement))


@pytest.mark.parametrize("content", [b"not a database" * 400, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(content)
    with pytest.raises(JournalError, match="move it aside"):
        Journal(path, boot_id=BOOT)
    assert path.read_bytes() == content


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"nowhere/journal\.db: cannot be opened"):
        Journal(tmp_path / "nowhere" / "journal.db", boot_id=BOOT)


# ---- a process that ends badly, a disk that does not take it ----------------------------------------


def ran(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, str(WRITER), *arguments],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_sigkill_at_any_moment_loses_no_acknowledged_row_and_leaves_no_gap(tmp_path: Path) -> None:
    found = ran("kills", "60", str(tmp_path))
    assert found["problems"] == []
    assert int(str(found["acknowledged"])) > 60  # the load was real


def test_a_full_disk_is_said_costs_rows_and_nothing_else(tmp_path: Path) -> None:
    """Effects are told, rows are counted, and with room again the whole state is on disk at once."""
    found = ran("full", str(tmp_path))
    assert int(str(found["refused"])) > 0  # the disk was full
    assert int(str(found["lost"])) > 0
    assert found["failure"]
    assert "make room" in str(found["line"])
    assert (found["healed"], found["same"], found["problem"]) == (True, True, "")


def test_after_lost_rows_the_first_that_is_kept_carries_the_whole_state(tmp_path: Path) -> None:
    """Rows behind a gap would be decided again on a state that never was."""
    path = tmp_path / "journal.db"

    def row(number: int, state: State | None) -> _Row:
        told = Tick()
        return _Row(at=float(number), wall=0.0, event=told, commands=(), state=state, durable=None)

    with closing(Journal(path, boot_id=BOOT)) as journal:
        journal.restore()
        journal._write([row(1, first())])
        journal._db.execute("PRAGMA query_only = 1")
        journal._write([row(2, None)])
        assert journal.failure is not None
        journal._db.execute("PRAGMA query_only = 0")
        journal._write([row(3, None)])
        journal._write([row(4, None), row(5, replace(first(), intents=5)), row(6, None)])
        assert (journal.failure, journal.lost_rows, journal.newest) == (None, 3, 3)
    with closing(Journal(path, boot_id=BOOT)) as journal:
        assert [recorded.at for recorded in journal.read()] == [1.0, 5.0, 6.0]
    state, _, _ = restored(path)
    assert state is not None
    assert state.intents == 5


def test_a_queue_that_is_full_costs_rows_and_no_time(tmp_path: Path) -> None:
    """The writer never started: the loop goes on, the effect is told, the next row carries the state."""

    async def flood() -> Journal:
        journal = Journal(tmp_path / "journal.db", boot_id=BOOT)
        journal.restore()
        state, commands = decide(first(), story(1), 1.0)
        for _ in range(QUEUE_ROWS_MAX):
            journal.record(at=1.0, wall=1.0, event=Tick(), commands=(), state=state)
        durable = journal.record(at=1.0, wall=1.0, event=story(1), commands=commands, state=state)
        assert durable is not None
        with pytest.raises(JournalError, match="does not keep up"):
            await durable
        assert journal.lost_rows == 1
        journal.start()
        await asyncio.to_thread(until, journal._rows.empty, "the queue is written")
        journal.record(at=2.0, wall=2.0, event=Tick(), commands=(), state=replace(state, intents=99))
        await asyncio.to_thread(journal.close)
        return journal

    assert asyncio.run(flood()).failure is None
    state, _, _ = restored(tmp_path / "journal.db")
    assert state is not None
    assert state.intents == 99


def test_old_rows_are_forgotten_and_what_is_under_way_is_not(
    tmp_path: Path,
) -> None:
    """Bounded, whatever the night brings."""
    path = tmp_path / "journal.db"
    state, commands = decide(first(), story(1), 1.0)
    told = Notify(incident=None, what="call", reason="ok", text="once")
    written(path, [(1.0, story(1), (*commands, told), state)])
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "INSERT INTO events SELECT ?, at, wall, kind, body, commands FROM events", (EVENTS_KEPT + 10,)
        )
    canary = RunCanary(intent="2-canary", server="s")
    rows: list[Told] = [(2.0, story(1), (canary,), state)]
    rows += [(2.0 + n, Tick(), (PublishGate(gate=state.gate),), state) for n in range(SNAPSHOT_EVERY)]
    written(path, rows)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT min(seq) FROM events").fetchone()[0] > 1
        assert db.execute("SELECT count(*) FROM notices WHERE text = 'once'").fetchone() == (0,)
        assert {"1-stop", "2-canary"} <= {i for (i,) in db.execute("SELECT intent FROM intents")}


@pytest.mark.timeout(90)
def test_a_log_cut_anywhere_comes_back_as_a_beginning_of_itself(tmp_path: Path) -> None:
    """
    As after a power loss: the write-ahead log ends at each frame's border, or within a frame.

    What comes back is a prefix of what was written, with the very state that its last row decided.
    """
    path = tmp_path / "journal.db"
    states: list[str] = []

    async def write() -> tuple[bytes, bytes]:
        journal = Journal(path, boot_id=BOOT)
        journal.restore()
        journal.start()
        state = first()
        for number in range(60):
            state, commands = decide(state, story(number), float(number))
            states.append(text(state))
            durable = journal.record(
                at=float(number), wall=0.0, event=story(number), commands=commands, state=state
            )
            if durable is not None:
                await durable
        frozen = path.read_bytes(), path.with_name("journal.db-wal").read_bytes()
        await asyncio.to_thread(journal.close)
        return frozen

    database, log = asyncio.run(write())
    page = int.from_bytes(log[8:12], "big")
    frame = 24 + page
    frames = (len(log) - 32) // frame
    assert frames > 150  # the log was not folded into the database meanwhile
    borders = [32 + frame * n for n in range(frames + 1)]
    cuts = borders + [border + inside for border in borders[:-1:6] for inside in (1, 24, frame // 2)]
    seen, folder = set(), tmp_path / "cut"
    for cut in cuts:
        folder.mkdir()
        (folder / "journal.db").write_bytes(database)
        (folder / "journal.db-wal").write_bytes(log[:cut])
        count = rows_in(folder / "journal.db")
        if count:
            state, _, _ = restored(folder / "journal.db")
            assert state is not None
            assert text(state) == states[count - 1], f"cut at {cut}: {count} rows"
        seen.add(count)
        shutil.rmtree(folder)
    assert len(seen) > 25
    assert max(seen) == 60


def test_a_stream_without_a_gap_reaches_the_disk_while_it_goes_on(night: Recording, tmp_path: Path) -> None:
    """Rows that wait for company may not wait as long as there is company."""
    path = tmp_path / "journal.db"
    at, event, _, state = night.rows[0]

    async def stream() -> int:
        journal = Journal(path, boot_id=BOOT)
        journal.restore()
        journal.start()
        for told in range(QUEUE_ROWS_MAX):
            if told % 100 == 0 and rows_in(path):
                break
            journal.record(at=at, wall=at, event=event, commands=(), state=state)
            await asyncio.sleep(0)
        await asyncio.to_thread(journal.close)
        return told

    assert asyncio.run(stream()) < QUEUE_ROWS_MAX - 1


def rows_in(path: Path) -> int:
    """How many rows there are; they must be the first ones, without a gap."""
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return 0
        seqs = [seq for (seq,) in db.execute("SELECT seq FROM events ORDER BY seq")]
    assert seqs == list(range(1, len(seqs) + 1))
    return len(seqs)


def test_two_readings_of_one_batch_are_two_values() -> None:
    """NaN is a reading, and null is unknown: the journal keeps them apart."""
    for value in (None, math.nan, math.inf, -0.0):
        batch = BatchReported(attempt=0, step=1, batch=1, ok=1, failed=0, reward=value)
        back = decode_event("BatchReported", encode(batch, _EVENTS))
        assert repr(back) == repr(batch)


def test_the_ledger_of_checkpoints_outlives_a_reboot(tmp_path: Path) -> None:
    """A state's times mean nothing after one; that a checkpoint was proven does."""
    path = tmp_path / "journal.db"
    row = LedgerRow(step=20, attempt=1, path="/c/20", healthy_steps=5, norms=(("w", math.nan),))

    async def write() -> None:
        with closing(Journal(path, boot_id=BOOT)) as journal:
            journal.restore()
            journal.start()
            state = replace(first(), checkpoints=(row,))
            journal.record(at=1.0, wall=1.0, event=Tick(), commands=(), state=state)
            journal.record(at=2.0, wall=2.0, event=Tick(), commands=(), state=state)

    asyncio.run(write())
    with closing(Journal(path, boot_id="another boot")) as journal:
        restored = journal.restore()
    assert restored.state is None
    (found,) = restored.checkpoints
    assert replace(found, norms=()) == replace(row, norms=())
    assert math.isnan(found.norms[0][1])
