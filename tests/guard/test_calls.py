"""Bounded calls: a value or a typed failure."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stepguard.calls import CallFailed, CallFailure, CallOk, bounded_call


def test_a_value_comes_back_as_one() -> None:
    async def work() -> None:
        assert await bounded_call(asyncio.sleep(0, "value"), timeout_s=5) == CallOk("value")

    asyncio.run(work())


def test_any_awaitable_will_do() -> None:
    class Reference:
        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            return 7

    async def work() -> None:
        assert await bounded_call(Reference(), timeout_s=5) == CallOk(7)

    asyncio.run(work())


def test_no_answer_in_time_is_a_failure_and_the_call_is_cancelled() -> None:
    ended: list[str] = []

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async def work() -> None:
        answer = await bounded_call(hang(), timeout_s=0.01)
        assert isinstance(answer, CallFailed)
        assert answer.kind is CallFailure.TIMEOUT
        assert isinstance(answer.exception, TimeoutError)
        assert ended == ["cancelled"]

    asyncio.run(work())


def test_an_error_is_a_failure_with_its_exception() -> None:
    async def fail() -> None:
        raise ConnectionResetError("actor died")

    async def work() -> None:
        answer = await bounded_call(fail(), timeout_s=5)
        assert isinstance(answer, CallFailed)
        assert (answer.kind, str(answer.exception)) == (CallFailure.ERROR, "actor died")

    asyncio.run(work())


def test_what_was_cancelled_by_someone_else_is_a_failure() -> None:
    async def work() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.cancel)
        answer = await bounded_call(future, timeout_s=5)
        assert isinstance(answer, CallFailed)
        assert answer.kind is CallFailure.CANCELLED

    asyncio.run(work())


def test_cancelling_the_caller_passes_through_and_cancels_what_was_awaited() -> None:
    async def work() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(bounded_call(future, timeout_s=5))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert future.cancelled()

    asyncio.run(work())


def test_an_order_passes_through() -> None:
    class Ordered(Exception):  # noqa: N818
        pass

    async def ordered() -> None:
        raise Ordered

    async def work() -> None:
        with pytest.raises(Ordered):
            await bounded_call(ordered(), timeout_s=5, passing=(Ordered,))

    asyncio.run(work())
