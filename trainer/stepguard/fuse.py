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
"""So few failures are never a mass, whatever their share: a run may have four actors.

Nor are the many calls that waited at fewer actors than this, while another actor's calls did not hang.
"""

SHARE_MAX: Final = 0.5
"""A larger share is always a mass, whatever the settings say."""

_ENDED_MAX: Final = 4_096


@dataclass(frozen=True, slots=True)
class Blown:
    """So many of so many calls of one time hung."""

    failed: int
    calls: int


@dataclass(frozen=True, slots=True)
class _Call:
    began_s: float
    actor: int


class CallFuse:
    """Counts calls. Times are seconds of one monotonic clock; calls are made on one event loop."""

    def __init__(self) -> None:
        self._numbers = 0
        self._running: dict[int, _Call] = {}
        self._ended: list[tuple[_Call, float, bool]] = []  # the call, when it ended, whether it hung

    def begun(self, now_s: float, actor: int) -> int:
        """
        A call begins.

        Args:
            now_s: now.
            actor: what tells its actor from others; no reference, which would keep the actor alive.

        Returns:
            Its number, for `ended`.

        """
        self._numbers += 1
        self._running[self._numbers] = _Call(now_s, actor)
        return self._numbers

    def ended(self, number: int, now_s: float, *, hung: bool) -> None:
        """It ended, or its time was over."""
        call = self._running.pop(number)
        self._ended = self._ended[1 - _ENDED_MAX :]
        self._ended.append((call, now_s, hung))

    def blown(self, share: float, now_s: float) -> Blown | None:
        """
        Whether too many hung at once.

        Args:
            share: of the calls that ran at the time of the hung ones, so many may hang (0 to 1).
            now_s: now.

        """
        since_s = now_s - AT_ONCE_S
        hung = [call for call, ended_s, failed in self._ended if failed and ended_s >= since_s]
        if len(hung) < LEAST:
            return None
        first_s = min(call.began_s for call in hung)
        beside = [call for call, ended_s, _ in self._ended if ended_s >= first_s]
        beside += self._running.values()
        actors = {call.actor for call in hung}
        if len(actors) < LEAST and actors != {call.actor for call in beside}:
            return None
        return Blown(len(hung), len(beside)) if len(hung) > min(share, SHARE_MAX) * len(beside) else None
