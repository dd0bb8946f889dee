"""Messages outlive the daemon and an outage: in their order, each once, and once more only after a kill."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from alerts.http_peer import HttpPeer, Reply, http_peer
from alerts.sender import no_curve
from stepguardd.alerts.channels.webhook import Webhook
from stepguardd.alerts.delivery import MESSAGE_AGE_MAX_S, Delivery
from stepguardd.alerts.outbox import Outbox, Posting
from stepguardd.alerts.peers import Peers
from stepguardd.core.alerts.book import Book
from stepguardd.core.alerts.words import Message, Place, sample
from stepguardd.credentials import Secret
from stepguardd.failpoint import CRASH_AT
from stepguardd.journal import Journal

WALL = 1_790_000_000.0


def message(number: int, wall: float = WALL) -> Message:
    return replace(sample(Place(run="night", option=""), wall), number=number, thread=number, picture=False)


def posting(number: int, wall: float = WALL) -> Posting:
    return Posting(channel="webhook", message=message(number, wall))


def arrived(peer: HttpPeer) -> list[int]:
    return [request.json["id"] for request in peer.taken]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "journal.db"
    Journal(path, boot_id="boot").close()
    return path


class Hour:
    """A delivery under a clock of its own, to a peer that is real."""

    def __init__(self, outbox: Outbox, peer: HttpPeer) -> None:
        self.now = 0.0
        webhook = Webhook(Peers(internal_hosts=("127.0.0.1",)), lambda: Secret(f"{peer.url}/hook"), None)
        self.delivery = Delivery(
            webhook, outbox, no_curve,
            now=lambda: self.now, wall=lambda: WALL + self.now, jitter=lambda: 1.0,
        )  # fmt: skip

    async def until(self, end: float) -> None:
        """Let the delivery do what it would until then; it has a bound, since each try takes time here."""
        while self.now < end:
            wait_s = await self.delivery.step()
            self.now = end if wait_s is None else min(end, self.now + max(wait_s, 0.01))


def test_after_an_outage_of_an_hour_all_that_waited_arrives_in_order_within_a_minute(journal: Path) -> None:
    async def story(peer: HttpPeer) -> None:
        outbox = Outbox(journal)
        await outbox.open()
        hour = Hour(outbox, peer)
        peer.always = Reply(503, "gone to lunch")
        for number in range(1, 21):
            await outbox.save(Book(), [posting(number, WALL + hour.now)])
            await hour.until(number * 180.0)
        assert hour.now == 3600.0
        assert len(peer.requests) > 100, "it was tried all the while"
        assert hour.delivery.trouble == "the webhook is in trouble (503)"
        assert arrived(peer) == []
        peer.always = None
        await hour.until(3660.0)
        assert hour.delivery.trouble is None
        assert not outbox.queue("webhook")
        await outbox.close()

    with http_peer() as peer:
        asyncio.run(story(peer))
        assert arrived(peer) == list(range(1, 21))


def test_a_peer_that_asks_for_patience_is_left_alone_so_long(journal: Path) -> None:
    async def story(peer: HttpPeer) -> None:
        outbox = Outbox(journal)
        await outbox.open()
        await outbox.save(Book(), [posting(1)])
        hour = Hour(outbox, peer)
        peer.replies.append(Reply(429, "", {"Retry-After": "90"}))
        await hour.until(89.9)
        assert len(peer.requests) == 1
        await hour.until(91.0)
        await outbox.close()

    with http_peer() as peer:
        asyncio.run(story(peer))
        assert arrived(peer) == [1]


def test_a_message_that_is_refused_or_a_day_old_does_not_hold_up_the_next(journal: Path) -> None:
    async def story(peer: HttpPeer) -> None:
        outbox = Outbox(journal)
        await outbox.open()
        await outbox.save(Book(), [posting(1), posting(2, WALL - MESSAGE_AGE_MAX_S - 1), posting(3)])
        peer.replies += [Reply(422, "never"), Reply(500, "not now")]
        await Hour(outbox, peer).until(10.0)
        await outbox.close()

    with http_peer() as peer:
        asyncio.run(story(peer))
        assert arrived(peer) == [3]
        assert len(peer.requests) == 3


@pytest.mark.e2e
def test_a_kill_between_sending_and_record_sends_that_one_message_twice_at_most(journal: Path) -> None:
    async def queue_three() -> None:
        outbox = Outbox(journal)
        await outbox.open()
        await outbox.save(Book(), [posting(1), posting(2), posting(3)])
        await outbox.close()

    def sender(peer: HttpPeer, **environment: str) -> int:
        return subprocess.run(
            [sys.executable, "-m", "alerts.sender", str(journal), f"{peer.url}/hook"],
            cwd=Path(__file__).parents[1], env=os.environ | environment, timeout=60, check=False,
        ).returncode  # fmt: skip

    asyncio.run(queue_three())
    with http_peer() as peer:
        assert sender(peer, **{CRASH_AT: "alert_sent"}) == -signal.SIGKILL
        assert arrived(peer) == [1]
        assert sender(peer) == 0
        assert arrived(peer) == [1, 1, 2, 3]
        known = {request.headers["Stepguard-Delivery"] for request in peer.taken[:2]}
        assert known == {"night-1"}, "a receiver can tell that it is the same"
        assert sender(peer) == 0
        assert len(peer.taken) == 4, "what is recorded is not sent again"
