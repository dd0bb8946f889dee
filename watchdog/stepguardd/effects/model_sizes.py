"""What a model needs on each GPU, by its files: unknown where they cannot be read, never guessed."""

import json
from pathlib import Path
from typing import Any, Final

from ..core.memory import Sizes
from .backends.contract import value_of

_DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


def sizes(command: tuple[str, ...], *, cwd: Path | None, gpu_gib: float | None) -> Sizes:
    """
    The sizes out of a server's command line and its model's folder.

    Args:
        command: SGLang's command; `--model-path` and `--tp-size` are read of it.
        cwd: what a relative model path is relative to.
        gpu_gib: the memory of one GPU; None where nobody said.

    """
    gpu_bytes = None if gpu_gib is None else int(gpu_gib * 2**30)
    path = value_of(command, "--model-path") or value_of(command, "--model")
    tp = value_of(command, "--tp-size") or value_of(command, "--tensor-parallel-size") or "1"
    if path is None or not tp.isdecimal() or not int(tp):
        return Sizes(gpu_bytes=gpu_bytes)
    folder = (cwd or Path()) / path
    try:
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        per_token = _kv_bytes(config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return Sizes(gpu_bytes=gpu_bytes)
    return Sizes(
        weights_bytes=weights // int(tp) if weights else None,
        kv_bytes_per_token=per_token // int(tp),
        gpu_bytes=gpu_bytes,
    )


def _kv_bytes(config: dict[str, Any]) -> int:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    width = _DTYPE_BYTES.get(str(config.get("torch_dtype") or config.get("dtype")), 2)
    return 2 * int(config["num_hidden_layers"]) * kv_heads * head_dim * width
