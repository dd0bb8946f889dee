"""
The daemon's verdict on a batch: asked for, waited for, and done without where no daemon lives.

Promise: while a daemon's lease lives the wait lasts until it has judged; the report is repeated, so a full
socket or a restarted daemon costs a second, not the run. A daemon that lives and cannot be reached is done
without after five.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from stepguard.link import Link, OnceLog
from stepguard.obedience import REPEAT_S, SHARED_POLL_S, Obedience, Waits
from stepguard.orders import CarryOut, Stop
from stepguard.presence import Presence
from stepguard.ranks import Ranks
from stepguard.reports import Batch

_POLL_FIRST_S: Final = 0.0002
_POLL_LAST_S: Final = 0.05
_UNDELIVERED_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The verdict: the daemon's reason for a refusal, or None for yes, or for nobody there to ask."""

    refused: str | None


Look = Answer | Literal["pending", "order first"]


@dataclass(slots=True, kw_only=True)
class Jury:
    """
    Asks the daemon about one batch.

    Args:
        report: the batch.
        link: where it is sent.
        presence: where the wait is shown.
        ranks: this process among its peers.
        obedience: looks at the page, and does what is ordered meanwhile.
        clock_ns: CLOCK_MONOTONIC.
        sleep: for rank 0's polling while the other ranks wait in a collective.
        log: for what is said once.

    """

    report: Batch
    link: Link
    presence: Presence
    ranks: Ranks
    obedience: Obedience
    clock_ns: Callable[[], int]
    sleep: Callable[[float], None]
    log: OnceLog
    _since_ns: int = field(init=False, default=0)
    _repeat_ns: int = field(init=False, default=0)
    _delivered: bool = field(init=False, default=False)

    def verdict(self) -> Waits[Answer]:
        """Send the batch and wait for the verdict; what is ordered meanwhile is obeyed first."""
        self._since_ns = self.clock_ns()
        late_ns = self._repeat_ns = self._since_ns + int(self.obedience.settings.verdict_timeout_s * 1e9)
        self._delivered = self.ranks.first and self.link.send(self.report)
        pause_s = _POLL_FIRST_S
        late = False
        try:
            while True:
                look = self.ranks.share(self._look_for_all() if self.ranks.together else self._look())
                if isinstance(look, Answer):
                    return look
                if look == "order first":
                    yield from self.obedience.orders(collective=True)
                    continue
                if not late and self.clock_ns() >= late_ns:
                    late = True
                    self.presence.wait()
                if not self.ranks.together:
                    yield pause_s
                    pause_s = min(pause_s * 1.5, _POLL_LAST_S)
        finally:
            if late:
                self.presence.wait_over()

    def _look(self) -> Look:
        """One look at the page."""
        act = self.obedience.next_act()
        if isinstance(act, CarryOut | Stop):
            return "order first"
        half, now_ns = self.obedience.seen, self.clock_ns()
        if half is not None and half.judged_batch >= self.report["batch"]:
            return Answer(None if half.judged_ok else half.reason or "refused")
        if half is None or act.lost:
            return Answer(None)
        if now_ns >= self._repeat_ns:
            self._repeat_ns = now_ns + int(REPEAT_S * 1e9)
            self._delivered = self.link.send(self.report) or self._delivered
        waited_s = (now_ns - self._since_ns) / 1e9
        lost_means = self.obedience.settings.on_daemon_lost
        if not self._delivered and waited_s >= _UNDELIVERED_S and lost_means == "continue":
            self.log.once(
                "undelivered", "the daemon lives and takes no reports; batches are judged without it"
            )
            return Answer(None)
        return "pending"

    def _look_for_all(self) -> Look:
        """Rank 0 polls for up to a second, so that the others need not be told each time."""
        if not self.ranks.first:
            return "pending"
        until_ns = self.clock_ns() + int(SHARED_POLL_S * 1e9)
        pause_s = _POLL_FIRST_S
        look = self._look()
        while look == "pending" and self.clock_ns() < until_ns:
            self.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_LAST_S)
            look = self._look()
        return look
