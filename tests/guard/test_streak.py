"""Requests that fail one after the other are told of while the rollouts run, and nothing else is."""

import asyncio
import urllib.error
from collections.abc import Callable

import httpx
import pytest

from guard.virtual_daemon import VirtualDaemon
from stepguard.guard import Guard
from stepguard.streak import TOLD_FROM, RequestStreak, on_the_way


def refused() -> httpx.ConnectError:
    return httpx.ConnectError("connection refused")


def status(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://x/generate")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(code, request=request))


def wrapped(error: BaseException) -> RuntimeError:
    try:
        raise RuntimeError("the rollout failed") from error
    except RuntimeError as outer:
        return outer


@pytest.fixture
def told() -> list[int]:
    return []


@pytest.fixture
def streak(told: list[int]) -> RequestStreak:
    return RequestStreak(lambda count, error: told.append(count))


def test_a_streak_is_told_at_eight_and_at_each_doubling_and_so_is_its_end(
    streak: RequestStreak, told: list[int]
) -> None:
    for _ in range(40):
        streak.ended(refused())
    assert told == [8, 16, 32]
    streak.ended(None)
    streak.ended(None)
    assert told == [8, 16, 32, 0]


def test_one_answer_among_the_failures_is_no_streak(streak: RequestStreak, told: list[int]) -> None:
    for index in range(200):
        streak.ended(None if index % TOLD_FROM == 0 else refused())
    assert told == []


def test_a_request_that_the_server_finds_fault_with_was_answered(
    streak: RequestStreak, told: list[int]
) -> None:
    for _ in range(TOLD_FROM - 1):
        streak.ended(status(503))
    streak.ended(status(400))
    streak.ended(status(503))
    assert told == []


def test_an_error_of_the_reward_neither_counts_nor_ends_a_streak(
    streak: RequestStreak, told: list[int]
) -> None:
    for _ in range(TOLD_FROM):
        streak.ended(refused())
        streak.ended(ValueError("no number in the answer"))
    assert told == [TOLD_FROM]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        ConnectionResetError(),
        TimeoutError(),
        refused(),
        httpx.ReadTimeout(""),
        httpx.RemoteProtocolError(""),
        status(503),
        wrapped(refused()),
        wrapped(wrapped(status(500))),
    ],
    ids=repr,
)
def test_what_gets_no_answer_failed_on_the_way(error: BaseException) -> None:
    assert on_the_way(error)


def test_the_errors_of_other_clients_are_known_by_their_roots() -> None:
    aiohttp = pytest.importorskip("aiohttp")
    assert on_the_way(aiohttp.ServerDisconnectedError())
    assert on_the_way(aiohttp.ClientPayloadError())


@pytest.mark.parametrize(
    "error",
    [ValueError(), KeyError(), urllib.error.ContentTooShortError("", b""), asyncio.CancelledError()],
    ids=repr,
)
def test_other_errors_say_nothing_about_a_server(error: BaseException) -> None:
    assert not on_the_way(error)


def test_an_error_raised_from_itself_ends_the_search() -> None:
    error = ValueError()
    error.__cause__ = error
    assert not on_the_way(error)


def test_the_guard_tells_of_it_while_the_batch_still_runs(
    guards: Callable[..., Guard], daemon: VirtualDaemon
) -> None:
    guard = guards()

    async def fails() -> None:
        raise refused()

    async def batch() -> list[object]:
        failing = [asyncio.ensure_future(fails()) for _ in range(TOLD_FROM)]

        async def the_last() -> int:
            await asyncio.wait(failing)
            return len(daemon.of_kind("requests_failed"))

        return await guard.gather([*failing, the_last()])

    assert asyncio.run(batch())[-1] == 1
    first, last = daemon.of_kind("requests_failed")
    assert (first["in_a_row"], last["in_a_row"]) == (TOLD_FROM, 0)
    assert "connection refused" in first["error"]
