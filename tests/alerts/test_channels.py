"""Every channel against a real peer on loopback: handed over, refused for good, to be tried again."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Literal

import pytest
import trustme

from alerts.http_peer import CHANNEL, TOKEN, HttpPeer, Reply, http_peer
from alerts.mail_peer import PASSWORD, USER, MailPeer, mail_peer, parted
from stepguardd.alerts.channels.contract import Broken, Channel, Later, Rejected
from stepguardd.alerts.channels.email import Email
from stepguardd.alerts.channels.slack import SlackBot, SlackWebhook
from stepguardd.alerts.channels.webhook import Webhook
from stepguardd.alerts.peers import Peers
from stepguardd.config.settings import EmailSettings
from stepguardd.core.alerts.book import Kind
from stepguardd.core.alerts.words import Message, Place, sample
from stepguardd.credentials import Secret

PATH = "/services/T0/B0/planted-hook-c41b77"
KEY = "planted-signing-key-90aa"
PNG = b"\x89PNG\r\n\x1a\n" + b"curve" * 10
MESSAGE = replace(
    sample(Place(run="night", option="--run-dir /run/night"), 1_790_000_000.0),
    number=1, thread=1, incident=7, kind=Kind.OPENED, picture=False,
)  # fmt: skip


@dataclass
class Rig:
    """A channel, and its peer's hands: what arrived, and what the next try meets."""

    channel: Channel
    arrived: Callable[[], list[str]]
    refuse: Callable[[], None]
    busy: Callable[[], None]
    broken: Callable[[], None]
    http: HttpPeer | None = None


async def curve() -> bytes | None:
    return PNG


def sent(channel: Channel, message: Message = MESSAGE, root: str | None = None) -> str | None:
    async def send_and_part() -> str | None:
        try:
            return await channel.send(message, root, curve)
        finally:
            if isinstance(channel, Email):
                await parted()

    return asyncio.run(send_and_part())


def peers(**more: Any) -> Peers:
    return Peers(internal_hosts=("127.0.0.1",), **{"timeout_s": 5.0} | more)


def hook(peer: HttpPeer) -> Secret:
    return Secret(peer.url + PATH)


def bot(peer: HttpPeer, token: str = TOKEN, **more: Any) -> SlackBot:
    return SlackBot(peers(**more), lambda: Secret(token), CHANNEL, f"{peer.url}/api")


@contextlib.contextmanager
def over_http(kind: str) -> Iterator[Rig]:
    refusals = {
        "slack-webhook": Reply(400, "invalid_blocks"),
        "slack-bot": Reply(200, '{"ok": false, "error": "invalid_blocks"}'),
        "webhook": Reply(422, "no such field"),
    }
    breaks = {
        "slack-webhook": Reply(404, "no_service"),
        "slack-bot": Reply(200, '{"ok": false, "error": "invalid_auth"}'),
        "webhook": Reply(401, "who are you"),
    }
    with http_peer() as peer:
        channels: dict[str, Channel] = {
            "slack-webhook": SlackWebhook(peers(), lambda: hook(peer)),
            "slack-bot": bot(peer),
            "webhook": Webhook(peers(), lambda: hook(peer), lambda: Secret(KEY), lambda: 1_790_000_001.0),
        }
        yield Rig(
            channel=channels[kind],
            arrived=lambda: [str(one.json.get("headline") or one.json["text"]) for one in peer.taken],
            refuse=lambda: peer.replies.append(refusals[kind]),
            busy=lambda: peer.replies.append(Reply(429, "slow down", {"Retry-After": "7"})),
            broken=lambda: peer.replies.append(breaks[kind]),
            http=peer,
        )


def mailer(peer: MailPeer, ca_file: Path | None, password: str = PASSWORD, **more: Any) -> Email:
    settings = EmailSettings.model_validate(
        {
            "host": "127.0.0.1",
            "port": peer.port,
            "security": peer.security,
            "user": USER,
            "password_secret": "unused",
            "sender": "stepguard@example.org",
            "to": ["oncall@example.org", "lead@example.org"],
        }
        | more
    )
    return Email(peers(ca_file=ca_file), settings, lambda: Secret(password), timeout_s=10.0)


@contextlib.contextmanager
def by_mail(security: Literal["starttls", "tls"], folder: Path) -> Iterator[Rig]:
    ca_file = folder / "ca.pem"
    with mail_peer(trustme.CA(), security, ca_file) as peer:
        yield Rig(
            channel=mailer(peer, ca_file),
            arrived=lambda: [str(mail["Subject"]) for mail in peer.mails],
            refuse=lambda: peer.replies.append("552 too large"),
            busy=lambda: peer.replies.append("451 greylisted, come again"),
            broken=lambda: peer.replies.append("530 log in first"),
        )


