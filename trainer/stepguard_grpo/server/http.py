"""
The HTTP surface: SGLang's endpoints, status codes and bodies, as far as a trainer and a watchdog use them.

Handlers that ask the scheduler wait for it without a limit; those that do not (`/ready`, `/ping`,
`/model_info`, `/v1/loads`, `/metrics`) answer even when it is stopped. There is no text: prompts and outputs
are token ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from stepguard_grpo.server.exposition import Figures, render
from stepguard_grpo.server.link import SchedulerLink, kill_all
from stepguard_grpo.server.sampling import Sampling, UnknownKeyError, parse_sampling
from stepguard_grpo.server.shape import Shape
from stepguard_grpo.server.wire import Message

VERSION = "0.5.23+stepguard"
MAX_BODY_BYTES = 32 << 20
MAX_OPEN_REQUESTS = 4096
PAUSE_MODES = ("abort", "in_place", "retract")

log = logging.getLogger("stepguard_grpo.server")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The server's arguments, named as their flags."""

    model_path: str
    host: str
    port: int
    weight_version: str
    max_running_requests: int
    max_total_tokens: int
    mem_fraction_static: float
    request_bytes: int
    pretended_gpu: str | None
    served_model_name: str
    health_timeout_s: float
    crash_diagnostics_s: float
    shutdown_grace_s: float
    warmup_timeout_s: float


@dataclass(slots=True, kw_only=True)
class State:
    """What the parent knows. Changed on its event loop only."""

    settings: Settings
    shape: Shape
    link: SchedulerLink
    started_at: float
    launch_command: str
    model_path: str
    served_model_name: str
    weight_version: str
    figures: Figures = field(default_factory=Figures)
    starting: bool = True
    draining: bool = False
    unhealthy: bool = False  # a health check failed and none has succeeded since
    paused: bool = False
    loads: int = 0  # from disk, under way
    in_flight: int = 0

    @property
    def up(self) -> bool:
        """Whether the flags alone say that it serves."""
        return not (self.starting or self.draining or self.unhealthy)


STATE: web.AppKey[State] = web.AppKey("state", State)


class BadRequestError(Exception):
    """A 400 with this body."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(str(body))
        self.body = body


def _invalid(message: str) -> BadRequestError:
    """A value that the server cannot take."""
    return BadRequestError({"error": {"message": message}})


def _malformed(message: str) -> BadRequestError:
    """JSON that is none, or of the wrong types."""
    return BadRequestError(
        {"object": "error", "message": message, "type": "BadRequest", "param": None, "code": 400}
    )


def build_app(state: State) -> web.Application:
    """The application; the caller binds it to a port."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_account])
    app[STATE] = state
    get: dict[str, Handler] = {
        "/health": health,
        "/health_generate": health,
        "/ready": ready,
        "/ping": ping,
        "/model_info": model_info,
        "/get_model_info": model_info,
        "/server_info": server_info,
        "/get_server_info": server_info,
        "/v1/loads": loads,
        "/v1/models": models,
        "/metrics": metrics,
    }
    post: dict[str, Handler] = {
        "/generate": generate,
        "/abort_request": abort_request,
        "/pause_generation": pause_generation,
        "/continue_generation": continue_generation,
        "/update_weights_from_disk": update_weights_from_disk,
        "/init_weights_update_group": init_weights_update_group,
        "/update_weights_from_distributed": update_weights_from_distributed,
        "/destroy_weights_update_group": destroy_weights_update_group,
        "/release_memory_occupation": memory_occupation,
        "/resume_memory_occupation": memory_occupation,
        "/slow_down": slow_down,
    }
    app.add_routes([web.get(path, handler) for path, handler in get.items()])
    app.add_routes([web.post(path, handler) for path, handler in post.items()])
    for path, handler in {"/flush_cache": flush_cache, "/weights_checker": weights_checker}.items():
        app.add_routes([web.route(method, path, handler) for method in ("GET", "POST")])
    return app


