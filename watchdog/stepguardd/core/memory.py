"""
Which memory ran out, and what a restarted server is given less (or more) of: a bounded ladder.

Direction-aware, because the same setting helps one kind and causes the other: `--mem-fraction-static` is
what SGLang takes at its start for weights and KV cache.
A run-time shortage on the GPU wants it lower; a start that finds no room for the cache wants it higher; the
host's memory hardly knows it, but knows the requests in flight.
A full KV pool retracts requests and is no crash: nothing is restarted for it.

Pure arithmetic on values: what is unknown (None) is not checked, and said to be so.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final


class Shortage(Enum):
    """Which memory ran out, as far as the remedy differs."""

    HOST = "host memory"
    GPU_RUN = "GPU memory at work"
    GPU_START = "GPU memory at the start"
    POOL = "room for the KV cache at the start"
    SUSPECTED = "memory, perhaps"  # it died again without a word: fewer requests are the cheapest guess


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """A server ran short of this, at this time, and nothing was changed for it yet."""

    at: float
    shortage: Shortage


SHORTAGES: Final = {
    "kernel_host": Shortage.HOST,
    "kernel_cgroup": Shortage.HOST,
    "cgroup_counter": Shortage.HOST,
    "ray_monitor": Shortage.HOST,
    "cuda_start": Shortage.GPU_START,
    "cuda_run": Shortage.GPU_RUN,
    "cuda_unknown": Shortage.GPU_RUN,
    "pool_too_small": Shortage.POOL,
}
"""What each kind of out-of-memory that is seen asks for; a full KV pool asks for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server is given. None: whatever its own command says, or SGLang chooses."""

    mem_fraction: float | None = None
    running: int | None = None
    prefill_tokens: int | None = None
    total_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What has to fit on one GPU, in bytes; None where it is unknown."""

    weights_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    gpu_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The rungs, from the top down, and the least KV cache that is worth serving with."""

    mem_fractions: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    running: tuple[int, ...] = (32, 16, 8)
    min_kv_tokens: int = 8192
    quiet_s: float = 21_600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb:
    """
    Where a server stands on the ladder.

    `own` is what its command gives it; `limits` what it gets now. One that went back up and fell again stays
    down: `rose` is set by the first rise.
    """

    own: Limits = Limits()
    limits: Limits = Limits()
    short_at: float | None = None
    rose: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """The next limits, and why in words; `limits` is None where there is none left, and the words say why."""

    limits: Limits | None
    words: str


_PREFILL_FIRST: Final = 4096
_PREFILL_LEAST: Final = 512


def step(now: Limits, shortage: Shortage, ladder: Ladder, sizes: Sizes) -> Rung:
    """
    The next rung for this shortage.

    Args:
        now: what the server was given when it ran short.
        shortage: of what.
        ladder: the rungs.
        sizes: what has to fit.

    """
    match shortage:
        case Shortage.HOST | Shortage.SUSPECTED:
            return _fewer_requests(now, ladder) or _less_static(now, ladder, sizes)
        case Shortage.GPU_RUN:
            return _less_at_work(now, ladder, sizes)
        case Shortage.POOL:
            return _more_static(now, ladder)
        case Shortage.GPU_START:
            fits = now.mem_fraction is None or refusal(now.mem_fraction, ladder, sizes) is None
            return _less_static(now, ladder, sizes) if fits else _more_static(now, ladder)


def _fewer_requests(now: Limits, ladder: Ladder) -> Rung | None:
    fewer = _below(now.running, ladder.running)
    if fewer is None:
        return None
    return Rung(
        limits=replace(now, running=int(fewer)), words=f"max_running_requests {_was(now.running)} → {fewer:g}"
    )


def _less_static(now: Limits, ladder: Ladder, sizes: Sizes) -> Rung:
    lower = _below(now.mem_fraction, ladder.mem_fractions[1:])
    if lower is None:
        return Rung(
            limits=None, words=f"mem_fraction_static is {_was(now.mem_fraction)}, the last rung of the ladder"
        )
    refused = refusal(lower, ladder, sizes)
    if refused is not None:
        return Rung(limits=None, words=refused)
    words = f"mem_fraction_static {_was(now.mem_fraction)} → {lower:g}"
    return Rung(limits=replace(now, mem_fraction=lower), words=words + _unchecked(sizes))


def _more_static(now: Limits, ladder: Ladder) -> Rung:
    higher = [rung for rung in ladder.mem_fractions if now.mem_fraction is None or rung > now.mem_fraction]
    if now.mem_fraction is None or not higher:
        return Rung(
            limits=None,
            words=f"mem_fraction_static is {_was(now.mem_fraction)}, and the KV cache needs more: "
            "a larger GPU, more tensor parallelism or a smaller model",
        )
    more = min(higher)
    return Rung(
        limits=replace(now, mem_fraction=more),
        words=f"mem_fraction_static {now.mem_fraction:g} → {more:g}: the cache had no room",
    )


def _less_at_work(now: Limits, ladder: Ladder, sizes: Sizes) -> Rung:
    """Both at once: what is static leaves less to work with, and each request works with some."""
    static = _less_static(now, ladder, sizes)
    after = static.limits or now
    fewer = _fewer_requests(after, ladder)
    words = [static.words] if static.limits is not None else []
    if fewer is not None:
        assert fewer.limits is not None
        after = fewer.limits
        words.append(fewer.words)
    if not words:
        chunk = (now.prefill_tokens or 2 * _PREFILL_FIRST) // 2
        if chunk < _PREFILL_LEAST:
            return static
        after = replace(now, prefill_tokens=chunk)
        words.append(f"chunked_prefill_size {_was(now.prefill_tokens)} → {chunk}")
    return Rung(limits=after, words=", ".join(words))


def refusal(mem_fraction: float, ladder: Ladder, sizes: Sizes) -> str | None:
    """Why a share of the GPU cannot hold the weights and the least KV cache, with the sum; None if it can."""
    if sizes.weights_bytes is None or sizes.gpu_bytes is None:
        return None
    cache = ladder.min_kv_tokens * (sizes.kv_bytes_per_token or 0)
    needed, given = sizes.weights_bytes + cache, mem_fraction * sizes.gpu_bytes
    if needed <= given:
        return None
    return (
        f"mem_fraction_static {mem_fraction:g} refused: weights {_gib(sizes.weights_bytes)} + KV cache "
        f"{_gib(cache)} ({ladder.min_kv_tokens} tokens) = {_gib(needed)}, and {mem_fraction:g} of "
        f"{_gib(sizes.gpu_bytes)} is {_gib(given)}"
    )


def up(climb: Climb, ladder: Ladder, now: float) -> Climb | None:
    """
    One step back towards the server's own limits, once, after a quiet period; None where it stays.

    It goes up at a restart that has another cause: a server that is well is not restarted for this.
    """
    if climb.rose or climb.limits == climb.own or climb.short_at is None or ladder.quiet_s <= 0:
        return None
    if now - climb.short_at < ladder.quiet_s:
        return None
    own, limits = climb.own, climb.limits
    higher = Limits(
        mem_fraction=_above(limits.mem_fraction, own.mem_fraction, ladder.mem_fractions),
        running=_whole(_above(limits.running, own.running, ladder.running)),
        prefill_tokens=own.prefill_tokens,
        total_tokens=own.total_tokens,
    )
    return replace(climb, limits=higher, rose=True)


FLAGS: Final = frozenset(
    {
        "--mem-fraction-static",
        "--max-running-requests",
        "--chunked-prefill-size",
        "--max-prefill-tokens",
        "--max-total-tokens",
    }
)
"""What `arguments` may hold."""


def arguments(climb: Climb) -> tuple[tuple[str, str], ...]:
    """SGLang's flags for the limits that are not the server's own."""
    own, limits = climb.own, climb.limits
    named = (
        ("--mem-fraction-static", own.mem_fraction, limits.mem_fraction),
        ("--max-running-requests", own.running, limits.running),
        ("--chunked-prefill-size", own.prefill_tokens, limits.prefill_tokens),
        ("--max-prefill-tokens", own.prefill_tokens, limits.prefill_tokens),
        ("--max-total-tokens", own.total_tokens, limits.total_tokens),
    )
    return tuple((flag, f"{value:g}") for flag, was, value in named if value is not None and value != was)


def advice(shortage: Shortage, limits: Limits) -> str:
    """What the trainer's owner may change, so that the ladder is not needed: the trainers' own names."""
    concurrency = "lower max_concurrent_rollouts" + (
        "" if limits.running is None else f" to {limits.running}"
    )
    match shortage:
        case Shortage.HOST | Shortage.SUSPECTED:
            return f"{concurrency}, or n_samples; raise request_timeout and request_retries to match"
        case Shortage.GPU_RUN:
            return (
                f"{concurrency}, or max_new_tokens; where the trainer shares the GPU, turn on "
                "gradient_checkpointing; max_head_offpolicyness bounds how many rollouts wait"
            )
        case Shortage.GPU_START | Shortage.POOL:
            return (
                "where the trainer shares the GPU, turn on gradient_checkpointing, or give the server its own"
            )


def _below(value: float | None, rungs: tuple[float, ...]) -> float | None:
    """The first rung under a value; the first of all where the value is unknown."""
    return next((rung for rung in rungs if value is None or rung < value - 1e-9), None)


def _above(value: float | None, own: float | None, rungs: tuple[float, ...]) -> float | None:
    """One rung up, and never beyond what the server had; None is its own, whatever that is."""
    if value is None or value == own:
        return own
    higher = [rung for rung in rungs if rung > value + 1e-9 and (own is None or rung < own)]
    return min(higher) if higher else own


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _was(value: float | None) -> str:
    return "unset" if value is None else f"{value:g}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _unchecked(sizes: Sizes) -> str:
    unknown = sizes.weights_bytes is None or sizes.gpu_bytes is None
    return " (not checked against the weights: their size or the GPU's is unknown)" if unknown else ""
