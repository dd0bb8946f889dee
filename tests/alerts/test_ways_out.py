"""The rarer ways out, each to a real peer: Apprise, a proxy, the dead man's ping."""

from __future__ import annotations

import asyncio
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from alerts.http_peer import HttpPeer, Reply, http_peer
from alerts.test_channels import MESSAGE, curve, sent
from daemon_parts.test_daemon import config_file
from stepguardd import clock
from stepguardd.alerts.alerting import STALE_LOOP_S, Alerting
from stepguardd.alerts.channels.apprise_urls import Apprise
from stepguardd.alerts.channels.contract import Broken, Channel, Later
from stepguardd.alerts.channels.webhook import Webhook
from stepguardd.alerts.peers import Answer, Peers
from stepguardd.config import load_config
from stepguardd.core.alerts.book import Route
from stepguardd.credentials import Secret
from stepguardd.journal import Journal
from stepguardd.testing import World

pytestmark = pytest.mark.e2e
PLANTED = "planted-way-out-51d0"


# ---- Apprise ---------------------------------------------------------------------------------------


def over_apprise(*urls: str) -> Apprise:
    return Apprise(lambda: Secret("\n".join(urls)))


def test_apprise_hands_over_to_each_of_its_addresses() -> None:
    with http_peer() as first, http_peer() as second:
        urls = [f"{peer.url.replace('http', 'json')}/{PLANTED}" for peer in (first, second)]
        assert sent(over_apprise(*urls)) is None
        for peer in (first, second):
            (request,) = peer.taken
            assert request.path == f"/{PLANTED}"
            assert request.json["title"] == MESSAGE.headline
            assert MESSAGE.lead in request.json["message"]


def test_a_service_behind_apprise_that_fails_is_tried_again_and_its_address_not_shown() -> None:
    with http_peer() as peer:
        peer.always = Reply(500, "no")
        with pytest.raises(Later, match="did not take the message") as caught:
            sent(over_apprise(f"{peer.url.replace('http', 'json')}/{PLANTED}"))
        assert peer.requests
    assert PLANTED not in str(caught.value)


def test_an_address_that_apprise_cannot_read_is_a_persons_to_mend() -> None:
    with pytest.raises(Broken, match=r"apprise\.urls_secret") as caught:
        sent(over_apprise(f"no-such-service://{PLANTED}"))
    assert PLANTED not in str(caught.value)


# ---- a proxy ---------------------------------------------------------------------------------------


@asynccontextmanager
async def tls_peer_behind_a_proxy(
    ca: trustme.CA, name: str
) -> AsyncIterator[tuple[str, list[bytes], list[bytes]]]:
    """A proxy's address, the lines that it was asked with, and what arrived at the peer behind it."""
    asked: list[bytes] = []
    arrived: list[bytes] = []
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(name).configure_cert(context)

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        arrived.append(await reader.readexactly(length))
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0])
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

        async def pump(source: asyncio.StreamReader, drain: asyncio.StreamWriter) -> None:
            while raw := await source.read(65536):
                drain.write(raw)
            drain.close()

        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer), return_exceptions=True)

    peer = await asyncio.start_server(take, "127.0.0.1", 0, ssl=context)
    port = peer.sockets[0].getsockname()[1]
    proxy = await asyncio.start_server(tunnel, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}", asked, arrived
    finally:
        proxy.close()
        peer.close()
        await asyncio.sleep(0.05)  # the tunnel's ends notice


def test_through_the_configs_proxy_a_name_that_only_the_proxy_knows_is_reached_by_tls(tmp_path: Path) -> None:
    ca, ca_file = trustme.CA(), tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(ca_file)

    async def send() -> tuple[list[bytes], list[bytes]]:
        async with tls_peer_behind_a_proxy(ca, "hooks.invalid") as (proxy, asked, arrived):
            out = Peers(proxy=proxy, ca_file=ca_file, timeout_s=20)
            await Webhook(out, lambda: Secret(f"https://hooks.invalid/{PLANTED}"), None).send(
                MESSAGE, None, curve
            )
        return asked, arrived

    asked, arrived = asyncio.run(send())
    assert asked == [b"CONNECT hooks.invalid:443 HTTP/1.1"]
    assert len(arrived) == 1, "the words are inside of the tunnel, where the proxy reads none"


def test_no_proxy_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with http_peer() as peer:
        sent(Webhook(Peers(internal_hosts=("127.0.0.1",)), lambda: Secret(f"{peer.url}/x"), None))
        assert len(peer.taken) == 1


# ---- the whole of it, without a run ----------------------------------------------------------------


