"""The inference servers: do they answer, what do they say, is their tree whole, do requests reach them."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import httpx

from ..core.signs import Sign
from ..sources.signatures import SIGNATURES
from .findings import Finding, bad, ok, warn
from .machine import FoundServer, Machine, Process

TIMEOUT_S: Final = 3.0
GENERATE_TIMEOUT_S: Final = 30.0
LOG_TAIL_BYTES: Final = 1 << 20
_BODY_BYTES_MAX: Final = 1 << 20
_KV_FULL: Final = 0.95
_TROUBLE: Final = {
    Sign.CONNECTION_REFUSED: "refused connections",
    Sign.CONNECTION_RESET: "connections that were cut",
    Sign.CUDA_OOM: "CUDA out of memory",
    Sign.CUDA_ERROR: "CUDA errors",
    Sign.SCHEDULER_CRASHED: "crashes of a scheduler",
    Sign.SCHEDULER_EXCEPTION: "exceptions in a scheduler",
    Sign.SCHEDULER_HUNG: "hangs of a scheduler",
    Sign.KV_EXHAUSTED: "retractions for a full KV cache",
    Sign.NCCL_TIMEOUT: "NCCL timeouts",
    Sign.NCCL_ERROR: "NCCL errors",
    Sign.RAY_ACTOR_DIED: "dead Ray actors",
    Sign.RAY_MEMORY_KILL: "Ray's kills for memory",
    Sign.DISK_FULL: "a full disk",
}
_STATES: Final = {
    "Z": "dead and not reaped",
    "T": "stopped",
    "t": "held by a debugger",
    "D": "waiting for a disk",
}


def check_servers(machine: Machine, *, generate: bool) -> Iterator[Finding]:
    """
    Everything about the servers that were found.

    Args:
        machine: what was found.
        generate: also have each server generate one token, which a busy or paused one may not do in time.

    """
    if not machine.servers:
        yield warn(
            "server",
            "none",
            "no SGLang server runs here, or it may not be seen",
            "run this as the server's user, on its node and in its container",
        )
    for server in machine.servers:
        yield from _answers(server, generate=generate)
        yield from _tree(server)
    for orphan in machine.orphans:
        yield bad(
            "process tree",
            f"pid {orphan.pid}",
            f"{orphan.comm} without a server: it may hold GPU memory and a port",
            f"see that nobody needs it, then: kill -9 {orphan.pid}",
        )
    for name, path in machine.logs.items():
        yield _log(name, path)


def _answers(server: FoundServer, *, generate: bool) -> Iterator[Finding]:
    subject = f"{server.host}:{server.port} (pid {server.process.pid})"
    with httpx.Client(
        base_url=server.url, timeout=TIMEOUT_S, trust_env=False, follow_redirects=False
    ) as http:
        info = _get(http, "/model_info")
        if isinstance(info, str) or info.status_code != 200:
            why = info if isinstance(info, str) else f"HTTP {info.status_code}"
            yield bad(
                "server",
                subject,
                f"does not answer /model_info: {why}",
                "see its log; with a daemon: stepguard restart-server",
            )
            return
        ready, metrics = _get(http, "/ready"), _get(http, "/metrics")
        yield _state(subject, ready, info, metrics)
        if isinstance(metrics, str) or metrics.status_code != 200:
            yield warn(
                "server",
                subject,
                "offers no /metrics: a hang is seen late, without its token counts",
                "start it with --enable-metrics",
            )
        if generate:
            yield _generates(http, subject)
    command = server.process.command
    open_to_all = "0.0.0.0" in command or "--host=0.0.0.0" in command  # noqa: S104 - compared, not bound
    if open_to_all and not any(argument.startswith("--api-key") for argument in command):
        yield warn(
            "server",
            subject,
            "listens to the whole network, and its API has no password",
            "start it with --host 127.0.0.1, or behind a firewall",
        )


def _state(
    subject: str, ready: httpx.Response | str, info: httpx.Response, metrics: httpx.Response | str
) -> Finding:
    told: list[str] = []
    try:
        fields = json.loads(info.content[:_BODY_BYTES_MAX])
        version = fields.get("weight_version") if isinstance(fields, dict) else None
    except ValueError:
        version = None
    if version is not None:
        told.append(f"weights {version}")
    figures = {} if isinstance(metrics, str) else _figures(metrics.text)
    for name, label in (("num_running_reqs", "running"), ("num_queue_reqs", "queued")):
        if name in figures:
            told.append(f"{figures[name]:.0f} {label}")
    usage = figures.get("token_usage")
    if usage is not None:
        told.append(f"KV cache {usage:.0%} full")
    words = ", ".join(told) or "it says nothing of itself"
    if not isinstance(ready, str) and ready.status_code == 503:
        return warn(
            "server",
            subject,
            f"not ready: paused, draining or starting; {words}",
            "if no weight update is under way: POST /continue_generation, or restart it",
        )
    if usage is not None and usage >= _KV_FULL:
        return warn(
            "server", subject, words, "lower --max-running-requests or the response length, or add KV memory"
        )
    return ok("server", subject, f"answers: {words}")


def _generates(http: httpx.Client, subject: str) -> Finding:
    """The one proof of a scheduler's life: every other endpoint answers with a frozen one."""
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
    try:
        reply = http.post("/generate", json=body, timeout=GENERATE_TIMEOUT_S)
    except httpx.HTTPError as error:
        return bad(
            "generation",
            subject,
            f"did not generate a token within {GENERATE_TIMEOUT_S:g} s ({type(error).__name__})",
            "it hangs or is paused; see its log and `py-spy dump` of its scheduler",
        )
    if reply.status_code != 200:
        return bad("generation", subject, f"HTTP {reply.status_code} to one token", "see its log")
    return ok("generation", subject, "generated a token")


