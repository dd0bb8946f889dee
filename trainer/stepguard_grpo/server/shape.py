"""
What a model directory's `config.json` says about sizes; standard library only, so that the parent stays
light.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes that the computation needs, out of `config.json`."""

    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_len: int
    eos_token_id: int | None
    norm_eps: float
    rope_theta: float
    tied: bool


def read_shape(model_path: Path) -> Shape:
    """
    Read `config.json`.

    Raises OSError when it is not there, KeyError or ValueError when it describes no Llama-like model.
    """
    config: dict[str, Any] = json.loads((model_path / "config.json").read_text())
    heads = int(config["num_attention_heads"])
    rope = config.get("rope_parameters") or {}
    return Shape(
        model_type=str(config.get("model_type", "llama")),
        architectures=tuple(config.get("architectures") or ("LlamaForCausalLM",)),
        vocab_size=int(config["vocab_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        context_len=int(config["max_position_embeddings"]),
        eos_token_id=config.get("eos_token_id"),
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        tied=bool(config.get("tie_word_embeddings", False)),
    )