KINDS = ["slack-webhook", "slack-bot", "webhook", "email-starttls", "email-tls"]


@pytest.fixture(params=KINDS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    kind = request.param
    if kind == "email-starttls":
        with by_mail("starttls", tmp_path) as found:
            yield found
    elif kind == "email-tls":
        with by_mail("tls", tmp_path) as found:
            yield found
    else:
        with over_http(kind) as found:
            yield found


# ---- the contract --------------------------------------------------------------------------------------


def test_a_channel_hands_over_and_says_what_to_do_when_it_cannot(rig: Rig) -> None:
    sent(rig.channel)
    assert len(rig.arrived()) == 1
    assert MESSAGE.headline in rig.arrived()[0]

    rig.busy()
    with pytest.raises(Later):
        sent(rig.channel)
    rig.refuse()
    with pytest.raises(Rejected):
        sent(rig.channel)
    rig.broken()
    with pytest.raises(Broken):
        sent(rig.channel)
    assert len(rig.arrived()) == 1, "what failed did not arrive"

    sent(rig.channel)
    assert len(rig.arrived()) == 2, "after a failure it goes on"


@pytest.fixture(params=["slack-webhook", "slack-bot", "webhook"])
def web(request: pytest.FixtureRequest) -> Iterator[tuple[Channel, HttpPeer]]:
    with over_http(request.param) as found:
        assert found.http is not None
        yield found.channel, found.http


def test_the_peers_own_time_is_kept(web: tuple[Channel, HttpPeer]) -> None:
    channel, peer = web
    peer.replies.append(Reply(429, "", {"Retry-After": "7"}))
    with pytest.raises(Later) as caught:
        sent(channel)
    assert caught.value.after_s == 7.0
    peer.replies.append(Reply(500, "oops"))
    with pytest.raises(Later) as caught:
        sent(channel)
    assert caught.value.after_s is None
    assert len(peer.requests) == 2


def test_a_redirect_is_not_followed_and_takes_no_secret_along(web: tuple[Channel, HttpPeer]) -> None:
    channel, peer = web
    with http_peer() as elsewhere:
        peer.replies.append(Reply(307, "", {"Location": f"{elsewhere.url}/caught"}))
        with pytest.raises(Broken, match="redirects") as caught:
            sent(channel)
        assert elsewhere.requests == []
    assert len(peer.requests) == 1
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("kind", ["slack-webhook", "slack-bot", "webhook"])
def test_a_peer_that_hangs_is_left_in_time(kind: str) -> None:
    with http_peer() as peer:
        short = peers(timeout_s=0.3)
        channels: dict[str, Channel] = {
            "slack-webhook": SlackWebhook(short, lambda: hook(peer)),
            "slack-bot": bot(peer, timeout_s=0.3),
            "webhook": Webhook(short, lambda: hook(peer), None),
        }
        peer.always = Reply(hangs=True)
        with pytest.raises(Later, match="did not answer within"):
            sent(channels[kind])
        assert len(peer.requests) == 1


def test_a_peer_that_is_gone_is_tried_again() -> None:
    with http_peer() as peer:
        pass
    with pytest.raises(Later, match="cannot be reached"):
        sent(SlackWebhook(peers(), lambda: hook(peer)))


@pytest.mark.parametrize(
    "secret",
    [
        "planted-nonsense",
        "https://[planted",
        "https://host:planted/",
        "https://pla nted\x00/",
        "ftp://planted/x",
    ],
)
def test_an_address_that_is_none_is_named_without_being_shown(secret: str) -> None:
    with pytest.raises(Broken) as caught:
        sent(SlackWebhook(peers(), lambda: Secret(secret)))
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("token", ["xoxb-planted\r\nX-Evil: 1", "xoxb-plantéd"])
def test_a_token_that_is_no_token_is_named_without_being_shown(token: str) -> None:
    with http_peer() as peer:
        with pytest.raises(Broken) as caught:
            sent(bot(peer, token))
        assert "plant" not in str(caught.value)
        assert peer.requests == []


def test_nothing_goes_to_a_private_address_or_without_tls_unless_the_config_says_so() -> None:
    with http_peer() as peer:
        with pytest.raises(Broken, match="without TLS"):
            sent(SlackWebhook(Peers(), lambda: hook(peer)))
        private = peer.url.replace("http:", "https:")
        with pytest.raises(Broken, match="not public; add 127"):
            sent(SlackWebhook(Peers(), lambda: Secret(private + PATH)))
        assert peer.requests == []


# ---- each channel's own --------------------------------------------------------------------------------


def test_the_webhooks_signature_is_the_documented_one() -> None:
    with over_http("webhook") as found:
        sent(found.channel)
        assert found.http is not None
        (request,) = found.http.taken
    at, digest = re.fullmatch(  # type: ignore[union-attr]
        r"t=(\d+),v1=([0-9a-f]{64})", request.headers["Stepguard-Signature"]
    ).groups()
    assert digest == hmac.new(KEY.encode(), f"{at}.".encode() + request.body, hashlib.sha256).hexdigest()
    assert at == "1790000001"
    assert request.headers["Stepguard-Delivery"] == "night-1"
    assert request.json["incident"] == 7


def test_the_bot_keeps_a_thread_and_puts_the_curve_into_it() -> None:
    with http_peer() as peer:
        channel = bot(peer)
        root = sent(channel, replace(MESSAGE, picture=True))
        assert root in peer.threads
        assert sent(channel, replace(MESSAGE, number=2, kind=Kind.UPDATED), root) == root
        assert sent(channel, replace(MESSAGE, number=3, kind=Kind.RESOLVED, picture=True), root) == root
        posts = peer.called("/api/chat.postMessage")
        assert [post.json.get("thread_ts") for post in posts] == [None, root]
        assert [upload.body for upload in peer.called("/upload/F1?signed=1")] == [PNG, PNG]
        ends = peer.called("/api/files.completeUploadExternal")
        assert [end.json["thread_ts"] for end in ends] == [root, root]
        assert ends[0].json.get("initial_comment") is None
        assert MESSAGE.headline in ends[1].json["initial_comment"]
        uploads = [one for one in peer.requests if one.path.startswith("/upload")]
        assert all("Authorization" not in one.headers for one in uploads)


def test_a_picture_that_slack_does_not_take_costs_no_words() -> None:
    with http_peer() as peer:
        channel = bot(peer)
        root = sent(channel)
        peer.replies.append(Reply(200, '{"ok": false, "error": "missing_scope"}'))
        sent(channel, replace(MESSAGE, number=2, picture=True), root)
        posts = peer.called("/api/chat.postMessage")
        assert [post.json.get("thread_ts") for post in posts] == [None, root]


def test_an_upload_goes_to_slack_alone() -> None:
    with http_peer() as peer, http_peer() as elsewhere:
        trap = elsewhere.url.replace("127.0.0.1", "localhost")
        peer.replies += [
            Reply(200, '{"ok": true, "ts": "1.1"}'),
            Reply(200, f'{{"ok": true, "upload_url": "{trap}/u", "file_id": "F"}}'),
        ]
        assert sent(bot(peer), replace(MESSAGE, picture=True)) == "1.1"
        assert elsewhere.requests == []


def test_words_from_outside_call_nobody_in_slack() -> None:
    evil = replace(MESSAGE, headline="<!channel> *a* & <http://x|y> `b`")
    with over_http("slack-webhook") as found:
        sent(found.channel, evil)
        assert found.http is not None
        (request,) = found.http.taken
    assert b"<!channel>" not in request.body
    assert "&lt;!channel&gt;" in request.json["text"]


def test_a_mail_has_words_html_and_the_curve_and_keeps_its_thread(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    with mail_peer(trustme.CA(), "starttls", ca_file) as peer:
        channel = mailer(peer, ca_file)
        root = sent(channel, replace(MESSAGE, picture=True))
        sent(
            channel,
            replace(MESSAGE, number=2, kind=Kind.RESOLVED, headline="Over\r\nBcc: eve@example.org"),
            root,
        )
        first, second = peer.mails
    assert first["Message-ID"] == root
    assert second["References"] == second["In-Reply-To"] == root
    assert second["Bcc"] is None
    assert first["To"] == "oncall@example.org, lead@example.org"
    parts = {part.get_content_type(): part for part in first.walk()}
    assert parts["image/png"].get_content() == PNG
    assert parts["image/png"]["Content-ID"] == "<curve>"
    assert MESSAGE.headline in text_of(first, "plain")
    assert 'src="cid:curve"' in text_of(first, "html")


def text_of(mail: EmailMessage, kind: str) -> str:
    part = mail.get_body((kind,))
    assert part is not None
    return str(part.get_content())


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_mail_server_that_nobody_vouches_for_gets_neither_password_nor_mail(
    security: Literal["starttls", "tls"], tmp_path: Path
) -> None:
    with mail_peer(trustme.CA(), security, tmp_path / "ca.pem") as peer:
        with pytest.raises(Broken, match=r"certificate is not trusted.*alerts\.ca_file"):
            sent(mailer(peer, None))
        assert peer.tries == 0


def test_a_wrong_password_is_named_without_being_shown(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    with mail_peer(trustme.CA(), "starttls", ca_file) as peer:
        with pytest.raises(Broken, match=r"email\.password_secret") as caught:
            sent(mailer(peer, ca_file, "planted-wrong"))
        assert "planted" not in str(caught.value)
        assert peer.tries == 0
