"""
The canary: a few real generations, all at once, answered by the very process that is meant.

Only ids that any vocabulary has: one out-of-vocabulary id kills a CPU server (measured on SGLang 0.5.23).
"""

import asyncio
import json
from collections.abc import Callable
from typing import Final

import aiohttp

from ..core.events import Answer
from ..sources.sglang import Reply, request
from .outcome import Outcome, failed

TOKENS: Final = 4
_IDS: Final = (1, 2, 3)


async def canary(
    http: aiohttp.ClientSession, *, requests: int, timeout_s: float, ours: Callable[[], bool | None]
) -> Outcome:
    """
    See that a server generates.

    Args:
        http: the server's client.
        requests: how many generations at once.
        timeout_s: for each of them.
        ours: whether the server's own tree holds the port; None where that cannot be seen.

    """
    if await asyncio.to_thread(ours) is False:
        return failed("another process answers on its port")
    body = {
        "input_ids": list(_IDS),
        "sampling_params": {"max_new_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True},
    }
    replies = await asyncio.gather(
        *(request(http, "POST", "/generate", timeout_s=timeout_s, body=body) for _ in range(requests))
    )
    tokens = [_tokens(reply) for reply in replies]
    answered = sum(1 for count in tokens if count)
    if answered < requests:
        answers = ", ".join(sorted({reply.answer.value for reply in replies}))
        return failed(f"{answered} of {requests} canaries were answered ({answers})")
    return Outcome(ok=True, detail=f"{requests} canaries, {sum(tokens)} tokens")


def _tokens(reply: Reply) -> int:
    """How many tokens a reply proves; 0 for one that proves none."""
    if reply.answer is not Answer.OK:
        return 0
    try:
        found = json.loads(reply.body)
        found = found[0] if isinstance(found, list) else found
        return max(0, int(found["meta_info"]["completion_tokens"]))
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return 0
