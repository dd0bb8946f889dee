"""
Isolation: one failed trajectory costs one trajectory.

Promise: every awaitable ends as its result or as `Aborted(exception)`, in its place. Where results fan out
into lists, a failed one becomes a list as well. All start at once, as in `asyncio.gather`; nothing is
throttled, retried or scored. Cancelling the caller cancels every child and waits for it. The real traceback
is logged once per distinct error, whatever the number of trajectories that met it.

Not promised: a time limit. A trajectory that never ends keeps the batch, as it would without the guard.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from stepguard.prompts import NotSent, Turns, Withheld

if TYPE_CHECKING:
    import asyncio

_DISTINCT_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class Aborted:
    """
    What stands where a trajectory failed.

    Args:
        exception: why; a CancelledError when the trajectory itself was cancelled.

    """

    exception: BaseException


class FailureLog:
    """Logs each distinct error (its type and the line that raised it) with its traceback, once."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._seen: Counter[tuple[str, str]] = Counter()

    def note(self, error: BaseException, what: str = "a trajectory") -> None:
        """Log the error if no such one was seen before; `what` failed with it."""
        key = (type(error).__qualname__, _raised_at(error))
        if key not in self._seen and len(self._seen) >= _DISTINCT_MAX:
            return
        self._seen[key] += 1
        if self._seen[key] == 1:
            self._logger.error(
                "%s failed with %s at %s; the next ones like it are not logged",
                what,
                *key,
                exc_info=(type(error), error, error.__traceback__),
            )

    def summary(self, failures: Sequence[BaseException], total: int) -> None:
        """One line for a batch in which something failed."""
        if failures:
            kinds = Counter(type(error).__qualname__ for error in failures)
            words = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
            self._logger.info("%d of %d trajectories failed: %s", len(failures), total, words)


async def gather(
    items: Iterable[Any],
    *,
    fanout: int | None = None,
    passing: tuple[type[BaseException], ...] = (),
    log: FailureLog,
    on_done: Callable[[BaseException | None], None],
    turns: Turns | None = None,
    on_wave: Callable[[int, Sequence[int]], Awaitable[bool]] | None = None,
) -> list[Any]:
    """
    Await all, each on its own.

    Args:
        items: awaitables, or lists of awaitables to any depth; the outcome has the same shape.
        fanout: how many a failed trajectory counts as: n makes it a list of n, 0 never a list. None looks at
            the others: where they are lists it is a list, as long as theirs if these agree, else of one.
        passing: exceptions that are no failure of a trajectory; one ends the batch and is raised.
        log: where failures are noted.
        on_done: called as each one ends, with its error; None for a result.
        turns: which top-level items are sent when, and which never; None: all at once.
        on_wave: called as each wave ends, with its number and the places of the items that failed in it;
            False: the rest is not sent.

    Returns:
        The outcomes, shaped as the items; what was not sent is `Aborted(Withheld)` or `Aborted(NotSent)`.

    Raises:
        TypeError: an item cannot be awaited; nothing was started.

    """
    import asyncio  # noqa: PLC0415 - importing stepguard must stay cheap

    shape = list(items)
    leaves = list(_leaves(shape))
    for index, leaf in enumerate(leaves):
        if not inspect.isawaitable(leaf):
            abandon(shape)
            raise TypeError(f"gather: item {index} is a {type(leaf).__name__}, which cannot be awaited")
    started: dict[int, asyncio.Future[Any]] = {}
    waves = (tuple(range(len(shape))),) if turns is None else turns.waves
    try:
        for number, wave in enumerate(waves):
            begun = []
            for leaf in _leaves(shape[at] for at in wave):
                if id(leaf) not in started:  # the same awaitable twice is awaited once, as in asyncio.gather
                    started[id(leaf)] = asyncio.ensure_future(leaf)
                    begun.append(started[id(leaf)])
            await _all_ended(begun, passing, on_done)
            if on_wave is None:
                continue
            failed = [at for at in wave if any(_failed(started[id(leaf)]) for leaf in _leaves([shape[at]]))]
            if not await on_wave(number, failed):
                break
    except BaseException:
        await _cancel(started.values())
        abandon(leaf for leaf in leaves if id(leaf) not in started)
        raise
    outcomes = {key: _outcome(future) for key, future in started.items()}
    failures = [outcome.exception for outcome in outcomes.values() if isinstance(outcome, Aborted)]
    for failure in failures:
        log.note(failure)
    if len(outcomes) > 1:  # of one alone everything was said
        log.summary(failures, len(outcomes))
    for at, item in enumerate(shape):
        why = Withheld("quarantined") if turns is not None and at in turns.withheld else NotSent()
        for leaf in _leaves([item]):
            if id(leaf) not in outcomes:
                outcomes[id(leaf)] = Aborted(why)
                abandon([leaf])
    length = _fanout_of(outcomes.values()) if fanout is None else fanout
    return _rebuilt(shape, outcomes, length)


