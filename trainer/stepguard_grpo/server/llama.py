"""
Llama inference in numpy: what the scheduler runs.

Promise: the same weights and token ids give bit-identical logits, whatever else is in the batch (each
sequence is a matrix product of its own, of a shape that depends on its length alone). No key-value cache:
sequences here are a dozen tokens long. Not for models of real size.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from stepguard_grpo.server.shape import Shape

Floats = NDArray[np.float32]


def load_weights(model_path: Path) -> dict[str, Floats]:
    """All tensors of `model.safetensors` as float32; raises OSError or SafetensorError."""
    path = model_path / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return {name: np.asarray(value, dtype=np.float32) for name, value in load_file(path).items()}


class Llama:
    """A model in memory. `replace` takes weights as a whole, or raises and changes nothing."""

    def __init__(self, shape: Shape, weights: dict[str, Floats]) -> None:
        self.shape = shape
        self._weights: dict[str, Floats] = {}
        self._cos, self._sin = _rotations(shape)
        self.replace(weights)

    def replace(self, weights: dict[str, Floats]) -> None:
        """Take these weights (all, or some by name); ValueError where one is missing or of another shape."""
        merged = self._weights | {name: _transposed(name, value) for name, value in weights.items()}
        for name in _needed(self.shape):
            if name not in merged:
                raise ValueError(f"{name}: not among the weights")
        for name, value in self._weights.items():
            if merged[name].shape != value.shape:
                raise ValueError(f"{name}: shape {merged[name].shape[::-1]}, not {value.shape[::-1]}")
        self._weights = merged

    def checksums(self) -> dict[str, str]:
        """A checksum of each tensor, by its name."""
        return {
            name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
            for name, value in self._weights.items()
        }

    def logits(self, tokens: NDArray[np.int64]) -> Floats:
        """
        Next-token logits of sequences of one length.

        tokens: [sequences, length]. Returns [sequences, vocabulary]. IndexError for an id outside the
        vocabulary.
        """
        if tokens.min() < 0 or tokens.max() >= self.shape.vocab_size:
            raise IndexError("index out of range in self")
        weights, shape = self._weights, self.shape
        x = weights["model.embed_tokens.weight"][tokens]
        for index in range(shape.layers):
            layer = f"model.layers.{index}."
            normed = self._norm(x, weights[layer + "input_layernorm.weight"])
            x = x + self._attention(normed, layer + "self_attn.")
            normed = self._norm(x, weights[layer + "post_attention_layernorm.weight"])
            gate = normed @ weights[layer + "mlp.gate_proj.weight"]
            inner = gate / (1 + np.exp(-gate)) * (normed @ weights[layer + "mlp.up_proj.weight"])
            x = x + inner @ weights[layer + "mlp.down_proj.weight"]
        last = self._norm(x[:, -1:, :], weights["model.norm.weight"])
        head = weights["model.embed_tokens.weight"].T if shape.tied else weights["lm_head.weight"]
        result: Floats = (last @ head)[:, 0, :]
        return result

    def _norm(self, x: Floats, scale: Floats) -> Floats:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        result: Floats = x / np.sqrt(mean_square + np.float32(self.shape.norm_eps)) * scale
        return result

    def _attention(self, x: Floats, prefix: str) -> Floats:
        count, length, _ = x.shape
        shape = self.shape

        def heads(name: str, heads: int) -> Floats:
            projected = x @ self._weights[f"{prefix}{name}_proj.weight"]
            return projected.reshape(count, length, heads, shape.head_dim).transpose(0, 2, 1, 3)

        query = self._rotate(heads("q", shape.heads))
        key = self._rotate(heads("k", shape.kv_heads))
        value = heads("v", shape.kv_heads)
        if shape.kv_heads != shape.heads:
            key = np.repeat(key, shape.heads // shape.kv_heads, axis=1)
            value = np.repeat(value, shape.heads // shape.kv_heads, axis=1)
        scores = query @ key.transpose(0, 1, 3, 2) / np.float32(np.sqrt(shape.head_dim))
        future = np.triu(np.ones((length, length), dtype=bool), k=1)
        scores = np.where(future, np.float32(-1e30), scores)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ value
        flat = mixed.transpose(0, 2, 1, 3).reshape(count, length, shape.heads * shape.head_dim)
        result: Floats = flat @ self._weights[prefix + "o_proj.weight"]
        return result

    def _rotate(self, x: Floats) -> Floats:
        length, half = x.shape[2], self.shape.head_dim // 2
        turned = np.concatenate((-x[..., half:], x[..., :half]), axis=-1)
        return x * self._cos[:length] + turned * self._sin[:length]


def _rotations(shape: Shape) -> tuple[Floats, Floats]:
    frequencies = shape.rope_theta ** -(np.arange(0, shape.head_dim, 2, dtype=np.float32) / shape.head_dim)
    angles = np.outer(np.arange(shape.context_len, dtype=np.float32), np.tile(frequencies, 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _transposed(name: str, value: Floats) -> Floats:
    """Projections are stored [out, in] and used as [in, out]; transposed once, here."""
    matrix = name.endswith("proj.weight") or name == "lm_head.weight"
    return np.ascontiguousarray(value.T) if matrix else value


def _needed(shape: Shape) -> list[str]:
    layer_names = [
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ]
    names = [f"model.layers.{index}.{name}" for index in range(shape.layers) for name in layer_names]
    return [
        "model.embed_tokens.weight",
        "model.norm.weight",
        *names,
        *([] if shape.tied else ["lm_head.weight"]),
    ]