def _get(http: httpx.Client, path: str) -> httpx.Response | str:
    try:
        return http.get(path)
    except httpx.ConnectError:
        return "nothing listens there"
    except httpx.TimeoutException:
        return f"no answer within {TIMEOUT_S:g} s"
    except httpx.HTTPError as error:
        return type(error).__name__


def _figures(text: str) -> dict[str, float]:
    """Gauges by name; of several ranks the sum, and of shares the greatest."""
    found: dict[str, float] = {}
    for line in text[:_BODY_BYTES_MAX].splitlines():
        name, colon, rest = line.partition(":")
        if name != "sglang" or not colon:
            continue
        key = rest.partition("{")[0].partition(" ")[0]
        try:
            value = float(rest.rpartition(" ")[2])
        except ValueError:
            continue
        found[key] = max(value, found.get(key, 0.0)) if key == "token_usage" else value + found.get(key, 0.0)
    return found


def _tree(server: FoundServer) -> Iterator[Finding]:
    subject = f"port {server.port}"
    odd = [part for part in server.tree if part.state in _STATES and part.state != "D"]
    for part in odd:
        yield bad(
            "process tree",
            f"{subject}, pid {part.pid}",
            f"{part.comm} is {_STATES[part.state]}",
            f"kill -CONT {part.pid}"
            if part.state == "T"
            else "find who holds or left it, or restart the server",
        )
    roles = [_role(part) for part in server.tree]
    schedulers = roles.count("scheduler")
    if server.real and schedulers == 0 and len(server.tree) > 1:
        yield bad(
            "process tree", subject, "no scheduler lives: nothing can be generated", "restart the server"
        )
    elif not odd:
        held = sum(part.rss_bytes or 0 for part in server.tree)
        yield ok(
            "process tree",
            subject,
            f"{len(server.tree)} processes, {size(held)} of host memory; schedulers: {schedulers}",
        )


def _role(process: Process) -> str:
    title = process.command[0] if process.command else process.comm
    for role in ("scheduler", "detokenizer"):
        if role in title or process.comm.endswith(role[:7]) or f"::{role}" in process.line:
            return role
    return "scheduler" if "scheduler" in process.line else "other"


def _log(name: str, path: Path) -> Finding:
    """Known signs of trouble in the end of a log."""
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, 2)
            file.seek(max(0, size_bytes - LOG_TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError as error:
        return warn(
            "log", name, f"{path} cannot be read: {error.strerror}", "run this as its owner, or as root"
        )
    counts: dict[Sign, int] = {}
    for line in lines:
        for signature in SIGNATURES:
            if signature.needle in line and signature.sign in _TROUBLE and signature.facts(line) is not None:
                counts[signature.sign] = counts.get(signature.sign, 0) + 1
                break
    if not counts:
        return ok("log", name, f"no known sign of trouble in the last {len(lines)} lines of {path}")
    told = ", ".join(f"{count} × {_TROUBLE[sign]}" for sign, count in counts.items())
    return warn("log", name, f"{told}, in the last {len(lines)} lines", f"stepguard diagnose {path}")


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit in {"B", "KiB"} or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def flag(command: Sequence[str], *names: str) -> str | None:
    """The value of the first of these options that a command has, in any spelling of `-` and `_`."""
    wanted = {re.sub(r"[-_]", "", name.lower()) for name in names}
    for at, argument in enumerate(command):
        name, equals, value = argument.partition("=")
        if re.sub(r"[-_]", "", name.lstrip("-+").lower()) in wanted:
            if equals:
                return value
            return command[at + 1] if at + 1 < len(command) else None
    return None
