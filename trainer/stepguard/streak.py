"""
The trainer's own requests: how many failed on their way, one after the other.

Promise: told while the rollouts still run, apart from the batch that they are of, so that a server whose
probes are all well and whose answers never come is found at once. Only failures of the way count (no
connection, no answer, 5xx); an exception of a reward function says nothing about a server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

TOLD_FROM: Final = 8
"""So many in a row are told of, and each doubling after that."""

_CAUSES_MAX: Final = 5
# By name: neither httpx, aiohttp, requests nor openai is imported here. Each is the root of its family.
_WAY: Final = frozenset(
    {
        "ConnectionError",
        "TimeoutError",
        "TransportError",
        "ClientError",
        "RequestException",
        "APIConnectionError",
        "HTTPStatusError",
        "APIStatusError",
    }
)


class RequestStreak:
    """
    Counts failures in a row.

    Args:
        tell: takes the number and the newest failure in words; 0 when one that was told of has ended.

    """

    def __init__(self, tell: Callable[[int, str], None]) -> None:
        self._tell = tell
        self._in_a_row = 0

    def ended(self, error: BaseException | None) -> None:
        """One trajectory ended, with this error or with none."""
        if error is None or answered(error):
            if self._in_a_row >= TOLD_FROM:
                self._tell(0, "")
            self._in_a_row = 0
        elif on_the_way(error):
            self._in_a_row += 1
            count = self._in_a_row
            if count >= TOLD_FROM and count & (count - 1) == 0:
                self._tell(count, f"{type(error).__name__}: {error}"[:200])


def on_the_way(error: BaseException) -> bool:
    """Whether a request got no answer that it could use."""
    return any(kind.__name__ in _WAY for one in _causes(error) for kind in type(one).__mro__)


def answered(error: BaseException) -> bool:
    """Whether the server did answer, and found fault with the request: a 4xx."""
    return any(400 <= status < 500 for one in _causes(error) if (status := _status(one)) is not None)


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(found) < _CAUSES_MAX and cause not in found:
        found.append(cause)
        cause = cause.__cause__
    return found


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error: in its response (httpx, requests), or its own (aiohttp, openai)."""
    response = getattr(error, "response", None)
    for holder, name in ((response, "status_code"), (error, "status_code"), (error, "status")):
        status = getattr(holder, name, None)
        if type(status) is int:
            return status
    return None
