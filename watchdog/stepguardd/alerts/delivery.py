"""
One channel's way out: the oldest message first, again and again until it is taken.

At least once: sent, then recorded. A message that is not taken now waits (1 s, doubling to 30 s, or as long
as the peer asks) and holds those behind it, so that all arrive in their order; a channel whose setup is wrong
is tried every few minutes, since a person may mend it at any time.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from random import random
from typing import Final

from .. import clock
from ..core.alerts.words import Message, cut
from ..credentials import CredentialError
from ..failpoint import failpoint
from .border import Unforeseen, hand_over
from .channels.contract import Broken, Channel, Later, Rejected
from .outbox import Outbox, Posting

log = logging.getLogger("stepguardd")

SEND_TIMEOUT_S: Final = 120.0
FIRST_WAIT_S: Final = 1.0
LONGEST_WAIT_S: Final = 30.0
BROKEN_WAIT_S: Final = 120.0
STUMBLES_MAX: Final = 20  # about nine minutes
MESSAGE_AGE_MAX_S: Final = 24 * 3600.0


class Delivery:
    """
    Hands the messages of one channel over.

    Args:
        channel: where to.
        outbox: where from.
        draw: the curve that belongs to a message.
        now: the monotonic clock.
        jitter: a number from 0 to 1, so that many daemons do not come back at once.

    """

    def __init__(
        self,
        channel: Channel,
        outbox: Outbox,
        draw: Callable[[Message], Awaitable[bytes | None]],
        *,
        now: Callable[[], float] = clock.monotonic,
        wall: Callable[[], float] = clock.wall,
        jitter: Callable[[], float] = random,
    ) -> None:
        self.name = channel.name
        self.trouble: str | None = None
        self.woken = asyncio.Event()
        self._channel = channel
        self._outbox = outbox
        self._draw = draw
        self._now = now
        self._wall = wall
        self._jitter = jitter
        self._not_before = 0.0
        self._failures = 0
        self._stumbles = 0

    async def run(self) -> None:
        """Hand over whatever comes, for as long as the daemon lives."""
        while True:
            self.woken.clear()
            wait_s = await self.step()
            if wait_s is None:
                await self.woken.wait()
            elif wait_s > 0:
                await asyncio.sleep(wait_s)

    async def step(self) -> float | None:
        """
        Try the oldest message once, if it may be tried now.

        Returns:
            Seconds until the next try; 0 when there may be more at once, None when nothing waits.

        """
        queue = self._outbox.queue(self.name)
        if not queue:
            return None
        left_s = self._not_before - self._now()
        if left_s > 0:
            return left_s
        posting = queue[0]
        message = posting.message
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                root = self._outbox.root(self.name, message.thread)
                receipt = await hand_over(self._channel, message, root, lambda: self._draw(message))
        except (Later, TimeoutError) as error:
            after_s = error.after_s if isinstance(error, Later) else None
            return await self._wait(posting, str(error) or "no answer in time", self._backoff_s(after_s))
        except (Broken, CredentialError) as error:
            return await self._wait(posting, str(error), BROKEN_WAIT_S)
        except Rejected as error:
            log.error("alert %d is lost on %s: %s", message.number, self.name, error)
            self.trouble = str(error)
            await self._outbox.dropped(posting, str(error))
            return 0.0
        except Unforeseen as fault:
            return await self._stumbled(posting, f"failed ({fault})")
        failpoint("alert_sent")
        if self.trouble is not None:
            log.info("%s takes alerts again", self.name)
        self.trouble, self._failures, self._not_before, self._stumbles = None, 0, 0.0, 0
        await self._outbox.sent(posting, receipt, self._wall())
        return 0.0

    async def _stumbled(self, posting: Posting, why: str) -> float:
        """A bug: it may pass, as where memory was short; it must not hold up the next for a day."""
        self._stumbles += 1
        if self._stumbles < STUMBLES_MAX:
            return await self._wait(posting, why, self._backoff_s(None))
        number = posting.message.number
        log.error("alert %d is lost on %s after %d tries: %s", number, self.name, STUMBLES_MAX, why)
        self.trouble, self._stumbles = why, 0
        await self._outbox.dropped(posting, why)
        return 0.0

    def _backoff_s(self, after_s: float | None) -> float:
        self._failures += 1
        doubled = FIRST_WAIT_S * 2.0 ** min(self._failures - 1, 10)
        wait_s = min(doubled, LONGEST_WAIT_S) * (1.0 + 0.2 * self._jitter())
        return wait_s if after_s is None else max(after_s, FIRST_WAIT_S)

    async def _wait(self, posting: Posting, why: str, wait_s: float) -> float:
        why = cut(why)
        if why != self.trouble:
            log.warning("%s does not take alerts: %s", self.name, why)
        self.trouble = why
        if self._wall() - posting.message.wall > MESSAGE_AGE_MAX_S:
            log.error("alert %d is lost on %s after a day: %s", posting.message.number, self.name, why)
            await self._outbox.dropped(posting, why)
            return 0.0
        self._not_before = self._now() + wait_s
        return wait_s


def troubles(deliveries: Sequence[Delivery]) -> list[str]:
    """What a person should know of the channels, for `stepguard status`."""
    return [f"alerts: {one.name}: {one.trouble}" for one in deliveries if one.trouble is not None]
