"""
Rollouts over HTTP: one request a trajectory, scored where it arrives.

Promise: a request ends within its time limit, as a `Rollout` or as `RolloutError`; a broken connection is
tried once more (the server may just have come back), a timeout is not. A failure is never given a reward
here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from stepguard_grpo import task
from stepguard_grpo.task import Request

TRIES = 2
PAUSE_BEFORE_RETRY_S = 0.05
CONNECT_TIMEOUT_S = 2.0
ERROR_BODY_CHARS = 200
NO_TOKEN = 1_000_000  # in no vocabulary: SGLang's scheduler dies of it, and the embedded one too


class RolloutError(Exception):
    """The server gave no usable answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One finished trajectory."""

    request: Request
    output_ids: tuple[int, ...]
    log_probs: tuple[float, ...]  # as the server sampled them; one a token
    reward: float
    weight_version: str | None  # what generated it, as the server says


class Sampler(Protocol):
    """Whatever turns requests into rollouts."""

    async def __call__(self, request: Request) -> Rollout:
        """Roll out one trajectory; RolloutError when it fails."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...


class HttpSampler:
    """Rollouts from an SGLang-compatible server."""

    def __init__(self, server_url: str, *, timeout_s: float) -> None:
        self._url = server_url.rstrip("/") + "/generate"
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> Rollout:
        """Roll out one trajectory."""
        answer = await self._post(request_body(request))
        try:
            return rollout_of(request, answer)
        except (KeyError, TypeError, ValueError) as error:
            raise RolloutError(f"the server's answer is none: {type(error).__name__}: {error}") from error

    async def aclose(self) -> None:
        """Let go of connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _post(self, body: dict[str, Any]) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=self._timeout, connector=aiohttp.TCPConnector(limit=0)
            )
        for attempt in range(1, TRIES + 1):
            try:
                async with self._session.post(self._url, json=body) as response:
                    if response.status != 200:
                        text = (await response.text())[:ERROR_BODY_CHARS]
                        raise RolloutError(f"HTTP {response.status}: {text}")
                    return await response.json()
            except TimeoutError as error:
                raise RolloutError(f"no answer within {self._timeout.total:g} s") from error
            except (aiohttp.ClientError, ValueError) as error:
                if attempt == TRIES:
                    raise RolloutError(f"{type(error).__name__}: {error}") from error
                await asyncio.sleep(PAUSE_BEFORE_RETRY_S)
        raise AssertionError("unreachable: the last try returns or raises")


def request_body(request: Request) -> dict[str, Any]:
    """The body of `/generate` for one trajectory."""
    return {
        "input_ids": [*request.prompt, NO_TOKEN] if request.deadly else list(request.prompt),
        "return_logprob": True,
        "sampling_params": {
            "temperature": 1.0,
            "max_new_tokens": task.MAX_NEW_TOKENS,
            "sampling_seed": request.sampling_seed,
        },
    }


def rollout_of(request: Request, answer: dict[str, Any]) -> Rollout:
    """Score an answer; KeyError, TypeError or ValueError when it is not one, or was aborted midway."""
    meta = answer["meta_info"]
    if meta["finish_reason"]["type"] == "abort":
        raise ValueError("the server aborted it")
    output_ids = tuple(int(token) for token in answer["output_ids"])
    if not output_ids:
        raise ValueError("no tokens")
    version = meta.get("weight_version")
    return Rollout(
        request=request,
        output_ids=output_ids,
        log_probs=tuple(float(entry[0]) for entry in meta["output_token_logprobs"]),
        reward=task.score(output_ids, request.target),
        weight_version=None if version is None else str(version),
    )
