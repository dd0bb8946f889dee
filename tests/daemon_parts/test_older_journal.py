"""A journal of another version: what keeps the run safe is taken over, and a lost hold is never a GO."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon_parts.conftest import until
from daemon_parts.journal_writer import BOOT
from daemon_parts.own_daemons import OwnDaemons
from stepguardd import proc
from stepguardd.core.budget import Budget
from stepguardd.core.events import OperatorAsked
from stepguardd.core.reasons import Reason
from stepguardd.core.state import (
    Lockout,
    Mode,
    Pause,
    Server,
    Settings,
    State,
    Trainer,
    initial,
)
from stepguardd.journal import Journal, encode_state
from stepguardd.older_state import HOLDS, OlderStateError, read_older

SPENT = Budget(spent_at=(1.0, 2.0), streak=2, last=2.0)
FRESH = initial(Settings(), Mode.HOLD, (Server(name="s", managed=True),))
OLD = replace(
    FRESH,
    servers=(Server(name="s", managed=True, budget=SPENT, restarts=2),),
    trainer=Trainer(attempt=3, launches=1, budget=SPENT, pid=4),
    lockout=Lockout(reason=Reason.OPERATOR_PAUSE, since=3.0),
    pause=Pause(who="ada", why="lunch", since=1.0),
    retries=SPENT,
    reward=FRESH.reward._replace(step=9),
    intents=7,
)


def as_written(state: State = OLD) -> dict[str, Any]:
    return json.loads(encode_state(state))  # type: ignore[no-any-return]


def test_of_a_state_with_another_judgement_everything_else_is_kept() -> None:
    written = as_written()
    written["reward"] = {"baseline": "of another make"}
    older = read_older(json.dumps(written), FRESH)
    assert older.state == replace(OLD, reward=FRESH.reward)
    assert (older.lost, older.held) == (("reward",), False)


def test_what_looks_readable_and_is_of_another_shape_is_left_out() -> None:
    older = read_older(json.dumps(as_written()), FRESH, without=("reward",))
    assert older.state == replace(OLD, reward=FRESH.reward)
    assert older.lost == ("reward",)


def test_of_a_server_and_a_trainer_of_another_kind_what_they_used_up_is_kept() -> None:
    written = as_written()
    written["servers"][0]["state"] = "a state that is no more"
    written["trainer"]["phase_at"] = "soon"
    older = read_older(json.dumps(written), FRESH)
    assert older.state.servers == (replace(FRESH.servers[0], budget=SPENT, restarts=2),)
    assert older.state.trainer == Trainer(attempt=3, launches=1, budget=SPENT)
    assert (older.state.lockout, older.state.pause) == (OLD.lockout, OLD.pause)
    assert (set(older.lost), older.held) == ({"servers", "trainer"}, False)


@pytest.mark.parametrize("hold", HOLDS)
def test_a_hold_that_cannot_be_read_is_said_to_be_one(hold: str) -> None:
    written = as_written()
    written[hold] = {"of": "another version"}
    older = read_older(json.dumps(written), FRESH)
    assert older.held
    assert getattr(older.state, hold) is None
    assert hold in older.lost


@settings(max_examples=25, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.none() | st.integers() | st.text() | st.lists(st.integers(), max_size=2)
            for name in as_written()
        },
    )
)
def test_whatever_the_fields_hold_a_state_comes_of_it(strange: dict[str, object]) -> None:
    older = read_older(json.dumps({**as_written(), **strange}), FRESH)
    assert isinstance(older.state, State)
    encode_state(older.state)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '"state"'])
def test_what_is_no_state_is_refused(text: str) -> None:
    with pytest.raises(OlderStateError, match="it is no"):
        read_older(text, FRESH)


def test_a_judge_of_another_shape_is_known_by_the_word_beside_its_state(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    asked = OperatorAsked(verb="pause", who="ada", why="lunch")

    async def write() -> None:
        journal = Journal(path, boot_id=BOOT)
        journal.restore()
        journal.start()
        journal.record(at=1.0, wall=1.0, event=asked, commands=(), state=OLD)
        await asyncio.to_thread(journal.close)

    asyncio.run(write())
    with closing(Journal(path, boot_id=BOOT)) as journal:
        assert journal.restore().state == OLD
    with closing(sqlite3.connect(path)) as db, db:
        assert db.execute("UPDATE meta SET value = 'another' WHERE key = 'judge'").rowcount == 1
    with closing(Journal(path, boot_id=BOOT)) as journal:
        found = journal.restore()
    assert (found.state, found.without) == (None, ("reward",))
    assert found.older == encode_state(OLD)


class Bare(OwnDaemons):
    """A run without servers."""

    def started(self) -> tuple[proc.Proc, ...]:
        return ()


def changed(path: Path, change: dict[str, object], *statements: str) -> None:
    """Make the newest state one of another version."""
    with closing(sqlite3.connect(path)) as db, db:
        (seq, text) = db.execute("SELECT seq, state FROM snapshots ORDER BY seq DESC LIMIT 1").fetchone()
        state = {**json.loads(text), **change}
        db.execute("UPDATE snapshots SET state = ? WHERE seq = ?", (json.dumps(state), seq))
        for statement in statements:
            db.execute(statement)


def last_words(run: Bare) -> dict[str, Any]:
    """The status of a daemon that has just taken up the run, which is then stopped."""
    daemon = run.daemon()
    try:
        until(run.status, "the daemon answers", 60)
        status = run.status()
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)
    assert status
    return dict(status)


@pytest.mark.e2e
def test_a_daemon_takes_up_the_journal_of_another_version_and_holds_what_was_held(tmp_path: Path) -> None:
    """Upgraded while a person had paused the run: the reward is learned anew, pause and attempt stay."""
    run = Bare(tmp_path, {"run": {"mode": "hold"}, "web": {"listen": "127.0.0.1:0"}})
    last_words(run)
    path = run.state_dir / "journal.db"
    pause = {"who": "ada", "why": "lunch", "since": 1.0}
    trainer = {**as_written()["trainer"], "attempt": 3, "phase_at": "soon"}
    unreadable = "INSERT INTO intents VALUES ('9', 1, 'Teleport', '{}', 1.0, NULL, NULL, NULL)"
    strange = "INSERT INTO events SELECT max(seq) + 1, 1.0, 1.0, 'Omen', '{}', '[]' FROM events"
    changed(path, {"reward": {"old": 1}, "pause": pause, "trainer": trainer}, unreadable, strange)
    status = last_words(run)
    assert status["gate"]["order"] == "HOLD"
    assert status["trainer"]["attempt"] == 3
    (note,) = [note for note in status["warnings"] if "another version" in note]
    assert "begun anew: reward" in note
    assert "2 rows" in note
    assert run.log.read_text().count("another version of Stepguard") == 1
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT detail FROM intents WHERE intent = '9'").fetchone() == (
            "begun by another version",
        )
    assert not [note for note in last_words(run)["warnings"] if "another version" in note]


@pytest.mark.e2e
def test_a_hold_that_a_newer_daemon_cannot_read_waits_for_a_person(tmp_path: Path) -> None:
    run = Bare(tmp_path, {"run": {"mode": "hold"}, "web": {"listen": "127.0.0.1:0"}})
    last_words(run)
    changed(run.state_dir / "journal.db", {"lockout": {"for": "reasons of old"}})
    assert last_words(run)["gate"]["order"] == "HOLD"