async def alone(item: Any, *, log: FailureLog, on_done: Callable[[BaseException | None], None]) -> Any:
    """Await one: its result, or `Aborted(exception)`, noted in the log; cancelling still cancels."""
    (outcome,) = await gather([item], fanout=0, log=log, on_done=on_done)
    return outcome


def abandon(items: Iterable[Any]) -> None:
    """Let go of awaitables that will not be awaited: coroutines are closed, tasks cancelled."""
    for leaf in _leaves(items):
        if inspect.iscoroutine(leaf):
            leaf.close()
        elif callable(cancel := getattr(leaf, "cancel", None)):
            cancel()


async def _all_ended(
    futures: Iterable[asyncio.Future[Any]],
    passing: tuple[type[BaseException], ...],
    on_done: Callable[[BaseException | None], None],
) -> None:
    """Return when all have ended; raise at once what must not be kept in a batch."""
    import asyncio  # noqa: PLC0415 - importing stepguard must stay cheap

    waiting = set(futures)
    if not waiting:
        return
    ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    def note(future: asyncio.Future[Any]) -> None:
        waiting.discard(future)
        error = None if future.cancelled() else future.exception()  # asked for, or asyncio complains
        on_done(asyncio.CancelledError() if future.cancelled() else error)
        if ended.done():
            return
        if error is not None and (isinstance(error, passing) or not isinstance(error, Exception)):
            ended.set_result(error)
        elif not waiting:
            ended.set_result(None)

    for future in tuple(waiting):
        future.add_done_callback(note)
    error = await ended
    if error is not None:
        raise error


async def _cancel(futures: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel and see them end, so that nothing of this batch runs on."""
    import asyncio  # noqa: PLC0415 - importing stepguard must stay cheap

    left = [future for future in futures if not future.done()]
    for future in left:
        future.cancel()
    if left:
        await asyncio.wait(left)


def _failed(future: asyncio.Future[Any]) -> bool:
    return future.cancelled() or future.exception() is not None


def _outcome(future: asyncio.Future[Any]) -> Any:
    import asyncio  # noqa: PLC0415 - importing stepguard must stay cheap

    try:
        return future.result()
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the border of one trajectory
        return Aborted(error)


def _fanout_of(outcomes: Iterable[Any]) -> int:
    """The length of list that a failed one must have; 0 where the others are no lists."""
    lengths = {len(outcome) for outcome in outcomes if isinstance(outcome, list)}
    if not lengths:
        return 0
    return max(1, lengths.pop()) if len(lengths) == 1 else 1


def _rebuilt(shape: Iterable[Any], outcomes: dict[int, Any], fanout: int) -> list[Any]:
    out: list[Any] = []
    for item in shape:
        if isinstance(item, list | tuple):
            out.append(_rebuilt(item, outcomes, fanout))
            continue
        outcome = outcomes[id(item)]
        out.append([outcome] * fanout if fanout and isinstance(outcome, Aborted) else outcome)
    return out


def _leaves(items: Iterable[Any]) -> Iterable[Any]:
    for item in items:
        if isinstance(item, list | tuple):
            yield from _leaves(item)
        else:
            yield item


def _raised_at(error: BaseException) -> str:
    """File and line of the innermost frame."""
    trace = error.__traceback__
    if trace is None:
        return "an unknown place"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"  # noqa: PTH119 - a name, no path


def makes_coroutines(function: object) -> bool:
    """Whether calling it would only make a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
