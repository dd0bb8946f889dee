"""
The trainer's current weights, pushed into a server from disk by the daemon.

`/update_weights_from_disk` answers success for whatever loads, so the server's own word on its version is
asked for afterwards.
"""

import json
from pathlib import Path
from typing import Final

import httpx

from ..core.events import Answer
from ..sources.sglang import request, weight_version
from .outcome import Outcome, failed

_INFO_TIMEOUT_S: Final = 5.0


async def push(http: httpx.AsyncClient, *, pattern: str, version: str, timeout_s: float) -> Outcome:
    """
    Load one version's weights into a server and see that it says so.

    Args:
        http: the server's client.
        pattern: the folder of a version, with `{version}` in its place.
        version: the version that the trainer holds.
        timeout_s: for the load.

    """
    if "/" in version or version in {"", ".", ".."}:
        return failed(f"the version {version!r} cannot be a folder's name")
    folder = Path(pattern.replace("{version}", version))
    if not folder.is_dir():
        return failed(f"{folder} is not there; check weights.path")
    info = await request(http, "GET", "/model_info", timeout_s=_INFO_TIMEOUT_S)
    if weight_version(info) == (Answer.OK, version):
        return Outcome(ok=True, detail=f"version {version} was there already", needless=True)
    body = {"model_path": str(folder), "weight_version": version}
    reply = await request(http, "POST", "/update_weights_from_disk", timeout_s=timeout_s, body=body)
    if reply.answer is not Answer.OK:
        return failed(f"/update_weights_from_disk: {reply.answer.value} {_message(reply.body)}".rstrip())
    info = await request(http, "GET", "/model_info", timeout_s=_INFO_TIMEOUT_S)
    answer, served = weight_version(info)
    if answer is not Answer.OK or served != version:
        return failed(f"the server says it serves version {served}, not {version}")
    return Outcome(ok=True, detail=f"version {version}")


def _message(body: bytes) -> str:
    try:
        found = json.loads(body)
        return str(found.get("message", ""))[:200]
    except (ValueError, AttributeError, RecursionError):
        return ""
