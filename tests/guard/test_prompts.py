"""What the guard sends of a batch in which prompts are under suspicion, and what it withholds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.virtual_daemon import VirtualDaemon
from stepguard.admission import judge, refusal
from stepguard.gate import Order
from stepguard.guard import Guard
from stepguard.isolation import Aborted
from stepguard.prompts import QUARANTINE_FILE, SUSPECTS_FILE, WAVES, Marked, NotSent, Withheld, key_of, turns
from stepguardd.core.commands import MarkPrompts
from stepguardd.effects import prompts

Guards = Callable[..., Guard]
KEYS = list("abcdefgh")


class Server:
    """Answers, and dies of some prompts: with it every request that is under way."""

    def __init__(self, daemon: VirtualDaemon, *deadly: str) -> None:
        self.deadly, self.sent, self.daemon = set(deadly), list[str](), daemon
        self.died = asyncio.Event()

    async def ask(self, prompt: str) -> str:
        self.sent.append(prompt)
        await asyncio.sleep(0)
        if prompt in self.deadly:
            self.died.set()
            self.daemon.order(Order.HOLD, "server_died")
        await asyncio.sleep(0)
        if self.died.is_set():
            raise ConnectionResetError(prompt)
        return prompt.upper()


def gathered(
    guard: Guard, daemon: VirtualDaemon, *deadly: str, keys: list[str] = KEYS
) -> tuple[list[Any], list[str]]:
    async def batch() -> tuple[list[Any], list[str]]:
        server = Server(daemon, *deadly)
        outcomes = await guard.gather([server.ask(key) for key in keys], prompts=keys)
        return outcomes, server.sent

    return asyncio.run(batch())


def lost(daemon: VirtualDaemon) -> list[tuple[list[str], list[str]]]:
    return [(report["lost"], report["answered"]) for report in daemon.of_kind("rollouts_lost")]


def test_without_suspects_all_go_at_once_and_a_loss_is_told(guards: Guards, daemon: VirtualDaemon) -> None:
    guard = guards()
    assert gathered(guard, daemon) == ([key.upper() for key in KEYS], KEYS)
    assert lost(daemon) == []
    outcomes, sent = gathered(guard, daemon, "c")
    assert sent == KEYS
    assert all(isinstance(outcome, Aborted) for outcome in outcomes)
    assert lost(daemon) == [(KEYS, [])]


def test_suspects_go_last_one_after_another_and_the_one_that_kills_is_alone(
    guards: Guards, daemon: VirtualDaemon, tmp_path: Path
) -> None:
    prompts.mark(tmp_path, MarkPrompts(suspects=("b", "c", "d")))
    outcomes, sent = gathered(guards(), daemon, "c")
    assert sent == [*"aefgh", "b", "c"]
    assert lost(daemon) == [([], ["b"]), (["c"], [])]
    kinds = [type(outcome.exception) if isinstance(outcome, Aborted) else str for outcome in outcomes]
    assert kinds == [str, str, ConnectionResetError, NotSent, str, str, str, str]


def test_a_failure_without_a_hold_stops_nobody(guards: Guards, daemon: VirtualDaemon, tmp_path: Path) -> None:
    """One trajectory that fails by itself must not keep the suspects out of every batch."""
    (tmp_path / SUSPECTS_FILE).write_text("b\nc\n")

    async def batch() -> list[Any]:
        async def ask(key: str) -> str:
            if key == "b":
                raise ValueError(key)
            return key

        return await guards().gather([ask(key) for key in KEYS], prompts=KEYS)

    outcomes = asyncio.run(batch())
    assert [key for key, one in zip(KEYS, outcomes, strict=True) if isinstance(one, Aborted)] == ["b"]


def test_the_quarantined_are_not_sent_and_do_not_count_as_failures(
    guards: Guards, daemon: VirtualDaemon, tmp_path: Path
) -> None:
    (tmp_path / QUARANTINE_FILE).write_text("# by hand\n c \nd\n")
    outcomes, sent = gathered(guards(), daemon, "c")
    assert sent == [key for key in KEYS if key not in "cd"]
    assert [isinstance(outcome, Aborted) for outcome in outcomes] == [key in "cd" for key in KEYS]
    assert isinstance(outcomes[2].exception, Withheld)
    verdict = judge(outcomes, rewards=[1.0] * len(KEYS))
    assert (verdict.tally.ok, verdict.tally.failed) == (6, 0)
    assert list(verdict.mask) == [key not in "cd" for key in KEYS]
    assert refusal(verdict.tally, 0.0) is None


def test_what_people_wrote_into_the_quarantine_stays(tmp_path: Path) -> None:
    file = tmp_path / QUARANTINE_FILE
    file.write_text("# mine\nx")
    for _ in range(2):
        prompts.mark(tmp_path, MarkPrompts(quarantine="y"))
    assert file.read_text() == "# mine\nx\ny\n"
    prompts.mark(tmp_path, MarkPrompts(suspects=("a",)))
    assert (tmp_path / SUSPECTS_FILE).read_text().splitlines()[1:] == ["a"]
    prompts.mark(tmp_path, MarkPrompts())
    assert not (tmp_path / SUSPECTS_FILE).exists()


def test_a_folder_that_cannot_be_written_is_said_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "no folder").write_text("")
    prompts.mark(tmp_path / "no folder", MarkPrompts(quarantine="y", suspects=("a",)))


def test_prompts_and_items_are_as_many(guards: Guards) -> None:
    async def batch() -> None:
        async def ask() -> None: ...

        await guards().gather([ask()], prompts=["a", "b"])

    with pytest.raises(ValueError, match="2 prompts for 1 items"):
        asyncio.run(batch())


@given(st.lists(st.sampled_from([f"p{n}" for n in range(60)]), max_size=80), st.data())
def test_every_item_has_its_turn_once(keys: list[str], data: st.DataObject) -> None:
    names = st.frozensets(st.sampled_from([f"p{n}" for n in range(60)]))
    marked = Marked(quarantined=data.draw(names), suspects=data.draw(names))
    order = turns(keys, marked)
    sent = [at for wave in order.waves for at in wave]
    assert sorted([*sent, *order.withheld]) == list(range(len(keys)))
    assert len(order.waves) <= WAVES + 1
    assert {keys[at] for at in order.withheld} <= marked.quarantined
    for wave in order.waves[1:]:
        assert {keys[at] for at in wave} <= marked.suspects
    assert not {keys[at] for at in order.waves[0]} & (marked.suspects | marked.quarantined)
    suspects = {keys[at] for wave in order.waves[1:] for at in wave}
    if len(suspects) <= WAVES:
        assert all(len({keys[at] for at in wave}) == 1 for wave in order.waves[1:])


@given(st.one_of(st.text(), st.integers(), st.tuples(st.integers(), st.text())))
def test_a_key_is_one_plain_line_and_always_the_same(prompt: object) -> None:
    key = key_of(prompt)
    assert key == key_of(prompt)
    assert key.splitlines() == [key]
    assert key.strip() == key
    assert key.isascii()
    assert not key.startswith("#")


def test_the_longest_report_fits_a_datagram(guards: Guards, daemon: VirtualDaemon) -> None:
    keys = [f"{number:048d}" for number in range(1200)]
    gathered(guards(), daemon, keys[0], keys=keys)
    ((told, _),) = lost(daemon)
    assert len(told) == 1024
