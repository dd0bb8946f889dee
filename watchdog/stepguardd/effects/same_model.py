"""
Whether a folder of weights is of the model that a server serves: their `config.json` side by side.

SGLang loads whatever fits into its tensors and answers success, for another architecture too (0.5.23).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

CONFIG_BYTES_MAX: Final = 4 << 20

# What decides over the tensors' names and shapes, or over what is computed with them.
_SHAPING: Final = (
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "hidden_act",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_routed_experts",
    "q_lora_rank",
    "kv_lora_rank",
)

Shape = Mapping[str, object]


def read(folder: Path) -> Shape | None:
    """What a folder's `config.json` says of the model's shape; None where there is none to read."""
    try:
        with (folder / "config.json").open("rb") as file:
            found = json.loads(file.read(CONFIG_BYTES_MAX))
    except (OSError, ValueError, RecursionError):
        return None
    return shape_of(found)


def shape_of(config: object) -> Shape | None:
    """The shaping keys of a config, those of a vision model's text part too; None for what is none."""
    if not isinstance(config, dict):
        return None
    inner = config.get("text_config")
    whole = {**inner, **config} if isinstance(inner, dict) else config
    return {key: whole[key] for key in _SHAPING if whole.get(key) is not None}


def difference(new: Shape, served: Iterable[Shape | None]) -> str | None:
    """
    How the new weights' model differs from the served one, in words; None where no key says so.

    Args:
        new: of the folder that is to be loaded.
        served: what is known of the served model, the surest first; only keys that both have are compared.

    """
    for known in served:
        if known is None:
            continue
        for key in _SHAPING:
            if key in new and key in known and new[key] != known[key]:
                return f"{key} is {_short(new[key])}, and {_short(known[key])} in the server"
    return None


def _short(value: object) -> str:
    return json.dumps(value, default=str)[:100]
