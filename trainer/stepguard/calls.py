"""
Bounded calls: a value or a typed failure, never a silent default and never an endless wait.

Promise: `bounded_call` returns within `timeout_s` plus a second of grace for the awaited thing to end once it
is cancelled. Cancelling the caller passes through, and cancels what was awaited.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

_GRACE_S: Final = 1.0


class CallFailure(StrEnum):
    """How a call failed."""

    TIMEOUT = "timeout"
    ERROR = "error"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class CallOk(Generic[T]):
    """The call's value."""

    value: T


@dataclass(frozen=True, slots=True)
class CallFailed:
    """
    The call failed.

    Args:
        kind: timeout, error, or cancelled by someone else than the caller.
        exception: what was raised.

    """

    kind: CallFailure
    exception: BaseException


async def bounded_call(
    awaitable: Awaitable[T], *, timeout_s: float, passing: tuple[type[BaseException], ...] = ()
) -> CallOk[T] | CallFailed:
    """
    Await for a bounded time.

    Args:
        awaitable: anything awaitable, a Ray object reference included.
        timeout_s: how long.
        passing: exceptions that are raised, not returned.

    """
    import asyncio  # noqa: PLC0415 - importing stepguard must stay cheap

    async def waited() -> T:
        return await awaitable

    task = asyncio.ensure_future(waited())
    task.add_done_callback(_take_note)
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not done:
            task.cancel()
            await asyncio.wait({task}, timeout=_GRACE_S)
            return CallFailed(CallFailure.TIMEOUT, TimeoutError(f"no answer within {timeout_s:g} s"))
    except asyncio.CancelledError:
        task.cancel()
        raise
    try:
        return CallOk(task.result())
    except passing:
        raise
    except asyncio.CancelledError as error:
        return CallFailed(CallFailure.CANCELLED, error)
    except Exception as error:  # noqa: BLE001 - the border of one call; the failure is the answer
        return CallFailed(CallFailure.ERROR, error)


def _take_note(ended: asyncio.Future[T]) -> None:
    """An answer that comes too late has nobody to tell; asyncio must not complain that nobody asked."""
    if not ended.cancelled():
        ended.exception()
