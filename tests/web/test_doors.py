"""Who may come in over TCP: what a browser can be made to send, against the whole application."""

import asyncio
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from pydantic import ValidationError

from shell.fake_daemon import FakeDaemon, serving
from stepguardd.config.settings import WebSettings
from stepguardd.control.api import create_app
from stepguardd.control.client import ControlClient
from stepguardd.control.contract import Refused
from stepguardd.web.doors import Doors
from stepguardd.web.keys import Keys, TokenError
from stepguardd.web.server import PageServer

TOKEN = "t" * 43
BASE = "http://127.0.0.1:8722"
BEARER = {"authorization": f"Bearer {TOKEN}"}
VERBS = ("pause", "resume", "rollback", "restart-server", "ack", "mode")


def asked(
    daemon: FakeDaemon,
    method: str,
    path: str,
    headers: Mapping[str, str] = {},
    *,
    keys: Keys | None = None,
    open_reads: bool = True,
    body: Any = None,
) -> httpx.Response:
    """The answer of this daemon's page to one request."""
    keys = keys or Keys(TOKEN)
    doors = Doors(create_app(daemon, keys), keys, hosts=("localhost", "127.0.0.1"), reads_are_open=open_reads)

    async def ask() -> httpx.Response:
        transport: Any = httpx.ASGITransport(doors)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            return await client.request(method, path, headers=dict(headers), json=body)

    return asyncio.run(ask())


@pytest.mark.parametrize("verb", VERBS)
def test_nobody_changes_anything_without_the_token(verb: str) -> None:
    daemon = FakeDaemon()
    body = {"mode": "hold"} if verb == "mode" else {}
    for wrong in ({}, {"authorization": "Bearer nonsense"}, {"authorization": "Bearer 9999999999.YQ.x"}):
        reply = asked(daemon, "POST", f"/api/v1/{verb}", wrong, body=body)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
    assert daemon.asked == []
    assert asked(daemon, "POST", f"/api/v1/{verb}", BEARER, body=body).status_code == 200
    assert [one[:2] for one in daemon.asked] == [(verb, "the holder of the token")]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "", "127.0.0.1:x", "[::1"]
)
def test_another_name_for_this_host_is_refused_even_with_the_token(host: str) -> None:
    daemon = FakeDaemon()
    for method, path in (("GET", "/"), ("GET", "/api/v1/status"), ("POST", "/api/v1/pause")):
        assert asked(daemon, method, path, {"host": host, **BEARER}, body={}).status_code == 421
    assert daemon.asked == []


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "file://127.0.0.1:8722"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_sites_page_may_neither_act_nor_read(headers: dict[str, str]) -> None:
    daemon = FakeDaemon()
    assert asked(daemon, "POST", "/api/v1/pause", {**headers, **BEARER}, body={}).status_code == 403
    assert asked(daemon, "GET", "/api/v1/status", {**headers, **BEARER}).status_code == 403
    assert daemon.asked == []


def test_the_page_itself_may_act_and_a_link_elsewhere_may_lead_to_it() -> None:
    daemon = FakeDaemon()
    own = {"origin": BASE, "sec-fetch-site": "same-origin"}
    assert asked(daemon, "POST", "/api/v1/pause", {**own, **BEARER}, body={}).status_code == 200
    assert asked(daemon, "GET", "/", {"sec-fetch-site": "cross-site"}).status_code == 200


def test_nothing_changes_by_get() -> None:
    daemon = FakeDaemon()
    for verb in (*VERBS, "session", "link"):
        assert asked(daemon, "GET", f"/api/v1/{verb}", BEARER).status_code == 405
    for path in ("/", "/healthz", "/metrics", "/api/v1/series", "/api/v1/incidents", "/api/v1/checkpoints"):
        assert asked(daemon, "GET", path).status_code == 200
    assert daemon.asked == []


def test_beyond_loopback_reading_needs_the_token_too() -> None:
    daemon = FakeDaemon()
    for path in ("/api/v1/status", "/api/v1/events", "/metrics", "/api/v1/openapi.json"):
        assert asked(daemon, "GET", path, open_reads=False).status_code == 401
        assert asked(daemon, "GET", path, BEARER, open_reads=False).status_code == 200
    assert asked(daemon, "GET", "/healthz", open_reads=False).status_code == 200


