"""
Whether servers and GPUs are ready for a run to begin: looked at from outside, with no daemon.

A server is ready when it generates: its cheap endpoints answer long before that. What is not ready is said
in words, and is never an error.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Final

import aiohttp

from . import clock
from .core.events import Answer
from .sources import sglang
from .sources.gpu import GpuReading, GpuSense

_POLL_S: Final = 1.0
_CHEAP_TIMEOUT_S: Final = 3.0
# SGLang says 503 after 20 s without a token; a shorter wait would only ever see a timeout.
_GENERATE_TIMEOUT_S: Final = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One thing at one time: is it ready, and in words what it is instead."""

    name: str
    ready: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpusWanted:
    """
    What is asked of the GPUs.

    Args:
        count: at least so many answer.
        free_share: and of the memory of each that answers at least this share is free.

    """

    count: int
    free_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The last look at each thing, in the order asked for."""

    looks: tuple[Look, ...]
    waited_s: float

    @property
    def ready(self) -> bool:
        """Whether all of them were."""
        return all(look.ready for look in self.looks)


async def wait_until_ready(
    servers: Mapping[str, str],
    gpus: GpusWanted | None,
    *,
    timeout_s: float,
    tell: Callable[[Look], None],
    sense: GpuSense | None = None,
) -> Outcome:
    """
    Wait until each server generates and the GPUs are as wanted, or until the time is over.

    Args:
        servers: addresses by name.
        gpus: what is asked of the GPUs; None: nothing.
        timeout_s: for all of it.
        tell: called with each look that says something new.
        sense: how the GPUs are asked.

    """
    looks: dict[str, Look] = {}

    def note(look: Look) -> bool:
        if looks.get(look.name) != look:
            looks[look.name] = look
            tell(look)
        return look.ready

    for name in servers:
        looks[name] = Look(name=name, ready=False, detail="not asked yet")
    async with AsyncExitStack() as clients:
        work = []
        for name, url in servers.items():
            http = await clients.enter_async_context(sglang.client(url))
            work.append(_server(name, url, http, note))
        if gpus is not None:
            looks["gpus"] = Look(name="gpus", ready=False, detail="not asked yet")
            work.append(_gpus(gpus, sense or GpuSense(), note))
        # The clients are made before the time begins: on a busy machine that alone may take a second.
        began = clock.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*work)
    return Outcome(looks=tuple(looks.values()), waited_s=clock.monotonic() - began)


async def _server(name: str, url: str, http: aiohttp.ClientSession, note: Callable[[Look], bool]) -> None:
    while True:
        if note(await look_at_server(name, url, http)):
            return
        await asyncio.sleep(_POLL_S)


async def look_at_server(name: str, url: str, http: aiohttp.ClientSession) -> Look:
    """One look: does it listen, and does it generate?"""

    def look(detail: str, *, ready: bool = False) -> Look:
        return Look(name=name, ready=ready, detail=detail)

    info = await sglang.request(http, "GET", "/model_info", timeout_s=_CHEAP_TIMEOUT_S)
    match info.answer:
        case Answer.REFUSED:
            return look(f"nothing listens at {url} yet")
        case Answer.TIMEOUT:
            return look(f"{url} does not answer")
        case Answer.UNAVAILABLE:
            return look("starting (503)")
        case _:
            pass
    generated = await sglang.request(http, "GET", "/health_generate", timeout_s=_GENERATE_TIMEOUT_S)
    match generated.answer:
        case Answer.OK:
            return look("generates", ready=True)
        case Answer.NOT_OFFERED:
            return look(f"{url} has no /health_generate; is it an SGLang server?")
        case Answer.UNAVAILABLE:
            return look("listens, and does not generate (503)")
        case _:
            return look(f"listens, and does not generate ({generated.answer.value})")


async def _gpus(wanted: GpusWanted, sense: GpuSense, note: Callable[[Look], bool]) -> None:
    try:
        while True:
            if note(look_at_gpus(wanted, sense.poll(clock.monotonic()))):
                return
            await asyncio.sleep(_POLL_S)
    finally:
        sense.close()


def look_at_gpus(wanted: GpusWanted, reading: GpuReading) -> Look:
    """Whether enough of them answer, with enough memory free. What is unknown is not ready."""

    def look(detail: str, *, ready: bool = False) -> Look:
        return Look(name="gpus", ready=ready, detail=detail)

    if reading.gpus is None:
        return look(reading.cause or "unknown")
    alive = [gpu for gpu in reading.gpus if not gpu.lost]
    lost = [str(gpu.index) for gpu in reading.gpus if gpu.lost]
    if lost:
        return look(f"GPU {', '.join(lost)} has fallen off the bus")
    if len(alive) < wanted.count:
        return look(f"{len(alive)} of {wanted.count} answer")
    if wanted.free_share > 0:
        for gpu in alive:
            if gpu.used_bytes is None or not gpu.total_bytes:
                return look(f"GPU {gpu.index}: its memory is unknown")
            free = 1 - gpu.used_bytes / gpu.total_bytes
            if free < wanted.free_share:
                return look(f"GPU {gpu.index}: {100 * free:.0f} % of its memory is free")
    return look(f"{len(alive)} answer", ready=True)
