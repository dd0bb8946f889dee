"""`guard.call(…, or_kill=…)`: what hangs alone is killed, what hangs in a mass holds the run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from guard.virtual_daemon import VirtualDaemon, VirtualTime
from stepguard.calls import CallFailed, CallFailure, CallOk, Fate
from stepguard.gate import Order
from stepguard.guard import Guard
from stepguard.orders import StopRequested
from stepguard.settings import GuardSettings

Guards = Callable[..., Guard]


async def call_all(guard: Guard, killed: list[int], *, calls: int, hung: int) -> list[Any]:
    async def one(index: int) -> Any:
        async def answer() -> int:
            if index < hung:
                await asyncio.Event().wait()
            return index

        return await guard.call(
            answer(), timeout_s=0.05, what="sandbox", or_kill=lambda: killed.append(index)
        )

    return list(await asyncio.gather(*(one(index) for index in range(calls))))


def test_what_hangs_alone_is_killed_and_the_others_have_their_values(
    guards: Guards, daemon: VirtualDaemon
) -> None:
    guard, killed = guards(), list[int]()
    answers = asyncio.run(call_all(guard, killed, calls=40, hung=2))
    assert sorted(killed) == [0, 1]
    assert answers[2:] == [CallOk(index) for index in range(2, 40)]
    for answer in answers[:2]:
        assert isinstance(answer, CallFailed)
        assert (answer.kind, answer.fate) == (CallFailure.TIMEOUT, Fate.KILLED)
    assert [report["error"] for report in daemon.of_kind("call_failed")] == ["timeout, killed"] * 2
    assert daemon.of_kind("calls_hung") == []
    guard.before_step(1)


def test_a_mass_is_spared_and_told_once_and_a_living_daemon_decides(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard, killed = guards(), list[int]()
    answers = asyncio.run(call_all(guard, killed, calls=40, hung=30))
    assert killed == []
    assert [answer.fate for answer in answers[:30]] == [Fate.SPARED] * 30
    (told,) = daemon.of_kind("calls_hung")
    assert (told["what"], told["failed"], told["calls"]) == ("sandbox", 30, 40)
    daemon.order(Order.HOLD, "calls_hung")
    time.after(5, lambda: daemon.order(Order.GO))
    before = time.ns
    guard.before_step(1)
    assert time.ns - before >= 5e9


def test_without_a_daemon_the_guard_holds_a_mass_by_itself(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard, killed = guards(), list[int]()
    daemon.die()
    time.ns += int(60e9)
    asyncio.run(call_all(guard, killed, calls=20, hung=20))
    assert killed == []
    with pytest.raises(StopRequested, match="calls_hung"):
        guard.before_step(1)


def test_where_nothing_is_to_be_refused_a_mass_is_spared_and_holds_nothing(
    guards: Guards, time: VirtualTime
) -> None:
    guard, killed = guards(None, settings=GuardSettings(max_failed_fraction=1.0)), list[int]()
    asyncio.run(call_all(guard, killed, calls=20, hung=20))
    assert killed == []
    before = time.ns
    guard.before_step(1)
    assert time.ns == before


def test_an_error_kills_nothing(guards: Guards) -> None:
    guard, killed = guards(), list[int]()

    async def fail() -> None:
        raise ValueError("a bad answer")

    answer = asyncio.run(guard.call(fail(), timeout_s=5, or_kill=lambda: killed.append(1)))
    assert isinstance(answer, CallFailed)
    assert (answer.kind, answer.fate, killed) == (CallFailure.ERROR, None, [])


def test_a_kill_that_fails_is_said(guards: Guards) -> None:
    def cannot() -> None:
        raise PermissionError("not yours")

    answer = asyncio.run(guards().call(asyncio.Event().wait(), timeout_s=0.01, or_kill=cannot))
    assert isinstance(answer, CallFailed)
    assert answer.fate is Fate.LEFT


def test_what_cannot_end_an_actor_is_refused_before_anything_is_awaited(guards: Guards) -> None:
    async def end() -> None:
        pass

    for wrong in (end, 7):
        with pytest.raises(TypeError, match="or_kill takes"):
            asyncio.run(guards().call(asyncio.sleep(0), timeout_s=1, or_kill=wrong))
