"""
Bounded calls: a value or a typed failure, never a silent default and never an endless wait.

Promise: `bounded_call` returns within `timeout_s` plus a second of grace for the awaited thing to end once it
is cancelled. Cancelling the caller passes through, and cancels what was awaited.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

_GRACE_S: Final = 1.0
_ENDS_S: Final = 1.0


class CallFailure(StrEnum):
    """How a call failed."""

    TIMEOUT = "timeout"
    ERROR = "error"
    CANCELLED = "cancelled"


class Fate(StrEnum):
    """What became of an actor whose call failed, where `or_kill` asked for its end."""

    ENDED = "ended"  # the call ended once it was cancelled: the actor lives
    GONE = "gone"  # it was dead already
    KILLED = "killed"
    SPARED = "spared"  # too many calls failed at once: nothing is killed, the run is held
    LEFT = "left"  # it could not be killed


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
        fate: of the actor; None where nothing was to be killed, or the call failed for another reason.

    """

    kind: CallFailure
    exception: BaseException
    fate: Fate | None = None


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
    task.add_done_callback(take_note)
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


class ActorEnd(Protocol):
    """How an actor is ended whose call hangs."""

    def gone(self, error: BaseException) -> bool:
        """Whether a call failed because the actor is dead, not because of what it did."""

    async def ends_when_cancelled(self, call: object, wait_s: float = _ENDS_S) -> bool:
        """Cancel the call, and see for so long whether it ends by that."""

    async def kill(self) -> Fate:
        """End the actor; KILLED, or LEFT where that failed."""


def actor_end(doomed: Any) -> ActorEnd:
    """
    How to end what `or_kill` named.

    Raises:
        TypeError: it is neither the handle of a Ray actor nor a plain function.

    """
    if type(doomed).__module__.partition(".")[0] == "ray":
        from stepguard.integrations.ray import RayActorEnd  # noqa: PLC0415 - whoever has a handle has Ray

        return RayActorEnd(doomed)
    if callable(doomed) and not inspect.iscoroutinefunction(doomed):
        return _PlainEnd(doomed)
    raise TypeError(f"or_kill takes a Ray actor's handle or a plain function, not a {type(doomed).__name__}")


class _PlainEnd:
    """A function that ends whatever was called."""

    def __init__(self, end: Callable[[], object]) -> None:
        self._end = end

    def gone(self, error: BaseException) -> bool:
        del error
        return False

    async def ends_when_cancelled(self, call: object, wait_s: float = _ENDS_S) -> bool:
        """What it called was cancelled with the wait for it, and cannot be asked; the others catch up."""
        import asyncio  # noqa: PLC0415 - importing stepguard must stay cheap

        del call
        await asyncio.sleep(wait_s)
        return False

    async def kill(self) -> Fate:
        import logging  # noqa: PLC0415

        try:
            self._end()
        except Exception:  # the border of the caller's function: its failure is the answer
            logging.getLogger("stepguard").exception("or_kill failed")
            return Fate.LEFT
        return Fate.KILLED


def take_note(ended: asyncio.Future[T]) -> None:
    """An answer that comes too late has nobody to tell; asyncio must not complain that nobody asked."""
    if not ended.cancelled():
        ended.exception()
