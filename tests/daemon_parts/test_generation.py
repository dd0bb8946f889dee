"""A server's requests wait while it is paused, and are answered whole when it goes on."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from grpo.server_process import ServerProcess, free_port
from stepguardd.effects import generation
from stepguardd.effects.outcome import Outcome
from stepguardd.sources import sglang

pytestmark = pytest.mark.e2e
PROMPT = [10, 1, 2, 3, 4, 11]


def asked(url: str, work: Callable[[aiohttp.ClientSession], Awaitable[Outcome]]) -> Outcome:
    async def go() -> Outcome:
        async with sglang.client(url) as http:
            return await work(http)

    return asyncio.run(go())


def test_a_request_waits_through_a_pause_and_is_answered_whole(server_url: str) -> None:
    async def go() -> None:
        async with sglang.client(server_url) as http:
            assert (await generation.pause(http)).ok
            assert (await generation.pause(http)).ok, "idempotent"
            body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
            call = asyncio.create_task(sglang.request(http, "POST", "/generate", timeout_s=60.0, body=body))
            try:
                done, _ = await asyncio.wait([call], timeout=1.0)
                assert not done
            finally:
                assert (await generation.go_on(http)).ok
            reply = json.loads((await call).body)
            assert reply["meta_info"]["finish_reason"]["type"] != "abort"
            assert len(reply["output_ids"]) == 4
            assert (await generation.go_on(http)).ok, "nothing to do"

    asyncio.run(go())


def test_an_abort_ends_what_runs(server_url: str) -> None:
    """Each is answered at once with what it has, as aborted; a second abort finds nothing to do."""

    async def go() -> None:
        async with sglang.client(server_url) as http:
            body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 64, "ignore_eos": True}}
            await slowed(http, 0.5)
            try:
                calls = [
                    asyncio.create_task(sglang.request(http, "POST", "/generate", timeout_s=60.0, body=body))
                    for _ in range(3)
                ]
                await until_running(http, len(calls))
                assert (await generation.abort(http)).ok
                replies = [json.loads((await call).body) for call in calls]
            finally:
                await slowed(http, None)
            assert {reply["meta_info"]["finish_reason"]["type"] for reply in replies} == {"abort"}
            assert (await generation.abort(http)).ok

    asyncio.run(go())


async def slowed(http: aiohttp.ClientSession, seconds: float | None) -> None:
    body = {"forward_sleep_time": seconds}
    await sglang.request(http, "POST", "/slow_down", timeout_s=30.0, body=body)


async def until_running(http: aiohttp.ClientSession, many: int) -> None:
    async with asyncio.timeout(30.0):
        while True:
            reply = await sglang.request(http, "GET", "/metrics", timeout_s=30.0)
            if (sglang.open_requests(reply.body) or 0) >= many:
                return
            await asyncio.sleep(0.05)


def test_where_nothing_listens_there_is_no_pause_to_end() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert asked(url, generation.go_on).ok
    assert asked(url, generation.abort).ok
    assert not asked(url, generation.pause).ok


@pytest.fixture
def server_url(embedded: ServerProcess) -> str:
    return embedded.url