@web.middleware
async def _account(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        response = await handler(request)
    except BadRequestError as error:
        response = web.json_response(error.body, status=400)
    except web.HTTPException as error:
        response = error
    responses = request.app[STATE].figures.responses
    known = request.match_info.http_exception is None
    responses[request.path if known else "other", request.method, str(response.status)] += 1
    if isinstance(response, web.HTTPException):
        raise response
    return response


async def _body(request: web.Request) -> dict[str, Any]:
    raw = await request.read()
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise _malformed(f"Invalid JSON body: {error}") from error
    if not isinstance(body, dict):
        raise _malformed("The body must be a JSON object.")
    return body


def _text(body: dict[str, Any], key: str, default: str | None = None) -> str:
    value = body.get(key, default)
    if not isinstance(value, str):
        raise _malformed(f"{key}: a string is required.")
    return value


# Health and information


async def health(request: web.Request) -> web.Response:
    """A real one-token generation; looks once a second, as SGLang's does, so it never answers sooner."""
    state = request.app[STATE]
    if state.starting or state.draining:
        return web.Response(status=503)
    link, began = state.link, time.monotonic()
    sampling = asdict(Sampling(max_new_tokens=1, temperature=0.0))
    probe = asyncio.create_task(link.generate(f"HEALTH_CHECK_{uuid.uuid4().hex}", [0], sampling))
    try:
        while time.monotonic() < began + state.settings.health_timeout_s:
            await asyncio.sleep(1)
            if link.last_output_at > began:
                state.unhealthy = False
                return web.Response()
    finally:
        probe.cancel()
    log.error(
        "Health check failed. Server couldn't get a response from detokenizer for last %g seconds.",
        state.settings.health_timeout_s,
    )
    state.unhealthy = True
    return web.Response(status=503)


async def ready(request: web.Request) -> web.Response:
    """Flags only, pause among them."""
    state = request.app[STATE]
    return web.Response(status=200 if state.up and not state.paused else 503)


async def ping(request: web.Request) -> web.Response:
    """Flags only."""
    return web.Response(status=200 if request.app[STATE].up else 503)


async def model_info(request: web.Request) -> web.Response:
    """What is served, from the parent's memory."""
    state = request.app[STATE]
    return web.json_response(
        {
            "model_path": state.model_path,
            "served_model_name": state.served_model_name,
            "tokenizer_path": state.model_path,
            "is_generation": True,
            "weight_version": state.weight_version,
            "load_format": "auto",
            "model_type": state.shape.model_type,
            "architectures": list(state.shape.architectures),
        }
    )


async def server_info(request: web.Request) -> web.Response:
    """The arguments, and the scheduler's own state: a round trip."""
    state = request.app[STATE]
    reply = await state.link.ask("info")
    return web.json_response(
        {
            **asdict(state.settings),
            "enable_memory_saver": False,
            "launch_command": state.launch_command,
            "version": VERSION,
            "status": "ready" if state.up else "not_ready",
            "max_total_num_tokens": state.settings.max_total_tokens,
            "max_req_input_len": state.shape.context_len - 1,
            "startup_time": state.started_at,
            "internal_states": reply["internal_states"],
        }
    )


async def loads(request: web.Request) -> web.Response:
    """The scheduler's last snapshot and when it was made."""
    state = request.app[STATE]
    load = state.link.load
    used = load.get("num_used_tokens", 0)
    row = {
        "dp_rank": 0,
        "timestamp": load.get("timestamp", state.started_at),
        "num_running_reqs": load.get("num_running_reqs", 0),
        "num_waiting_reqs": load.get("num_waiting_reqs", 0),
        "num_used_tokens": used,
        "max_total_num_tokens": state.settings.max_total_tokens,
        "token_usage": used / state.settings.max_total_tokens,
        "gen_throughput": load.get("gen_throughput", 0.0),
        "cache_hit_rate": 0.0,
    }
    return web.json_response(
        {"timestamp": time.time(), "version": VERSION, "dp_rank_count": 1, "loads": [row]}
    )


async def models(request: web.Request) -> web.Response:
    """OpenAI's list, of one."""
    state = request.app[STATE]
    card = {"id": state.served_model_name, "object": "model", "created": int(state.started_at)}
    card |= {"owned_by": "sglang", "root": state.served_model_name, "max_model_len": state.shape.context_len}
    return web.json_response({"object": "list", "data": [card]})


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' text format; the scheduler's figures are those of its last snapshot."""
    state = request.app[STATE]
    text = render(
        state.figures,
        state.link.load,
        model_name=state.served_model_name,
        capacity_tokens=state.settings.max_total_tokens,
        active=state.in_flight,
        paused=state.link.load.get("num_waiting_reqs", 0) if state.paused else 0,
    )
    return web.Response(text=text)


# Generation


async def generate(request: web.Request) -> web.Response:
    """One prompt gives an object, a list of prompts (or `n` > 1) a list."""
    state = request.app[STATE]
    if state.in_flight >= MAX_OPEN_REQUESTS:
        return web.json_response({"error": {"message": "The request queue is full."}}, status=503)
    body = await _body(request)
    if body.get("stream"):
        raise _invalid("stream is not supported by the embedded server.")
    prompts, single = _prompts(body)
    sampling = _samplings(body, len(prompts))
    rids = _rids(body, len(prompts))
    work = []
    for prompt, params, rid in zip(prompts, sampling, rids, strict=True):
        _check_length(state, prompt, params)
        for copy in range(params.n):
            name = rid if params.n == 1 else f"{rid}_{copy}"
            work.append(_generate_one(state, name, prompt, _seeded(params, copy), body))
    try:
        async with _in_flight(state), asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except* ValueError as errors:
        raise _invalid(str(errors.exceptions[0])) from errors
    results = [task.result() for task in tasks]
    return web.json_response(results[0] if single and len(results) == 1 else results)


@contextlib.asynccontextmanager
async def _in_flight(state: State) -> AsyncIterator[None]:
    state.in_flight += 1
    try:
        yield
    finally:
        state.in_flight -= 1


async def _generate_one(
    state: State, rid: str, prompt: list[int], sampling: Sampling, body: dict[str, Any]
) -> dict[str, Any]:
    began = time.monotonic()
    state.figures.requests_total += 1
    done = await state.link.generate(rid, prompt, asdict(sampling))
    latency_s = time.monotonic() - began
    state.figures.e2e_latency_s.observe(latency_s)
    state.figures.aborted_total += done["finish"]["type"] == "abort"
    meta: dict[str, Any] = {
        "id": rid,
        "finish_reason": done["finish"],
        "prompt_tokens": len(prompt),
        "completion_tokens": len(done["output_ids"]),
        "cached_tokens": 0,
        "weight_version": done["weight_version"],
        "e2e_latency": latency_s,
    }
    if body.get("return_logprob"):
        pairs = zip(done["log_probs"], done["output_ids"], strict=True)
        meta["output_token_logprobs"] = [[log_prob, token, None] for log_prob, token in pairs]
    # There is no tokenizer: the text is the ids, in words.
    return {
        "text": " ".join(map(str, done["output_ids"])),
        "output_ids": done["output_ids"],
        "meta_info": meta,
    }


def _seeded(sampling: Sampling, copy: int) -> Sampling:
    """Copies of one prompt with one seed must still differ."""
    if sampling.sampling_seed is None:
        return sampling
    return Sampling(**(asdict(sampling) | {"sampling_seed": sampling.sampling_seed + copy}))


def _prompts(body: dict[str, Any]) -> tuple[list[list[int]], bool]:
    given = body.get("input_ids")
    if body.get("text") is not None:
        raise _invalid("This server has no tokenizer; give input_ids instead of text.")
    if given is None or given == []:
        raise _invalid("Either text, input_ids or input_embeds should be provided.")
    if not isinstance(given, list):
        raise _malformed("input_ids: a list of integers, or a list of such lists, is required.")
    single = not isinstance(given[0], list)
    prompts = [given] if single else given
    for prompt in prompts:
        if not isinstance(prompt, list) or any(type(token) is not int for token in prompt):
            raise _malformed("input_ids: a list of integers, or a list of such lists, is required.")
    return prompts, single


def _samplings(body: dict[str, Any], count: int) -> list[Sampling]:
    given = body.get("sampling_params") or {}
    each = given if isinstance(given, list) else [given] * count
    if len(each) != count or any(not isinstance(params, dict) for params in each):
        raise _malformed("sampling_params: one object, or a list of one for each prompt, is required.")
    try:
        return [parse_sampling(params) for params in each]
    except UnknownKeyError as error:
        raise BadRequestError({"error": str(error)}) from error
    except (ValueError, TypeError) as error:
        raise _invalid(str(error)) from error


def _rids(body: dict[str, Any], count: int) -> list[str]:
    given = body.get("rid")
    rids = [given] if isinstance(given, str) and count == 1 else given
    if rids is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if not isinstance(rids, list) or len(rids) != count or any(not isinstance(rid, str) for rid in rids):
        raise _malformed("rid: one string for each prompt is required.")
    return rids


def _check_length(state: State, prompt: list[int], sampling: Sampling) -> None:
    context = state.shape.context_len
    if len(prompt) >= context:
        raise _invalid(
            f"The input ({len(prompt)} tokens) is longer than the model's context length ({context} tokens)."
        )
    if len(prompt) + sampling.max_new_tokens > context:
        raise _invalid(
            f"Requested token count exceeds the model's maximum context length of {context} tokens. "
            f"You requested a total of {len(prompt) + sampling.max_new_tokens} tokens: {len(prompt)} tokens "
            f"from the input messages and {sampling.max_new_tokens} tokens for the completion."
        )


async def abort_request(request: web.Request) -> web.Response:
    """200 for any rid, known or not; the aborted call itself gets 200 with what it has."""
    state = request.app[STATE]
    body = await _body(request)
    state.link.abort(None if body.get("abort_all") else _text(body, "rid", ""))
    return web.Response()


# Control


async def pause_generation(request: web.Request) -> web.Response:
    """Idempotent. `abort` ends what runs, `in_place` and `retract` keep it; new requests wait."""
    state = request.app[STATE]
    mode = _text(await _body(request), "mode", "abort")
    if mode not in PAUSE_MODES:
        raise _malformed(f"mode: one of {', '.join(PAUSE_MODES)} is required, got {mode!r}.")
    state.paused = True
    await state.link.ask("pause", mode=mode)
    return web.json_response({"message": "Generation paused successfully.", "status": "ok"})


async def continue_generation(request: web.Request) -> web.Response:
    """Idempotent."""
    state = request.app[STATE]
    await _body(request)
    await state.link.ask("continue")
    state.paused = False
    return web.json_response({"message": "Generation continued successfully.", "status": "ok"})


async def update_weights_from_disk(request: web.Request) -> web.Response:
    """
    Load a directory's weights between two requests; nothing checks that it is the same architecture.

    One load waits for another, but not while paused: then SGLang keeps one promise for both answers, and the
    second answer ends it.
    """
    state = request.app[STATE]
    body = await _body(request)
    path = _text(body, "model_path")
    _abort_first(state, body)
    too_many = state.paused and state.loads > 0
    state.loads += 1
    try:
        reply = await state.link.ask(
            "update_from_disk", model_path=str(Path(path)), weight_version=_optional_version(body)
        )
    finally:
        state.loads -= 1
    if too_many:
        log.error("TokenizerManager hit an exception: asyncio.exceptions.InvalidStateError: invalid state")
        kill_all(state.link)
    if reply["success"]:
        state.model_path = state.served_model_name = path
    return _updated(state, reply)


async def update_weights_from_distributed(request: web.Request) -> web.Response:
    """Take tensors over the group's connection; 400 when this scheduler is not in that group."""
    state = request.app[STATE]
    body = await _body(request)
    lists = {key: body.get(key) for key in ("names", "dtypes", "shapes")}
    if any(not isinstance(value, list) or not value for value in lists.values()):
        raise _malformed("names, dtypes and shapes: lists of equal length are required.")
    _abort_first(state, body)
    name = _text(body, "group_name", "weight_update_group")
    reply = await state.link.ask(
        "update_from_distributed", group_name=name, weight_version=_optional_version(body), **lists
    )
    return _updated(state, reply)


def _abort_first(state: State, body: dict[str, Any]) -> None:
    if body.get("abort_all_requests"):
        state.link.abort(None)


def _optional_version(body: dict[str, Any]) -> str | None:
    return None if body.get("weight_version") is None else _text(body, "weight_version")


def _updated(state: State, reply: Message) -> web.Response:
    state.weight_version = reply["weight_version"]
    answer = {"success": reply["success"], "message": reply["message"], "num_paused_requests": 0}
    return web.json_response(answer, status=200 if reply["success"] else 400)


async def init_weights_update_group(request: web.Request) -> web.Response:
    """Connect to the trainer's listener at master_address:master_port."""
    body = await _body(request)
    port = body.get("master_port")
    if type(port) is not int:
        raise _malformed("master_port: an integer is required.")
    return await _group_call(
        request,
        "join_group",
        group_name=_text(body, "group_name", "weight_update_group"),
        host=_text(body, "master_address"),
        port=port,
    )


async def destroy_weights_update_group(request: web.Request) -> web.Response:
    """Close the group's connection."""
    body = await _body(request)
    return await _group_call(
        request, "leave_group", group_name=_text(body, "group_name", "weight_update_group")
    )


async def _group_call(request: web.Request, operation: str, **fields: Any) -> web.Response:
    reply = await request.app[STATE].link.ask(operation, **fields)
    answer = {"success": reply["success"], "message": reply["message"]}
    return web.json_response(answer, status=200 if reply["success"] else 400)


async def weights_checker(request: web.Request) -> web.Response:
    """A checksum of the served weights; of SGLang's actions this one alone."""
    body = await _body(request) if request.body_exists else {}
    action = _text(body, "action", "checksum")
    if action != "checksum":
        return web.json_response({"success": False, "message": f"Unsupported action: {action}"}, status=400)
    checksums = (await request.app[STATE].link.ask("checksum"))["checksums"]
    rank = hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()
    split: dict[str, str | int] = {"role": "target", "rank": 0, "size": 1}
    for kind in ("tp", "dp", "pp"):
        split |= {f"{kind}_rank": 0, f"{kind}_size": 1}
    return web.json_response(
        {
            "success": True,
            "message": "Success.",
            "ranks": [
                {"checksums": checksums, "per_gpu_checksum": rank, "parallelism_info": [split]},
            ],
            "per_engine_checksum": hashlib.sha256(rank.encode()).hexdigest(),
        }
    )


async def flush_cache(request: web.Request) -> web.Response:
    """There is no cache; what is kept of the contract is the answer when busy."""
    state = request.app[STATE]
    try:
        patience_s = float(request.query.get("timeout", "0"))
    except ValueError as error:
        raise _malformed("timeout: a number of seconds is required.") from error
    deadline = time.monotonic() + patience_s
    while not (await state.link.ask("flush"))["ok"]:
        if time.monotonic() >= deadline:
            return web.Response(text="Flush cache failed.\n", status=400)
        await asyncio.sleep(0.05)
    return web.Response(text="Cache flushed.\n")


async def memory_occupation(request: web.Request) -> web.Response:
    """A no-op with an answer, as in SGLang without --enable-memory-saver."""
    await _body(request)
    await request.app[STATE].link.ask("memory")
    return web.json_response(None)


async def slow_down(request: web.Request) -> web.Response:
    """Sleep this long in every forward pass; null ends it."""
    body = await _body(request)
    sleep_s = body.get("forward_sleep_time")
    if sleep_s is not None and (
        isinstance(sleep_s, bool) or not isinstance(sleep_s, int | float) or sleep_s < 0
    ):
        raise _malformed("forward_sleep_time: seconds, or null, are required.")
    await request.app[STATE].link.ask("slow_down", forward_sleep_time=sleep_s)
    return web.json_response(None)
