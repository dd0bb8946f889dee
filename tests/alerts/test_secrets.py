"""A bug in a channel, with the secret in its words: no log, row, trace or status shows it."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alerts.http_peer import http_peer
from alerts.sender import no_curve
from alerts.test_channels import MESSAGE, curve, peers
from alerts.test_outbox import WALL, Hour, arrived, posting
from alerts.test_ways_out import alerts, at_work, hidden, met
from stepguardd import clock
from stepguardd.alerts.border import Unforeseen, hand_over
from stepguardd.alerts.channels.apprise_urls import Apprise
from stepguardd.alerts.channels.contract import Broken, Channel, Draw
from stepguardd.alerts.channels.email import Email
from stepguardd.alerts.channels.slack import SlackBot, SlackWebhook
from stepguardd.alerts.channels.webhook import Webhook
from stepguardd.alerts.delivery import STUMBLES_MAX, Delivery
from stepguardd.alerts.outbox import Outbox
from stepguardd.alerts.peers import Answer, Peers
from stepguardd.config.settings import EmailSettings
from stepguardd.core.alerts.book import Book, Route
from stepguardd.core.alerts.words import Message
from stepguardd.core.commands import Notify
from stepguardd.core.state import Reason
from stepguardd.credentials import Secret
from stepguardd.journal import Journal

PLANTED = "planted-in-a-trace-6b1f"
MAIL = EmailSettings.model_validate(
    {
        "host": "127.0.0.1",
        "user": "stepguard",
        "password_secret": "unused",
        "sender": "stepguard@example.org",
        "to": ["oncall@example.org"],
    }
)


class BugError(RuntimeError):
    """What no channel foresees."""


class Leaking(Secret):
    """A secret whose use fails in a library that repeats it."""

    def reveal(self) -> str:
        raise BugError(f"cannot use {super().reveal()}") from ValueError(super().reveal())


class LeakingPeers(Peers):
    """A way out that fails with all that it was given."""

    def __init__(self) -> None:
        super().__init__(internal_hosts=("127.0.0.1",))
        self.asked = 0

    async def request(self, method: str, url: str, **given: Any) -> Answer:
        self.asked += 1
        raise BugError(f"{method} {url} {given}")


def channels(out: Peers, secret: Callable[[], Secret]) -> list[Channel]:
    return [
        SlackWebhook(out, secret),
        SlackBot(out, secret, "C1", f"http://127.0.0.1/{PLANTED}"),
        Webhook(out, secret, secret),
        Email(peers(), MAIL, secret),
        Apprise(secret),
    ]


def plain() -> Secret:
    return Secret(f"http://127.0.0.1/{PLANTED}")


def leaking() -> Secret:
    return Leaking(f"http://127.0.0.1/{PLANTED}")


CASES = [(kind, "its secret") for kind in range(5)] + [(kind, "its peer") for kind in range(3)]


@pytest.mark.parametrize(("kind", "fails_at"), CASES)
def test_a_bug_in_a_channel_is_told_by_its_type_and_place_alone(kind: int, fails_at: str) -> None:
    broken = channels(LeakingPeers(), plain if fails_at == "its peer" else leaking)[kind]
    with pytest.raises(BugError, match=PLANTED):
        asyncio.run(broken.send(MESSAGE, None, curve))
    with pytest.raises(Unforeseen, match=r"BugError at .*test_secrets\.py:\d+") as caught:
        asyncio.run(hand_over(broken, MESSAGE, None, curve))
    assert caught.value.__context__ is None, "not even a debugger that follows contexts finds it"
    assert PLANTED not in "".join(traceback.format_exception(caught.value))


@pytest.mark.e2e
def test_a_daemons_alerts_full_of_bugs_show_no_secret_and_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="")
    out = LeakingPeers()
    named: list[tuple[Channel, Route]] = []
    for number, channel in enumerate(channels(out, leaking)):
        channel.name = f"{channel.name}-{number}"
        named.append((channel, Route(name=channel.name, wait_s=0.0)))
    strays: list[str] = []

    async def live() -> list[str]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: strays.append(str(context)))
        table = {
            "dead_man_secret": hidden(tmp_path, f"http://127.0.0.1/{PLANTED}"),
            "dead_man_interval_s": 0.05,
        }
        voice = alerts(tmp_path, peers=out, channels=named, alerts=table)
        async with at_work(voice):
            voice.vouch()
            notify = Notify(
                incident=1, what="call", reason=Reason.START_FAILED.value, text="a person is needed"
            )
            voice.tell(notify, at=clock.monotonic(), wall=clock.wall())
            await met(lambda: len(voice.warnings()) > len(named))
            return voice.warnings()

    warnings = asyncio.run(live())
    for channel, _ in named:
        assert any(f"{channel.name}: failed (BugError at" in one for one in warnings), warnings
    assert any("no ping: it failed (BugError at" in one for one in warnings), warnings
    assert out.asked
    assert strays == []
    traces = "".join(record.exc_text or "" for record in caplog.records)
    shown = {"log": caplog.text + traces, "status": str(warnings)}
    shown |= {path.name: path.read_bytes().decode("latin-1") for path in (tmp_path / "state").iterdir()}
    assert "journal.db" in shown
    assert "BugError" in shown["log"]
    assert [place for place, text in shown.items() if PLANTED in text] == []


@pytest.mark.parametrize("address", ["https://127.0.0.1:1\x7f/", "https://[v1.x]/", "https://a..b/"])
def test_an_address_that_no_library_can_read_is_the_channels_fault_to_tell(address: str) -> None:
    with pytest.raises(Broken):
        asyncio.run(SlackWebhook(peers(), lambda: Secret(f"{address}{PLANTED}")).send(MESSAGE, None, curve))


class OneThatItCannotSay:
    """A webhook with a bug that one message brings out."""

    name = "webhook"

    def __init__(self, well: Webhook) -> None:
        self._well = well

    async def send(self, message: Message, root: str | None, draw: Draw) -> str | None:
        if message.number == 1:
            raise BugError(PLANTED)
        return await self._well.send(message, root, draw)


def test_a_message_that_brings_out_a_bug_holds_up_the_next_for_minutes_not_for_a_day(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    Journal(path, boot_id="boot").close()

    async def story() -> None:
        outbox = Outbox(path)
        await outbox.open()
        await outbox.save(Book(), [posting(1), posting(2)])
        hour = Hour(outbox, peer)
        channel = OneThatItCannotSay(Webhook(peers(), lambda: Secret(f"{peer.url}/hook"), None))

        hour.delivery = Delivery(
            channel, outbox, no_curve,
            now=lambda: hour.now, wall=lambda: WALL + hour.now, jitter=lambda: 1.0,
        )  # fmt: skip
        await hour.until(60.0)
        assert arrived(peer) == [], "it is tried again first: the trouble may pass"
        assert "failed (BugError at" in str(hour.delivery.trouble)
        await hour.until(36.0 * STUMBLES_MAX)
        await outbox.close()

    with http_peer() as peer:
        asyncio.run(story())
        assert arrived(peer) == [2]
