"""
From a decision to people: notices go into the book, messages out of it into the outbox, and each channel has
its own delivery, so that one that hangs holds up no other.

Nothing here may end the daemon: a bug in alerts is logged, told in `stepguard status`, and tried again.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Final

from .. import clock
from ..config import Config
from ..core.alerts import book as books
from ..core.alerts.book import Book, Notice, Route
from ..core.alerts.words import Message, write
from ..core.commands import Notify
from ..core.state import State
from ..credentials import Secret, read_secret
from . import setup
from .border import ANSWERS, Unforeseen, bordered
from .channels.contract import Channel
from .curve import Wanted, draw
from .delivery import Delivery, troubles
from .outbox import Outbox, Posting
from .peers import Answer, Peers
from .render import local_time

log = logging.getLogger("stepguardd")

NOTICES_MAX: Final = 1000
LOOK_S: Final = 5.0
AGAIN_S: Final = 10.0
CLOSE_S: Final = 3.0
STALE_LOOP_S: Final = 5.0


class Alerting:
    """
    The alerts of one run.

    Args:
        config: the whole configuration.
        state: the state as it is now.
        peers: the way out; what the config says by default.
        channels: whom to tell, and how soon; those that the config sets by default.
        stale_s: a decision loop that is silent for so long sends no ping.

    """

    def __init__(
        self,
        config: Config,
        state: Callable[[], State],
        *,
        peers: Peers | None = None,
        channels: Sequence[tuple[Channel, Route]] | None = None,
        stale_s: float = STALE_LOOP_S,
    ) -> None:
        self._config = config
        self._state = state
        self._policy = setup.policy(config)
        self._place = setup.place(config)
        self._peers = setup.peers(config) if peers is None else peers
        self._stale_s = stale_s
        pairs = setup.channels(config, self._peers) if channels is None else channels
        self._routes = tuple(route for _, route in pairs)
        self._outbox = Outbox(config.run.state_dir / "journal.db")
        self._deliveries = [Delivery(channel, self._outbox, self._draw) for channel, _ in pairs]
        self._notices: deque[Notice] = deque(maxlen=NOTICES_MAX)
        self._woken = asyncio.Event()
        self._opened = False
        self._pinged: str | None = None
        self._failure: str | None = None
        self._vouched = clock.monotonic()
        self._drawn: tuple[tuple[int, int], bytes | None] | None = None

    def tell(self, notify: Notify, *, at: float, wall: float) -> None:
        """Take in one notice; returns at once."""
        if self._routes:
            self._notices.append(Notice(at=at, wall=wall, notify=notify))
            self._woken.set()

    def vouch(self) -> None:
        """The decision loop turns: without this word no ping goes out."""
        self._vouched = clock.monotonic()

    def warnings(self) -> list[str]:
        """What a person should know: channels that do not work."""
        found = troubles(self._deliveries)
        found += [f"alerts: {one}" for one in (self._failure, self._pinged) if one is not None]
        return found

    def work(self) -> list[Coroutine[None, None, None]]:
        """Everything that runs for as long as the daemon does."""
        work = []
        if self._routes:
            work.append(self._lasting("the book", self._keep_telling))
            work += [self._lasting(one.name, one.run) for one in self._deliveries]
        if self._config.alerts.dead_man_secret is not None:
            work.append(self._lasting("the dead man's ping", self._keep_pinging))
        return work

    async def close(self) -> None:
        """Write down what was noticed last, so that the next daemon sends it."""
        if self._opened:
            try:
                async with asyncio.timeout(CLOSE_S):
                    await self._tell_once()
                    await self._outbox.close()
            except TimeoutError:
                log.warning("the alerts' outbox did not close in time")

    async def _lasting(self, what: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        while True:
            try:
                await bordered(work())
            except Unforeseen as fault:
                self._failure = f"{what} failed ({fault}), trying again"
                log.error("alerts: %s", self._failure)
            await asyncio.sleep(AGAIN_S)

    # ---- the book ------------------------------------------------------------------------------------

    async def _keep_telling(self) -> None:
        if not self._opened:
            unseen = await self._outbox.open()
            incident = self._state().incident
            self._outbox.book = books.resumed(
                self._outbox.book,
                self._policy,
                self._routes,
                at=clock.monotonic(),
                wall=clock.wall(),
                boot=clock.boot_id(),
                open_incident=None if incident is None else incident.number,
            )
            fresh = {(notice.wall, notice.notify) for notice in self._notices}
            self._notices.extendleft(
                notice for notice in reversed(unseen) if (notice.wall, notice.notify) not in fresh
            )
            self._opened = True
            self._wake()
        while True:
            self._woken.clear()
            await self._tell_once()
            self._failure = None
            await self._until_next()

    async def _until_next(self) -> None:
        due = books.next_at(self._outbox.book)
        wait_s = LOOK_S if due is None else min(LOOK_S, max(0.05, due - clock.monotonic()))
        try:
            async with asyncio.timeout(wait_s):
                await self._woken.wait()
        except TimeoutError:
            return

    async def _tell_once(self) -> None:
        before = book = self._outbox.book
        postings: list[Posting] = []
        while self._notices:
            book = books.take(book, self._policy, self._routes, self._notices.popleft())
            book, more = self._due(book)
            postings += more
        book, more = self._due(book)
        postings += more
        if postings or book.last_wall != before.last_wall or book.cases != before.cases:
            await self._outbox.save(book, postings)
            self._wake()

    def _due(self, book: Book) -> tuple[Book, list[Posting]]:
        wall = clock.wall()
        here = local_time(wall)
        minute = 60 * here.hour + here.minute
        book, sendings = books.due(book, self._policy, self._routes, clock.monotonic(), minute)
        return book, [Posting(channel=one.route, message=write(one, self._place, wall)) for one in sendings]

    def _wake(self) -> None:
        for delivery in self._deliveries:
            delivery.woken.set()

    # ---- the picture ---------------------------------------------------------------------------------

    async def _draw(self, message: Message) -> bytes | None:
        """The curve of a message; the same for every channel and every try."""
        key = (message.thread, message.number if message.kind is books.Kind.RESOLVED else 0)
        if self._drawn is not None and self._drawn[0] == key and self._drawn[1] is not None:
            return self._drawn[1]
        wanted = Wanted(
            journal=self._config.run.state_dir / "journal.db",
            title=f"The reward of {message.run}",
            onset_step=message.onset_step,
            opened_wall=message.opened_wall,
        )
        self._drawn = key, await draw(wanted, cache=self._config.run.state_dir / "fonts")
        return self._drawn[1]

    # ---- the ping ------------------------------------------------------------------------------------

    async def _keep_pinging(self) -> None:
        source = self._config.alerts.dead_man_secret
        assert source is not None
        while True:
            if clock.monotonic() - self._vouched < self._stale_s:
                await self._ping(partial(read_secret, "alerts.dead_man_secret", source))
            await asyncio.sleep(self._config.alerts.dead_man_interval_s)

    async def _asked(self, secret: Callable[[], Secret]) -> Answer:
        return await self._peers.request("GET", secret().reveal(), headers={"User-Agent": "stepguard"})

    async def _ping(self, secret: Callable[[], Secret]) -> None:
        trouble = None
        try:
            answer = await bordered(self._asked(secret), ANSWERS)
            if not 200 <= answer.status < 300:
                trouble = f"the dead man's address answers {answer.status}; check alerts.dead_man_secret"
        except ANSWERS as error:
            trouble = f"no ping: {error}"
        except Unforeseen as fault:
            trouble = f"no ping: it failed ({fault})"
        if trouble is not None and trouble != self._pinged:
            log.warning("%s", trouble)
        self._pinged = trouble
