"""TRL's real GRPOTrainer with a policy of 76 thousand parameters that learns to copy a digit."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

WORDS = ["<pad>", "<eos>", "<unk>", "copy", *map(str, range(10))]
Reward = Callable[..., Sequence[float | None]]


def copied(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
    """1 where the first word is the digit that was asked for."""
    return [
        float(completion.split()[:1] == prompt.split()[-1:])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def policy() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )


def tiny_trainer(folder: Path, *, reward: Reward = copied, **options: Any) -> GRPOTrainer:
    """A trainer of 32 completions a step, 8 a prompt, on one thread."""
    torch.set_num_threads(1)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "num_generations": 8,
        "max_completion_length": 1,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    return GRPOTrainer(
        model=policy(),
        reward_funcs=reward,
        args=GRPOConfig(**(arguments | options)),
        train_dataset=Dataset.from_dict({"prompt": [f"copy {index % 10}" for index in range(400)]}),
        processing_class=tokenizer(),
    )


def weights(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
