"""
What a server says over HTTP. The cheap endpoints, once a round: `/ready`, `/model_info` and `/metrics`.

They are answered by the server's parent process: they tell of a refused port, a pause, the weights' version
and the tokens so far, and nothing of the scheduler's life.
When the core is in doubt, `/server_info` and `/v1/loads` tell of that, and last of all `/health_generate`.
A reply is read up to 1 MiB and for the probe's timeout in all: a server that drips, floods or lies costs no
more than that.
"""

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import aiohttp

from .. import clock
from ..core.events import Answer, GenerationAsked, SchedulerAsked, ServerProbed
from ..oneline import utf8

BODY_BYTES_MAX: Final = 1 << 20
VERSION_CHARS_MAX: Final = 256

_INFO: Final = ("/model_info", "/get_model_info", "/v1/models")
_SCHEDULER: Final = ("/server_info", "/get_server_info")
_TOKEN: Final = ("/health_generate", "/health")

_RUNNING: Final = (
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
)
_OPEN: Final = "sglang:http_requests_active"
_GENERATING: Final = (b'"/generate"', b'"/v1/completions"', b'"/v1/chat/completions"')
_TOKENS: Final = (
    "sglang:realtime_tokens_total",  # moves with every forward pass; the next two when a request ends
    "sglang:generation_tokens_total",
    "sglang:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one request came to; a body only with `OK`."""

    answer: Answer
    body: bytes = b""


class Names:
    """
    What a server calls its endpoints: today's SGLang, an older one, or another server that is like it.

    The name that was answered last is tried first; a server that comes back may be of another version.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[str, ...], str] = {}

    async def get(self, http: aiohttp.ClientSession, names: tuple[str, ...], *, timeout_s: float) -> Reply:
        """The reply under the first of these names that the server knows."""
        known = self._first.get(names, names[0])
        reply = Reply(answer=Answer.NOT_OFFERED)
        for name in (known, *(name for name in names if name != known)):
            reply = await request(http, "GET", name, timeout_s=timeout_s)
            if reply.answer is not Answer.NOT_OFFERED:
                self._first[names] = name
                break
        return reply


def client(url: str) -> aiohttp.ClientSession:
    """One server's client, made in a running loop: no proxy of the environment, no cookies, no unpacking."""
    return aiohttp.ClientSession(
        # `request` names endpoints relative to it: a server may be behind a path.
        base_url=url + "/",
        # A connection is given up before uvicorn does so, after 5 s: no request is sent into one that ends.
        connector=aiohttp.TCPConnector(limit=16, keepalive_timeout=4.0),
        headers={"Accept-Encoding": "identity"},  # a megabyte of gzip may be a gigabyte of zeros
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # `request` has one for the whole
    )


async def request(
    http: aiohttp.ClientSession,
    method: str,
    path: str,
    *,
    timeout_s: float,
    body: object | None = None,
    body_bytes_max: int = BODY_BYTES_MAX,
) -> Reply:
    """
    One bounded request, every outcome a value.

    Args:
        http: the server's client.
        method: GET or POST.
        path: the endpoint.
        timeout_s: for the whole of it, the reading included.
        body: sent as JSON.
        body_bytes_max: a longer reply is a broken one.

    """
    try:
        async with (
            asyncio.timeout(timeout_s),
            http.request(method, path.removeprefix("/"), json=body, allow_redirects=False) as response,
        ):
            return await _read(response, body_bytes_max)
    except TimeoutError:
        return Reply(answer=Answer.TIMEOUT)
    except aiohttp.ClientConnectorError:
        return Reply(answer=Answer.REFUSED)
    except aiohttp.ClientError:
        return Reply(answer=Answer.BROKEN)


async def _read(response: aiohttp.ClientResponse, bytes_max: int) -> Reply:
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > bytes_max:
            return Reply(answer=Answer.BROKEN)
        chunks.append(chunk)
    body = b"".join(chunks)
    match response.status:
        case 200:
            return Reply(answer=Answer.OK, body=body)
        case 404 | 405:
            return Reply(answer=Answer.NOT_OFFERED)
        case 503:
            return Reply(answer=Answer.UNAVAILABLE)
        case _:
            return Reply(answer=Answer.BROKEN, body=body)


async def probe(
    http: aiohttp.ClientSession,
    server: str,
    *,
    timeout_s: float,
    names: Names | None = None,
    scraped: Callable[[bytes], None] = lambda body: None,
) -> ServerProbed:
    """One round: three requests at once, all of them bounded; `scraped` is handed what `/metrics` said."""
    ready, info, metrics = await asyncio.gather(
        request(http, "GET", "/ready", timeout_s=timeout_s),
        (names or Names()).get(http, _INFO, timeout_s=timeout_s),
        request(http, "GET", "/metrics", timeout_s=timeout_s),
    )
    model_info, version = weight_version(info)
    if metrics.answer is Answer.OK:
        scraped(metrics.body)
    running, tokens = read_metrics(metrics.body)
    return ServerProbed(
        server=server,
        ready=ready.answer,
        model_info=model_info,
        metrics=metrics.answer,
        weight_version=version,
        running=running,
        tokens=tokens,
    )


async def ask_scheduler(
    http: aiohttp.ClientSession, server: str, *, timeout_s: float, names: Names | None = None
) -> SchedulerAsked:
    """The second opinion: whether the scheduler itself answers, and when it made its last snapshot."""
    began = clock.monotonic()
    info, loads = await asyncio.gather(
        (names or Names()).get(http, _SCHEDULER, timeout_s=timeout_s),
        request(http, "GET", "/v1/loads", timeout_s=timeout_s),
    )
    return SchedulerAsked(
        server=server,
        info=info.answer,
        loads=loads.answer,
        loads_stamp=snapshot_time(loads.body) if loads.answer is Answer.OK else None,
        waited_s=clock.monotonic() - began,
    )


async def ask_token(
    http: aiohttp.ClientSession, server: str, *, timeout_s: float, names: Names | None = None
) -> GenerationAsked:
    """Have it generate one token: a second at least, twenty where it cannot."""
    began = clock.monotonic()
    reply = await (names or Names()).get(http, _TOKEN, timeout_s=timeout_s)
    return GenerationAsked(server=server, answer=reply.answer, waited_s=clock.monotonic() - began)


def snapshot_time(body: bytes) -> float | None:
    """When the slowest of a server's schedulers made its snapshot, by the server's clock; None if untold."""
    try:
        rows = json.loads(body)["loads"]
        times = [float(row["timestamp"]) for row in rows]
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None
    finite = [at for at in times if math.isfinite(at) and at > 0.0]
    return min(finite) if finite and len(finite) == len(times) else None


def weight_version(reply: Reply) -> tuple[Answer, str | None]:
    """The version that `/model_info` states; a 200 that is no JSON object is a broken answer."""
    if reply.answer is not Answer.OK:
        return reply.answer, None
    try:
        info = json.loads(reply.body)
    except (ValueError, RecursionError):
        return Answer.BROKEN, None
    if not isinstance(info, dict):
        return Answer.BROKEN, None
    version = info.get("weight_version")
    if isinstance(version, bool) or not isinstance(version, str | int):
        return Answer.OK, None
    return Answer.OK, utf8(str(version))[:VERSION_CHARS_MAX]


def read_metrics(body: bytes) -> tuple[int | None, int | None]:
    """
    Requests in the server and tokens so far, summed over ranks; None where the server does not tell.

    The scheduler's own count of requests lags by many passes, and stays 0 for one that hangs in its first:
    what the parent holds open counts as well. Tokens may count twice: what matters is whether they move.
    A line filter and no parser: a full Prometheus parse costs twice a sidecar's whole budget at 1 Hz.
    """
    running: float | None = None
    held_open: float | None = None
    tokens: float | None = None
    for line in body.splitlines():
        if not line.startswith((b"sglang:", b"vllm:")):
            continue
        name = line.partition(b"{")[0].partition(b" ")[0].decode("ascii", "replace")
        if name not in _RUNNING and name not in _TOKENS and name != _OPEN:
            continue
        try:
            value = float(line.rpartition(b" ")[2])
        except ValueError:
            continue
        if not 0 <= value < 1e18:  # also drops NaN
            continue
        if name in _RUNNING:
            running = value + (running or 0.0)
        elif name in _TOKENS:
            tokens = value + (tokens or 0.0)
        elif any(endpoint in line for endpoint in _GENERATING):
            held_open = value + (held_open or 0.0)
    if held_open is not None:
        running = max(held_open, running or 0.0)
    return (None if running is None else int(running)), (None if tokens is None else int(tokens))


def open_requests(body: bytes) -> int | None:
    """Requests to generate that the parent holds open, out of `/metrics`; None where it does not tell."""
    own = b"\n".join(line for line in body.splitlines() if line.startswith(_OPEN.encode()))
    return read_metrics(own)[0]