@pytest.mark.parametrize("path", ["/", "/api/v1/status", "/static/page.js", "/nowhere", "/api/v1/pause"])
def test_every_answer_forbids_scripts_that_are_not_ours(path: str) -> None:
    headers = asked(FakeDaemon(), "GET", path).headers
    rules = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
    assert rules["script-src"] == "'self'"
    assert rules["default-src"] == "'none'"
    assert rules["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_has_no_script_in_its_text() -> None:
    text = asked(FakeDaemon(), "GET", "/").text
    assert text.count("<script") == text.count('<script type="module" src="/static/page.js">') == 1
    assert " onclick=" not in text


@pytest.mark.parametrize("name", ["..%2fserver.py", "%2e%2e/server.py", "page.py", ".", "index.html%00"])
def test_only_the_pages_own_files_are_given(name: str) -> None:
    assert asked(FakeDaemon(), "GET", f"/static/{name}").status_code == 404


def test_a_link_opens_one_session_with_its_name_and_works_once() -> None:
    daemon, keys = FakeDaemon(), Keys(TOKEN)
    code = keys.code("ada (uid 7, pid 8)")
    opened = asked(daemon, "POST", "/api/v1/session", keys=keys, body={"code": code})
    assert opened.status_code == 200
    session = {"authorization": f"Bearer {opened.json()['token']}"}
    assert asked(daemon, "POST", "/api/v1/session", keys=keys, body={"code": code}).status_code == 403
    assert asked(daemon, "POST", "/api/v1/pause", session, keys=keys, body={}).status_code == 200
    assert daemon.asked[0][1] == "ada (uid 7, pid 8), on the page"
    # Another token, another page: the session is good for neither.
    other = Keys("u" * 43)
    assert asked(daemon, "POST", "/api/v1/pause", session, keys=other, body={}).status_code == 401


def test_a_link_is_given_at_the_control_socket_only(tmp_path: Path) -> None:
    daemon = FakeDaemon()
    assert asked(daemon, "POST", "/api/v1/link", BEARER, body={}).status_code == 403
    with serving(tmp_path, daemon) as path, ControlClient(path) as client:
        with pytest.raises(Refused, match=r"there is no page: web\.enabled is false"):
            client.link()
        daemon.state = {**daemon.state, "page": {"url": BASE, "failure": None}}
        assert str(client.link()["url"]).startswith(f"{BASE}/#code=")


@pytest.mark.parametrize(
    "bearer", ["..", "a.b.c", "1.2", "\u00e9" * 50, f"{'9' * 400}.YQ.x", f"x.{TOKEN}", "."]
)
def test_a_nonsensical_session_is_refused_and_no_error(bearer: str) -> None:
    headers: Any = {"authorization": f"Bearer {bearer}".encode()}
    assert asked(FakeDaemon(), "POST", "/api/v1/pause", headers, body={}).status_code == 401


def test_the_token_is_its_owners_alone_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "web.token"
    Keys.kept_in(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = path.read_text().strip()
    assert Keys.kept_in(path).holder(token) is not None
    assert path.read_text().strip() == token


@pytest.mark.parametrize("spoil", ["readable", "link", "empty"])
def test_a_token_that_others_can_have_is_not_used(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / "web.token"
    Keys.kept_in(path)
    if spoil == "readable":
        path.chmod(0o640)
    elif spoil == "link":
        path.rename(tmp_path / "other")
        path.symlink_to(tmp_path / "other")
    else:
        path.write_text("")
    with pytest.raises(TokenError, match=r"web\.token"):
        Keys.kept_in(path)


def test_beyond_loopback_there_is_no_listening_without_tls(tmp_path: Path) -> None:
    for listen in ("0.0.0.0:8722", "192.0.2.1:1", "[::]:8722"):
        with pytest.raises(ValidationError, match="tls"):
            WebSettings(listen=listen)
        both = {"tls_cert": tmp_path / "c.pem", "tls_key": tmp_path / "k.pem"}
        assert WebSettings(listen=listen, **both).listen == listen
    assert WebSettings(listen="[::1]:8722").tls_cert is None


def test_with_tls_the_page_answers_by_it_alone_and_beyond_loopback_only_to_the_token(tmp_path: Path) -> None:
    """On every address of this machine, as a page beyond loopback is; asked by the loopback's name."""
    ca = trustme.CA()
    pair = ca.issue_cert("127.0.0.1")
    pair.private_key_pem.write_to_path(tmp_path / "key.pem")
    for part in pair.cert_chain_pems:
        part.write_to_path(tmp_path / "cert.pem", append=True)
    both = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    page = PageServer(WebSettings(listen="0.0.0.0:0", **both), tmp_path)
    context = ssl.create_default_context()
    ca.configure_trust(context)

    async def live() -> None:
        serving = asyncio.create_task(page.serve(create_app(FakeDaemon(), page.keys)))
        try:
            async with asyncio.timeout(60), httpx.AsyncClient(verify=context, trust_env=False) as client:
                while page.url is None:
                    assert not serving.done()
                    await asyncio.sleep(0)
                assert page.url.startswith("https://")
                port = page.url.rpartition(":")[2]
                where = f"https://127.0.0.1:{port}/api/v1/status"
                assert (await client.get(where)).status_code == 401
                token = (tmp_path / "web.token").read_text().strip()
                reply = await client.get(where, headers={"authorization": f"Bearer {token}"})
                assert reply.json()["run"] == "math"
                with pytest.raises(httpx.HTTPError):
                    await client.get(where.replace("https", "http"))
        finally:
            serving.cancel()
            await asyncio.wait([serving])

    asyncio.run(live())