def alerts(
    root: Path,
    *,
    peers: Peers | None = None,
    channels: Sequence[tuple[Channel, Route]] | None = None,
    stale_s: float = STALE_LOOP_S,
    **tables: dict[str, Any],
) -> Alerting:
    """The alerts of a run in this folder, with a journal beside them."""
    path = config_file(root)
    with path.open("a") as config:
        for table, values in tables.items():
            config.write(f"[{table}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items()))
    config_of_it = load_config(path)
    config_of_it.run.state_dir.mkdir(parents=True)
    Journal(config_of_it.run.state_dir / "journal.db", boot_id="boot").close()
    world = World()
    return Alerting(config_of_it, lambda: world.state, peers=peers, channels=channels, stale_s=stale_s)


def hidden(root: Path, value: str) -> str:
    path = root / "secret"
    path.touch(mode=0o600)
    path.write_text(value)
    return f'"{path}"'


@asynccontextmanager
async def at_work(voice: Alerting) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(one) for one in voice.work()]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await voice.close()


async def met(condition: Callable[[], bool]) -> None:
    """Wait for it, as long as the test may run."""
    while True:
        if condition():
            return
        await asyncio.sleep(0.01)


def pings(peer: HttpPeer) -> int:
    return sum(one.path == f"/{PLANTED}" for one in peer.requests)


def test_the_dead_mans_ping_arrives_and_a_refused_one_is_told_without_its_address(tmp_path: Path) -> None:
    async def live() -> None:
        with http_peer() as peer:
            table = {
                "internal_hosts": '["127.0.0.1"]',
                "dead_man_secret": hidden(tmp_path, f"{peer.url}/{PLANTED}"),
                "dead_man_interval_s": 0.05,
            }
            voice = alerts(tmp_path, alerts=table)
            async with at_work(voice):
                while pings(peer) < 2:
                    voice.vouch()
                    await asyncio.sleep(0.02)
                assert voice.warnings() == []
                peer.always = Reply(404, "no such check")
                while not voice.warnings():
                    voice.vouch()
                    await asyncio.sleep(0.02)
                assert "answers 404" in voice.warnings()[0]
                assert PLANTED not in str(voice.warnings())

    asyncio.run(live())


class CountingPeers(Peers):
    """A way out that takes everything, and knows when it was last asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    async def request(self, method: str, url: str, **given: Any) -> Answer:
        del method, url, given
        self.asked += 1
        return Answer(status=200, text="OK", retry_after_s=None)


def test_a_decision_loop_that_does_not_turn_sends_no_ping_until_it_turns_again(tmp_path: Path) -> None:
    async def live() -> None:
        out, stale_s = CountingPeers(), 1.0
        table = {"dead_man_secret": hidden(tmp_path, "https://ping/"), "dead_man_interval_s": 0.01}
        voice = alerts(tmp_path, peers=out, stale_s=stale_s, alerts=table)
        async with at_work(voice):
            while out.asked < 3:
                voice.vouch()
                await asyncio.sleep(0.01)
            last_word = clock.monotonic()
            await met(lambda: clock.monotonic() > last_word + stale_s)
            before = out.asked
            await asyncio.sleep(0.5)  # fifty intervals
            assert out.asked == before
            voice.vouch()
            await met(lambda: out.asked > before)

    asyncio.run(live())


def test_a_daemon_that_is_stopped_or_killed_is_told_by_the_pings_absence(tmp_path: Path) -> None:
    with http_peer() as peer:
        path = config_file(tmp_path)
        with path.open("a") as config:
            config.write(
                f"[alerts]\ninternal_hosts = ['127.0.0.1']\ndead_man_interval_s = 0.1\n"
                f"dead_man_secret = {hidden(tmp_path, f'{peer.url}/{PLANTED}')}\n"
            )
        daemon = subprocess.Popen(
            [sys.executable, "-m", "stepguardd", "run", "--config", str(path)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

        def arrive() -> None:
            before = pings(peer)
            until(lambda: pings(peer) >= before + 2)

        def cease() -> None:
            """What was on its way arrives; then nothing does, for ten intervals."""
            quiet_since, seen = clock.monotonic(), pings(peer)
            while clock.monotonic() < quiet_since + 1.0:
                time.sleep(0.05)
                if pings(peer) > seen:
                    quiet_since, seen = clock.monotonic(), pings(peer)
                assert seen < limit, "the pings go on"

        try:
            arrive()
            daemon.send_signal(signal.SIGSTOP)
            limit = pings(peer) + 3
            cease()
            daemon.send_signal(signal.SIGCONT)
            arrive()
        finally:
            daemon.kill()
            daemon.wait(timeout=30)
        limit = pings(peer) + 3
        cease()


def until(met: Callable[[], bool]) -> None:
    end = clock.monotonic() + 60.0
    while not met():
        assert clock.monotonic() < end, "it did not come to that in a minute"
        time.sleep(0.02)
