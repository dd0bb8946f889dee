"""
The trainer's current weights, pushed into a server from disk by the daemon; and what weights show.

`/update_weights_from_disk` answers success for whatever loads, and 400 with the weights changed all the same
where requests run in a paused server (SGLang 0.5.23). So the model's `config.json` is compared before, and
the server's own word on its version is asked for afterwards, whatever the answer was.
"""

import asyncio
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Final

import aiohttp

from ..core.events import Answer, GreedyToken, WeightsLook
from ..sources.sglang import Reply, request, weight_version
from . import same_model
from .outcome import Outcome, failed

GREEDY_TOKENS: Final = 8
CHECKSUM_BYTES_MAX: Final = 16 << 20
"""One line for each tensor and rank: a large mixture of experts says some megabytes."""

_INFO_TIMEOUT_S: Final = 5.0
_IDS: Final = (1, 2, 3)  # in any vocabulary: one id outside of it kills a CPU server


async def push(
    http: aiohttp.ClientSession,
    *,
    pattern: str,
    version: str,
    timeout_s: float,
    base: Path | None = None,
    anew: bool = False,
) -> Outcome:
    """
    Load one version's weights into a server and see that it says so.

    What still runs in the server is ended by it: those requests have the wrong weights.

    Args:
        http: the server's client.
        pattern: the folder of a version, with `{version}` in its place, or `{version:06d}` for a number.
        version: the version that the trainer holds.
        timeout_s: for the load.
        base: the folder that the server's own command names, where it is one on this machine.
        anew: load them also where the server says this version already.

    """
    if "/" in version or version in {"", ".", ".."}:
        return failed(f"the version {version!r} cannot be a folder's name")
    if "{version:" in pattern and not version.isdecimal():
        return failed(f"the version {version!r} is no number, as weights.path wants it ({pattern})")
    folder = Path(pattern.format(version=int(version) if "{version:" in pattern else version))
    if not folder.is_dir():
        return failed(f"{folder} is not there; check weights.path")
    info = await request(http, "GET", "/model_info", timeout_s=_INFO_TIMEOUT_S)
    if weight_version(info) == (Answer.OK, version) and not anew:
        return Outcome(ok=True, detail=f"version {version} was there already", needless=True)
    other = await asyncio.to_thread(_another_model, folder, info, base)
    if other is not None:
        return failed(f"{folder} is of another model: {other}; nothing was loaded")
    body = {"model_path": str(folder), "weight_version": version, "abort_all_requests": True}
    reply = await request(http, "POST", "/update_weights_from_disk", timeout_s=timeout_s, body=body)
    said = "" if reply.answer is Answer.OK else f"{reply.answer.value} {_message(reply.body)}".rstrip()
    if reply.answer in {Answer.REFUSED, Answer.NOT_OFFERED}:
        return failed(f"/update_weights_from_disk: {said}")
    info = await request(http, "GET", "/model_info", timeout_s=_INFO_TIMEOUT_S)
    answer, served = weight_version(info)
    if answer is not Answer.OK or served != version:
        quoted = f"; /update_weights_from_disk: {said}" if said else ""
        return failed(f"the server says it serves version {served}, not {version}{quoted}")
    return Outcome(ok=True, detail=f"version {version}" + (f", though it answered: {said}" if said else ""))


def _another_model(folder: Path, info: Reply, base: Path | None) -> str | None:
    new = same_model.read(folder)
    if new is None:
        return None  # a folder of tensors alone: the greedy answer has to tell
    told = _object(info)
    path = told.get("model_path")
    served = [
        same_model.read(Path(path)) if isinstance(path, str) and path.startswith("/") else None,
        None if base is None else same_model.read(base),
        same_model.shape_of(told),
    ]
    return same_model.difference(new, served)


async def compare(
    server: tuple[str, aiohttp.ClientSession],
    other: tuple[str, aiohttp.ClientSession] | None,
    *,
    timeout_s: float,
) -> Outcome:
    """
    What the weights of a server show of themselves, and of another one; what cannot be learned is unknown.

    Args:
        server: a name and its client.
        other: another one that is to serve the same version.
        timeout_s: for the answer, and again for the checksum.

    """
    both = [server] if other is None else [server, other]
    # A checksum reads all weights; without another one to compare it with it is worth nothing.
    looks = await asyncio.gather(
        *(look(name, http, checksum=len(both) == 2, timeout_s=timeout_s) for name, http in both)
    )
    return Outcome(ok=True, looks=tuple(looks))


async def look(name: str, http: aiohttp.ClientSession, *, checksum: bool, timeout_s: float) -> WeightsLook:
    """One server's part of `compare`."""
    before = await _version(http)
    body = {
        "input_ids": list(_IDS),
        "sampling_params": {"max_new_tokens": GREEDY_TOKENS, "temperature": 0.0, "ignore_eos": True},
        "return_logprob": True,
    }
    said = await request(http, "POST", "/generate", timeout_s=timeout_s, body=body)
    sums: tuple[str | None, str | None] = (None, None)
    if checksum:
        reply = await request(
            http,
            "POST",
            "/weights_checker",
            timeout_s=timeout_s,
            body={"action": "checksum"},
            body_bytes_max=CHECKSUM_BYTES_MAX,
        )
        sums = await asyncio.to_thread(read_checksum, reply)
    same = before is not None and await _version(http) == before
    return WeightsLook(
        server=name,
        version=before if same else None,
        checksum=sums[0],
        layout=sums[1],
        greedy=read_greedy(said),
    )


async def _version(http: aiohttp.ClientSession) -> str | None:
    return weight_version(await request(http, "GET", "/model_info", timeout_s=_INFO_TIMEOUT_S))[1]


def read_greedy(reply: Reply) -> tuple[GreedyToken, ...]:
    """The tokens of a whole greedy answer; empty for one that was cut short, or is none."""
    found = _object(reply)
    try:
        meta, ids = found["meta_info"], found["output_ids"]
        whole = meta["finish_reason"]["type"] != "abort" and len(ids) == GREEDY_TOKENS
        pairs = meta.get("output_token_logprobs") or [[None]] * len(ids)
        if not whole or len(pairs) != len(ids):
            return ()
        return tuple(
            GreedyToken(token=int(token), log_prob=_finite(pair[0]))
            for token, pair in zip(ids, pairs, strict=True)
        )
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
        return ()


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def read_checksum(reply: Reply) -> tuple[str | None, str | None]:
    """The checksum of all of a server's weights, and how they are split; None where it does not offer it."""
    found = _object(reply)
    checksum = found.get("per_engine_checksum")
    if not isinstance(checksum, str) or not checksum:
        return None, None
    ranks = found.get("ranks")
    told = [rank for rank in ranks if isinstance(rank, dict)] if isinstance(ranks, list) else []
    layout = json.dumps([rank.get("parallelism_info") for rank in told], sort_keys=True)
    return checksum[:128], hashlib.sha256(layout.encode()).hexdigest()


def _object(reply: Reply) -> dict[str, Any]:
    if reply.answer is not Answer.OK:
        return {}
    try:
        found = json.loads(reply.body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _message(body: bytes) -> str:
    try:
        found = json.loads(body)
        return str(found.get("message", ""))[:200]
    except (ValueError, AttributeError, RecursionError):
        return ""
