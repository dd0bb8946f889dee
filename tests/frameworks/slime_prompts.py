"""Model, tokenizer and prompts of a slime job: four digits to be written again."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stepguard_grpo.model import BOS, EOS, PAD, SEP, VOCAB_SIZE, write_base_model


def write(folder: Path, prompts: int = 400) -> None:
    """`base` (with a tokenizer) and `prompts.jsonl`, in a folder."""
    named = {BOS: "<bos>", SEP: "<sep>", EOS: "<eos>", PAD: "<pad>"}
    words = {named.get(index, str(index)): index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write_base_model(folder / "base", 0)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    ).save_pretrained(folder / "base")
    draw = random.Random(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(prompts):
            digits = " ".join(str(draw.randrange(10)) for _ in range(4))
            file.write(json.dumps({"input": f"<bos> {digits} <sep>", "label": digits}) + "\n")
