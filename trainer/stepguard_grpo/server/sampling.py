"""
Sampling parameters under SGLang's names: which exist, and which are honoured here.

Standard library only: the parent reads it. Keys that SGLang knows and this server does not honour are refused
rather than ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Those that shape text are honoured by making none.
HONOURED = frozenset({
    "ignore_eos", "max_new_tokens", "min_new_tokens", "min_p", "n", "no_stop_trim", "sampling_seed",
    "skip_special_tokens", "spaces_between_special_tokens", "stop_token_ids", "stream_interval",
    "temperature", "top_k", "top_p",
})  # fmt: skip
REFUSED = frozenset({
    "beam_width", "custom_params", "ebnf", "frequency_penalty", "json_schema", "logit_bias",
    "presence_penalty", "regex", "repetition_penalty", "stop", "stop_regex", "structural_tag",
})  # fmt: skip


class UnknownKeyError(ValueError):
    """A key that SGLang does not know either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The validated parameters of one request."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    n: int = 1
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    sampling_seed: int | None = None


def parse_sampling(params: dict[str, Any]) -> Sampling:
    """
    Check and convert; UnknownKeyError for a key that SGLang lacks, ValueError for a value out of range
    or a key not honoured here.
    """
    for key, value in params.items():
        if key in REFUSED and value not in (None, [], {}, 0, 0.0, 1.0, ""):
            raise ValueError(f"{key} is not supported by the embedded server")
        if key not in HONOURED and key not in REFUSED:
            raise UnknownKeyError(f"unknown field `{key}`")
    wanted = {key: params[key] for key in Sampling.__slots__ if params.get(key) is not None}
    wanted["stop_token_ids"] = tuple(wanted.get("stop_token_ids", ()))
    sampling = Sampling(**wanted)
    _check(sampling)
    return sampling


def _check(sampling: Sampling) -> None:
    for key in ("temperature", "top_p", "min_p"):
        value = getattr(sampling, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key} must be a finite number, got {value!r}.")
    for key in ("max_new_tokens", "min_new_tokens", "top_k", "n"):
        value = getattr(sampling, key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key} must be an integer, got {value!r}.")
    if sampling.sampling_seed is not None and not isinstance(sampling.sampling_seed, int):
        raise ValueError(f"sampling_seed must be an integer, got {sampling.sampling_seed!r}.")
    if sampling.temperature < 0:
        raise ValueError(f"temperature must be non-negative, got {sampling.temperature}.")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {sampling.top_p}.")
    if not 0 <= sampling.min_p <= 1:
        raise ValueError(f"min_p must be in [0, 1], got {sampling.min_p}.")
    if sampling.top_k < 1 and sampling.top_k != -1:
        raise ValueError(f"top_k must be -1 (disable) or at least 1, got {sampling.top_k}.")
    if sampling.max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {sampling.max_new_tokens}.")
    if not 0 <= sampling.min_new_tokens <= sampling.max_new_tokens:
        raise ValueError(f"min_new_tokens must be in [0, max_new_tokens], got {sampling.min_new_tokens}.")
    if not 1 <= sampling.n <= 128:
        raise ValueError(f"n must be in [1, 128], got {sampling.n}.")
