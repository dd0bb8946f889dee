"""One failed trajectory costs one trajectory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepguard import isolation
from stepguard.isolation import Aborted, FailureLog

T = TypeVar("T")
LOGGER = logging.getLogger("stepguard")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def gather(items: list[Any], **options: Any) -> list[Any]:
    options = {"log": FailureLog(LOGGER), "on_done": lambda error: None} | options
    return await isolation.gather(items, **options)


async def value(result: Any, after: int = 0) -> Any:
    for _ in range(after):
        await asyncio.sleep(0)
    return result


async def fail(error: BaseException, after: int = 0) -> Any:
    for _ in range(after):
        await asyncio.sleep(0)
    raise error


def test_each_item_has_its_result_or_its_exception_in_its_place() -> None:
    error = ValueError("bad")

    async def work() -> list[Any]:
        return await gather([value("a", 3), fail(error, 1), value("c")])

    assert run(work()) == ["a", Aborted(error), "c"]


def test_incident_d_one_bad_trajectory_of_500_costs_one_and_its_real_traceback_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def generate(index: int) -> dict[str, Any]:
        await asyncio.sleep(0)
        if index == 377:
            raise KeyError("reward_model_answer")
        return {"index": index}

    with caplog.at_level(logging.INFO, "stepguard"):
        outcomes = run(gather_of(generate(index) for index in range(500)))
    live = [outcome for outcome in outcomes if not isinstance(outcome, Aborted)]
    assert [outcome["index"] for outcome in live] == [index for index in range(500) if index != 377]
    assert isinstance(outcomes[377], Aborted)
    assert isinstance(outcomes[377].exception, KeyError)
    assert "CancelledError" not in caplog.text
    assert "in generate" in caplog.text
    assert "KeyError: 'reward_model_answer'" in caplog.text
    assert "1 of 500 trajectories failed: 1 KeyError" in caplog.text


async def gather_of(items: Any) -> list[Any]:
    return await gather(list(items))


def test_incident_c_a_worker_that_dies_inside_generate_leaves_the_others_their_results() -> None:
    async def generate_response(worker: int) -> str:
        await asyncio.sleep(0)
        if worker == 2:
            raise ConnectionResetError("actor died")
        return f"response {worker}"

    outcomes = run(gather_of(generate_response(worker) for worker in range(4)))
    assert [outcome for outcome in outcomes if isinstance(outcome, str)] == [
        "response 0",
        "response 1",
        "response 3",
    ]
    assert isinstance(outcomes[2].exception, ConnectionResetError)


def test_a_failed_trajectory_becomes_a_list_where_the_others_fan_out() -> None:
    error = ValueError()
    aborted = Aborted(error)
    assert run(gather([value([1, 2]), fail(error), value([3, 4])])) == [[1, 2], [aborted, aborted], [3, 4]]
    assert run(gather([value([1, 2]), fail(error), value([3])])) == [[1, 2], [aborted], [3]]
    assert run(gather([value([]), fail(error)])) == [[], [aborted]]
    assert run(gather([value(1), fail(error)])) == [1, aborted]


def test_fanout_says_it_where_all_fail_and_zero_says_that_a_list_is_a_value() -> None:
    error = ValueError()
    aborted = Aborted(error)
    assert run(gather([fail(error), fail(error)], fanout=3)) == [[aborted] * 3, [aborted] * 3]
    assert run(gather([value([1, 2]), fail(error)], fanout=0)) == [[1, 2], aborted]


def test_nested_lists_of_awaitables_keep_their_nesting() -> None:
    error = ValueError()
    shape = [[value(1), fail(error)], [value(2), [value(3)]], []]
    assert run(gather(shape)) == [[1, Aborted(error)], [2, [3]], []]
    assert run(gather([])) == []


def test_cancelling_the_caller_cancels_every_child_and_waits_for_it() -> None:
    ended: list[str] = []

    async def child(name: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended.append(name)
            raise

    async def work() -> None:
        task = asyncio.ensure_future(gather([child("a"), child("b"), value(1)]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await task
        assert ended == ["a", "b"]
        assert len(asyncio.all_tasks()) == 1

    run(work())


def test_a_timeout_around_gather_is_a_timeout() -> None:
    async def work() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await gather([asyncio.Event().wait()])

    run(work())


def test_a_child_cancelled_by_someone_else_is_a_failure_and_not_a_cancellation() -> None:
    async def work() -> None:
        child = asyncio.ensure_future(asyncio.Event().wait())
        asyncio.get_running_loop().call_soon(child.cancel)
        outcomes = await gather([value(1, 5), child])
        assert outcomes[0] == 1
        assert isinstance(outcomes[1].exception, asyncio.CancelledError)

    run(work())


class Ordered(Exception):  # noqa: N818
    pass


def test_an_order_inside_a_trajectory_ends_the_batch_and_cancels_the_others() -> None:
    async def work() -> None:
        other = asyncio.ensure_future(asyncio.Event().wait())
        with pytest.raises(Ordered):
            await gather([other, fail(Ordered(), 2)], passing=(Ordered,))
        assert other.cancelled()

    run(work())


def test_all_start_at_once_and_in_order() -> None:
    started: list[int] = []
    everyone = asyncio.Event()

    async def child(index: int) -> int:
        started.append(index)
        if len(started) == 200:
            everyone.set()
        await everyone.wait()
        return index

    assert run(gather([child(index) for index in range(200)])) == list(range(200))
    assert started == list(range(200))


def test_what_cannot_be_awaited_is_an_error_of_use_before_anything_starts() -> None:
    started: list[int] = []

    async def child() -> None:
        started.append(1)

    async def work() -> None:
        with pytest.raises(TypeError, match="item 1 is a int"):
            await gather([child(), 5])

    run(work())
    assert started == []


def test_the_same_awaitable_twice_is_awaited_once() -> None:
    async def work() -> list[Any]:
        once = value("x")
        return await gather([once, once])

    assert run(work()) == ["x", "x"]


def test_a_traceback_is_logged_once_per_distinct_error(caplog: pytest.LogCaptureFixture) -> None:
    async def one(index: int) -> None:
        raise ValueError(f"sample {index}")

    async def another() -> None:
        raise ValueError("elsewhere")

    log = FailureLog(LOGGER)
    with caplog.at_level(logging.ERROR, "stepguard"):
        run(gather([one(index) for index in range(20)] + [another()], log=log))
        run(gather([one(index) for index in range(20)] + [another()], log=log))
    assert len(caplog.records) == 2
    assert "in one" in caplog.text
    assert "in another" in caplog.text


def test_distinct_errors_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog(LOGGER)
    with caplog.at_level(logging.ERROR, "stepguard"):
        for index in range(1000):
            log.note(type(f"Error{index}", (Exception,), {})())
    assert len(caplog.records) == 256


def test_progress_is_counted_as_each_one_ends() -> None:
    done: list[BaseException | None] = []
    failure = ValueError()
    run(gather([value(1), fail(failure), value(2)], on_done=done.append))
    assert sorted(done, key=repr) == [None, None, failure]


shapes = st.recursive(st.booleans(), lambda inner: st.lists(inner, max_size=4), max_leaves=12).filter(
    lambda shape: isinstance(shape, list)
)


@settings(max_examples=80, deadline=None)
@given(shapes)
def test_the_shape_is_kept_whatever_fails(shape: list[Any]) -> None:
    def items(part: list[Any]) -> list[Any]:
        return [items(x) if isinstance(x, list) else value(True) if x else fail(ValueError()) for x in part]

    def survivors(part: list[Any]) -> list[Any]:
        return [survivors(x) if isinstance(x, list) else not isinstance(x, Aborted) for x in part]

    async def work() -> list[Any]:
        return await gather(items(shape))

    logging.disable(logging.CRITICAL)
    try:
        assert survivors(run(work())) == shape
    finally:
        logging.disable(logging.NOTSET)
