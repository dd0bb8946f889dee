"""
The policy: a Llama of about 100,000 parameters over a vocabulary of 16 tokens, stored as Hugging Face stores
one.

`write_base_model` needs numpy and safetensors only and gives the same bytes for the same seed everywhere;
`load_policy` and `save_policy` bring torch and transformers in. There is no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

VOCAB_SIZE = 16
BOS, SEP, EOS, PAD = 10, 11, 12, 13

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10.0,  # sequences are ten tokens long
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "initializer_range": 0.05,
    "dtype": "float32",
}


def parameter_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order in which `write_base_model` draws them."""
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name in ("q", "k", "v", "o"):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def write_base_model(directory: Path, seed: int) -> None:
    """
    Write `config.json` and `model.safetensors` of a policy that has not learnt the task; equal seeds, equal
    bytes.

    In place of pretraining, a copying bias is built in: what attention reads can be written (identities in
    the value and output projections, output rows that resemble the digits' embeddings). Where to look is left
    to learn.
    """
    import numpy as np  # noqa: PLC0415 - callers pay only for what they use
    from safetensors.numpy import save_file  # noqa: PLC0415

    random = np.random.default_rng(seed)
    tensors = {
        name: np.ones(shape, dtype=np.float32)
        if len(shape) == 1
        else (random.standard_normal(shape) * CONFIG["initializer_range"]).astype(np.float32)
        for name, shape in parameter_shapes().items()
    }
    for name, value in tensors.items():
        if name.endswith(("v_proj.weight", "o_proj.weight")):
            np.fill_diagonal(value, value.diagonal() + 1.0)
    tensors["lm_head.weight"][:10] += tensors["model.embed_tokens.weight"][:10]
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def load_policy(directory: Path) -> LlamaForCausalLM:
    """
    The `transformers` model stored in `directory`, in float32.

    Raises OSError when the directory holds no model.
    """
    from safetensors.torch import load_file  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    if not (directory / "config.json").is_file():
        raise OSError(f"{directory}: no config.json, so no model; write one with write_base_model")
    policy = LlamaForCausalLM(LlamaConfig(**json.loads((directory / "config.json").read_text())))
    policy.load_state_dict(load_file(directory / "model.safetensors"))
    return policy


def save_policy(policy: LlamaForCausalLM, directory: Path) -> None:
    """Write `config.json` and `model.safetensors` into `directory`, which must exist."""
    from safetensors.torch import save_file  # noqa: PLC0415

    tensors = {name: value.detach().contiguous() for name, value in policy.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
