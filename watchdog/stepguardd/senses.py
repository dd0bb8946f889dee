"""What `stepguard status` says of the logs, of memory that ran out and of its pressure. Pure."""

from collections.abc import Mapping, Sequence
from typing import Final

from .control.contract import LogDict, OomDict, OomSeenDict, PressureDict
from .core.events import OomKind, OomSeen
from .core.state import State
from .sources.cgroups import Pressure, pressure_warning

OOM_SOURCES: Final[Mapping[OomKind, str]] = {
    OomKind.KERNEL_HOST: "kernel",
    OomKind.KERNEL_CGROUP: "kernel",
    OomKind.CGROUP_COUNTER: "kernel",
    OomKind.RAY_MONITOR: "ray",
    OomKind.CUDA_START: "cuda",
    OomKind.CUDA_RUN: "cuda",
    OomKind.CUDA_UNKNOWN: "cuda",
    OomKind.POOL_TOO_SMALL: "cuda",
    OomKind.KV_FULL: "kv_pool",
}
"""Who notices each kind: four sources, kept apart because each asks for another remedy."""


def ooms(
    kernel: int | None, logged: Mapping[str, int], logs: Sequence[LogDict], state: State, now: float
) -> dict[str, OomDict]:
    """
    Each source: how often memory ran out since the daemon began, and the newest time that is remembered.

    Args:
        kernel: the kernel's kills; None where they cannot be seen.
        logged: what the logs told of, by source.
        logs: how they are followed: where none could be read, what they did not say is unknown.
        state: what the core remembers, of earlier daemons too.
        now: seconds of the monotonic clock.

    """
    newest: dict[str, OomSeenDict] = {}
    for at, oom in state.surroundings.ooms:
        newest[OOM_SOURCES[oom.kind]] = _seen(oom, max(0.0, now - at))
    readable = any(one.get("trouble") is None for one in logs)
    found: dict[str, OomDict] = {}
    for source in dict.fromkeys(OOM_SOURCES.values()):
        count = kernel if source == "kernel" else logged.get(source, 0 if readable else None)
        found[source] = {"count": count, "newest": newest.get(source)}
    return found


def _seen(oom: OomSeen, age_s: float) -> OomSeenDict:
    return {
        "kind": oom.kind.value,
        "role": oom.role.value,
        "server": oom.server,
        "pid": oom.pid,
        "name": oom.name,
        "used_bytes": oom.used_bytes,
        "cgroup": oom.cgroup,
        "gpu": oom.gpu,
        "age_s": round(age_s, 3),
    }


def with_newest(logs: Sequence[LogDict], state: State, now: float) -> list[LogDict]:
    """The logs, each with the newest thing that it said, as far as that is remembered."""
    newest: dict[str | None, LogDict] = {}
    for at, line in state.surroundings.logs:
        newest[line.server] = {
            "sign": line.sign.value,
            "line": line.line,
            "age_s": round(max(0.0, now - at), 3),
        }
    return [{**one, **newest.get(one.get("server"), {})} for one in logs]


def pressure(found: Pressure | None) -> PressureDict | None:
    """PSI as the status has it; None where the kernel keeps none."""
    if found is None:
        return None
    short = pressure_warning(found) is not None
    return {"some_10s": found.some_10s, "full_10s": found.full_10s, "short": short}
