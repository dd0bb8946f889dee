"""
The fuse of killing calls: one hung actor is an actor's fault, many at once are not.

Promise: pure. It counts the calls whose actor may be killed, and says when so many of those of one time hung
that ending their actors would be the wrong remedy: a dead network, a full disk, a sandbox service that is
down. Then nothing is killed, and the run is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

AT_ONCE_S: Final = 30.0
"""How far apart calls may fail and still have failed at once."""

LEAST: Final = 3
"""So few failures are never a mass, whatever their share: a run may have four actors."""

SHARE_MAX: Final = 0.5
"""A larger share is always a mass, whatever the settings say."""

_ENDED_MAX: Final = 4_096


@dataclass(frozen=True, slots=True)
class Blown:
    """So many of so many calls of one time hung."""

    failed: int
    calls: int


class CallFuse:
    """Counts calls. Times are seconds of one monotonic clock; calls are made on one event loop."""

    def __init__(self) -> None:
        self._numbers = 0
        self._running: dict[int, float] = {}
        self._ended: list[tuple[float, float, bool]] = []  # began, ended, hung

    def begun(self, now_s: float) -> int:
        """A call begins; its number is for `ended`."""
        self._numbers += 1
        self._running[self._numbers] = now_s
        return self._numbers

    def ended(self, number: int, now_s: float, *, hung: bool) -> None:
        """It ended, or its time was over."""
        began_s = self._running.pop(number)
        self._ended = self._ended[1 - _ENDED_MAX :]
        self._ended.append((began_s, now_s, hung))

    def blown(self, share: float, now_s: float) -> Blown | None:
        """
        Whether too many hung at once.

        Args:
            share: of the calls that ran at the time of the hung ones, so many may hang (0 to 1).
            now_s: now.

        """
        since_s = now_s - AT_ONCE_S
        hung = [began for began, ended, failed in self._ended if failed and ended >= since_s]
        if len(hung) < LEAST:
            return None
        beside = sum(ended >= min(hung) for _, ended, _ in self._ended) + len(self._running)
        return Blown(len(hung), beside) if len(hung) > min(share, SHARE_MAX) * beside else None
