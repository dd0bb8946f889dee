"""A server's requests wait, go on or end: `/pause_generation`, `/continue_generation`, `/abort_request`."""

from typing import Final

import aiohttp

from ..core.events import Answer
from ..sources.sglang import request
from .outcome import Outcome, failed

TIMEOUT_S: Final = 5.0


async def pause(http: aiohttp.ClientSession) -> Outcome:
    """
    Let what runs and what comes wait, open and unanswered.

    `in_place`: the other modes cut rollouts short, or compute their prompts anew.
    """
    reply = await request(http, "POST", "/pause_generation", timeout_s=TIMEOUT_S, body={"mode": "in_place"})
    return (
        Outcome(ok=True) if reply.answer is Answer.OK else failed(f"/pause_generation: {reply.answer.value}")
    )


async def go_on(http: aiohttp.ClientSession) -> Outcome:
    """End a pause. Where nothing listens, or pauses are not offered, there is none."""
    reply = await request(http, "POST", "/continue_generation", timeout_s=TIMEOUT_S, body={})
    if reply.answer in {Answer.OK, Answer.REFUSED, Answer.NOT_OFFERED}:
        return Outcome(ok=True)
    return failed(f"/continue_generation: {reply.answer.value}")


async def abort(http: aiohttp.ClientSession) -> Outcome:
    """End every request, also those that wait; each is answered with what it has. None where not offered."""
    reply = await request(http, "POST", "/abort_request", timeout_s=TIMEOUT_S, body={"abort_all": True})
    if reply.answer in {Answer.OK, Answer.REFUSED, Answer.NOT_OFFERED}:
        return Outcome(ok=True)
    return failed(f"/abort_request: {reply.answer.value}")
