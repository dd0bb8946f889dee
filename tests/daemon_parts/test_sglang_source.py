"""A server may say anything, or nothing: a probe is bounded in time and bytes; every outcome is a value."""

import asyncio
import contextlib
import gzip
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.server_process import ServerProcess, free_port
from stepguardd.core.events import Answer, ServerProbed
from stepguardd.effects.canary import canary
from stepguardd.effects.weights import push
from stepguardd.sources import sglang
from stepguardd.sources.sglang import BODY_BYTES_MAX, Reply, read_metrics, weight_version

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
# Real sockets, some of which drip on purpose.
pytestmark = pytest.mark.e2e

GIB = 1 << 30
QUICK_S = 0.5


class Hostile:
    """A server that does one thing to every request, and counts the bytes that it got rid of."""

    def __init__(
        self, answering: Callable[["Hostile", asyncio.StreamWriter, bytes], Awaitable[None]]
    ) -> None:
        self._answering = answering
        self.sent = 0
        self.requests: list[bytes] = []
        self.url = ""

    async def __aenter__(self) -> "Hostile":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 16)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            await self._answering(self, writer, self.requests[-1])
        writer.close()

    async def send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()
        self.sent += len(data)


def reply(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def flood(server: Hostile, writer: asyncio.StreamWriter, _: bytes) -> None:
    await server.send(writer, f"HTTP/1.1 200 OK\r\ncontent-length: {GIB}\r\n\r\n".encode())
    while server.sent < GIB:
        await server.send(writer, b"x" * 65536)


async def endless_chunks(server: Hostile, writer: asyncio.StreamWriter, _: bytes) -> None:
    await server.send(writer, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while server.sent < GIB:
        await server.send(writer, b"10000\r\n" + b"x" * 65536 + b"\r\n")


async def drip(server: Hostile, writer: asyncio.StreamWriter, _: bytes) -> None:
    await server.send(writer, b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    while True:
        await server.send(writer, b"{")
        await asyncio.sleep(0.02)


async def drip_headers(server: Hostile, writer: asyncio.StreamWriter, _: bytes) -> None:
    await server.send(writer, b"HTTP/1.1 200 OK\r\n")
    while True:
        await server.send(writer, b"x: y\r\n")
        await asyncio.sleep(0.02)


async def endless_headers(server: Hostile, writer: asyncio.StreamWriter, _: bytes) -> None:
    await server.send(writer, b"HTTP/1.1 200 OK\r\n")
    while server.sent < GIB:
        await server.send(writer, b"x: " + b"y" * 60000 + b"\r\n")


async def silence(server: Hostile, writer: asyncio.StreamWriter, _: bytes) -> None:
    await asyncio.sleep(60)


async def hang_up(server: Hostile, writer: asyncio.StreamWriter, _: bytes) -> None:
    writer.transport.abort()


async def hang_up_midway(server: Hostile, writer: asyncio.StreamWriter, _: bytes) -> None:
    await server.send(writer, b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"weight')


def always(data: bytes) -> Callable[[Hostile, asyncio.StreamWriter, bytes], Awaitable[None]]:
    async def answering(server: Hostile, writer: asyncio.StreamWriter, _: bytes) -> None:
        await server.send(writer, data)

    return answering


async def probed(url: str) -> ServerProbed:
    async with sglang.client(url) as http:
        return await sglang.probe(http, "s", timeout_s=QUICK_S)


async def seen(url: str, holds: Callable[[ServerProbed], bool]) -> ServerProbed:
    """The first probe of which something holds: figures come from the scheduler's last snapshot."""
    async with asyncio.timeout(10):
        while True:
            if holds(event := await probed(url)):
                return event
            await asyncio.sleep(0.05)


def probe(
    answering: Callable[[Hostile, asyncio.StreamWriter, bytes], Awaitable[None]],
) -> tuple[ServerProbed, Hostile]:
    async def go() -> tuple[ServerProbed, Hostile]:
        async with Hostile(answering) as server, asyncio.timeout(20):
            return await probed(server.url), server

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("answering", "answer"),
    [
        (flood, Answer.BROKEN),
        (endless_chunks, Answer.BROKEN),
        (endless_headers, Answer.BROKEN),
        (drip, Answer.TIMEOUT),
        (drip_headers, Answer.TIMEOUT),
        (silence, Answer.TIMEOUT),
        (hang_up, Answer.BROKEN),
        (hang_up_midway, Answer.BROKEN),
        (always(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), Answer.BROKEN),
        (always(b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n"), Answer.BROKEN),
        (always(b"HTTP/1.1 99999 What\r\n\r\n"), Answer.BROKEN),
        (always(reply("302 Found", b"", "location: http://169.254.169.254/")), Answer.BROKEN),
        (always(reply("500 Internal Server Error", b"x")), Answer.BROKEN),
        (always(reply("404 Not Found", b"")), Answer.NOT_OFFERED),
        (always(reply("503 Service Unavailable", b"")), Answer.UNAVAILABLE),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_hostile_server_costs_a_bounded_time_and_a_few_megabytes(
    answering: Callable[[Hostile, asyncio.StreamWriter, bytes], Awaitable[None]], answer: Answer
) -> None:
    event, server = probe(answering)
    assert server.requests  # the fault fired
    assert (event.ready, event.model_info, event.metrics) == (answer, answer, answer)
    assert (event.weight_version, event.running, event.tokens) == (None, None, None)
    # Three requests, a megabyte each, and what the kernel's buffers swallow.
    assert server.sent < 3 * (BODY_BYTES_MAX + (12 << 20))


def test_a_redirect_is_not_followed() -> None:
    event, server = probe(always(reply("307 Temporary Redirect", b"", "location: /elsewhere")))
    assert event.model_info is Answer.BROKEN
    assert not any(b"/elsewhere" in request for request in server.requests)


def test_a_port_where_nobody_listens_is_refused() -> None:
    event = asyncio.run(probed(f"http://127.0.0.1:{free_port()}"))
    assert (event.ready, event.model_info, event.metrics) == (Answer.REFUSED,) * 3


def test_a_megabyte_of_gzip_is_not_unpacked() -> None:
    bomb = gzip.compress(b"0" * (64 << 20))
    event, server = probe(always(reply("200 OK", bomb, "content-encoding: gzip")))
    assert b"accept-encoding: identity" in server.requests[0].lower()
    assert event.model_info is Answer.BROKEN


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"weight_version": ' + b"9" * 5000 + b"}",
        b"\xff\xfe\x00",
        b'{"weight_version": "\xff"}',
    ],
)
def test_json_that_is_none_or_no_object_is_a_broken_answer(body: bytes) -> None:
    assert weight_version(Reply(answer=Answer.OK, body=body)) == (Answer.BROKEN, None)


@pytest.mark.parametrize(
    ("stated", "version"),
    [
        ('"7"', "7"),
        ("7", "7"),
        ("null", None),
        ("true", None),
        ("[1]", None),
        ('{"a": 1}', None),
        ("1.5", None),
        ('"\\ud800"', "?"),
        ('"' + "v" * 5000 + '"', "v" * 256),
    ],
)
def test_a_version_is_a_short_text_that_can_be_stored(stated: str, version: str | None) -> None:
    body = f'{{"weight_version": {stated}}}'.encode()
    assert weight_version(Reply(answer=Answer.OK, body=body)) == (Answer.OK, version)


def test_metrics_are_summed_over_ranks_and_the_rest_is_unknown() -> None:
    body = b"""# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{rank="0"} 3.0
sglang:num_running_reqs{rank="1"} 2.0
sglang:num_queue_reqs 4
sglang:generation_tokens_total{x="a b"} 1e3
sglang:prompt_tokens_total NaN
sglang:num_running_reqs_total 1000
"""
    assert read_metrics(body) == (9, 1000)
    assert read_metrics(b"") == (None, None)
    assert read_metrics(b"sglang:num_running_reqs +Inf\nsglang:generation_tokens_total -5\n") == (None, None)


@given(st.binary(max_size=400))
def test_any_bytes_are_metrics_or_nothing(body: bytes) -> None:
    read_metrics(b"sglang:num_running_reqs" + body)
    read_metrics(body)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_version_or_broken(body: bytes) -> None:
    answer, _ = weight_version(Reply(answer=Answer.OK, body=body))
    assert answer in {Answer.OK, Answer.BROKEN}


# ---- canary and push against strangers -------------------------------------------------------------


def tried(answering: Callable[[Hostile, asyncio.StreamWriter, bytes], Awaitable[None]]) -> tuple[bool, str]:
    async def go() -> tuple[bool, str]:
        async with Hostile(answering) as server, sglang.client(server.url) as http:
            outcome = await canary(http, requests=2, timeout_s=QUICK_S, ours=lambda: None)
            return outcome.ok, outcome.detail

    return asyncio.run(go())


def generated(tokens: str) -> bytes:
    return reply("200 OK", f'{{"meta_info": {{"completion_tokens": {tokens}}}}}'.encode())


def test_a_canary_that_got_tokens_is_good() -> None:
    assert tried(always(generated("4"))) == (True, "2 canaries, 8 tokens")


@pytest.mark.parametrize("tokens", ["0", "-4", '"x"', "null", "Infinity", "NaN", "[]", "{}"])
def test_a_canary_without_a_token_is_not(tokens: str) -> None:
    assert tried(always(generated(tokens))) == (False, "0 of 2 canaries were answered (ok)")


@pytest.mark.parametrize("answering", [flood, drip, silence, hang_up, always(reply("200 OK", b"[]"))])
def test_a_canary_to_a_hostile_server_fails_in_time(
    answering: Callable[[Hostile, asyncio.StreamWriter, bytes], Awaitable[None]],
) -> None:
    ok, detail = tried(answering)
    assert not ok
    assert "0 of 2 canaries" in detail


def test_a_canary_answered_by_another_process_is_refused() -> None:
    async def go() -> tuple[bool, str, list[bytes]]:
        async with Hostile(always(generated("4"))) as server, sglang.client(server.url) as http:
            outcome = await canary(http, requests=2, timeout_s=QUICK_S, ours=lambda: False)
            return outcome.ok, outcome.detail, server.requests

    assert asyncio.run(go()) == (False, "another process answers on its port", [])


def pushed(
    folder: Path, answering: Callable[..., Awaitable[None]], version: str = "7", pattern: str = "{version}"
) -> tuple[bool, str]:
    async def go() -> tuple[bool, str]:
        async with Hostile(answering) as server, sglang.client(server.url) as http:
            outcome = await push(http, pattern=f"{folder}/{pattern}", version=version, timeout_s=QUICK_S)
            return outcome.ok, outcome.detail

    return asyncio.run(go())


def serving(first: str, then: str) -> Callable[[Hostile, asyncio.StreamWriter, bytes], Awaitable[None]]:
    """A server that takes any weights, and says these versions before and after."""

    async def answering(server: Hostile, writer: asyncio.StreamWriter, request: bytes) -> None:
        if request.startswith(b"POST"):
            await server.send(writer, reply("200 OK", b'{"success": true}'))
            return
        posted = any(known.startswith(b"POST") for known in server.requests)
        version = json.dumps({"weight_version": then if posted else first}).encode()
        await server.send(writer, reply("200 OK", version))

    return answering


def test_a_push_is_believed_only_when_the_server_says_the_version(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    assert pushed(tmp_path, serving("base", "7")) == (True, "version 7")
    assert pushed(tmp_path, serving("base", "base")) == (
        False,
        "the server says it serves version base, not 7",
    )


def test_a_number_is_written_with_leading_zeros_where_the_folders_names_have_them(tmp_path: Path) -> None:
    (tmp_path / "weight_v000007").mkdir()
    padded = "weight_v{version:06d}"
    assert pushed(tmp_path, serving("base", "7"), pattern=padded) == (True, "version 7")
    ok, detail = pushed(tmp_path, serving("base", "default"), version="default", pattern=padded)
    assert not ok
    assert detail.startswith("the version 'default' is no number, as weights.path wants it")


def test_a_push_of_what_is_there_already_sends_nothing(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    assert pushed(tmp_path, serving("7", "other")) == (True, "version 7 was there already")


@pytest.mark.parametrize("version", ["", ".", "..", "a/b", "/etc"])
def test_a_version_that_is_no_folders_name_is_never_a_path(tmp_path: Path, version: str) -> None:
    ok, detail = pushed(tmp_path, serving("base", version), version)
    assert not ok
    assert "cannot be a folder's name" in detail


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    ok, detail = pushed(tmp_path, serving("base", "7"))
    assert (ok, detail) == (False, f"{tmp_path}/7 is not there; check weights.path")


def test_a_server_that_refuses_the_weights_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()

    async def refusing(server: Hostile, writer: asyncio.StreamWriter, request: bytes) -> None:
        body = b'{"success": false, "message": "shapes differ"}'
        await server.send(writer, reply("400 Bad Request" if b"POST" in request else "200 OK", body))

    ok, detail = pushed(tmp_path, refusing)
    assert not ok
    assert "shapes differ" in detail


# ---- the contract, with the embedded server --------------------------------------------------------


def test_a_healthy_server_is_told_as_it_is(embedded: ServerProcess) -> None:
    event = asyncio.run(seen(embedded.url, lambda event: event.running == 0))
    assert (event.ready, event.model_info, event.metrics) == (Answer.OK,) * 3
    assert event.weight_version is not None
    assert event.tokens is not None


def test_a_canary_generates_and_its_tokens_are_counted(embedded: ServerProcess) -> None:
    async def go() -> tuple[int | None, int | None]:
        before = await probed(embedded.url)
        async with sglang.client(embedded.url) as http:
            outcome = await canary(http, requests=4, timeout_s=20, ours=lambda: True)
        assert outcome.ok, outcome.detail
        after = await seen(embedded.url, lambda event: event.tokens != before.tokens)
        return before.tokens, after.tokens

    before, after = asyncio.run(go())
    assert before is not None
    assert after is not None
    assert after > before


def test_a_paused_server_is_unavailable_and_not_broken(embedded: ServerProcess, http: httpx.Client) -> None:
    http.post("/pause_generation", json={"mode": "abort"}).raise_for_status()
    try:
        event = asyncio.run(probed(embedded.url))
    finally:
        http.post("/continue_generation", json={}).raise_for_status()
    assert (event.ready, event.model_info) == (Answer.UNAVAILABLE, Answer.OK)


def test_weights_are_pushed_into_it(embedded: ServerProcess, base_model: Path, tmp_path: Path) -> None:
    (tmp_path / "9").symlink_to(base_model, target_is_directory=True)

    async def go() -> tuple[bool, str | None]:
        async with sglang.client(embedded.url) as http:
            outcome = await push(http, pattern=f"{tmp_path}/{{version}}", version="9", timeout_s=20)
        return outcome.ok, (await probed(embedded.url)).weight_version

    assert asyncio.run(go()) == (True, "9")
