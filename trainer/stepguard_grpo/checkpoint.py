"""
Checkpoints in Hugging Face's layout: `checkpoint-<step>/` with weights, optimizer, scheduler, RNG and data
state.

Promise: a directory of that name is whole (it is written under another name, flushed and renamed;
`trainer_state.json` is its last file), and a run resumed from it goes on bit for bit. Every `.pt` file loads
with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepguard_grpo.model import save_policy

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "trainer_state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """What learning changes, besides the step number."""

    policy: LlamaForCausalLM
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler


def save(
    root: Path,
    learner: Learner,
    *,
    step: int,
    data: Mapping[str, int],
    log_history: Sequence[Mapping[str, float]],
    keep: int | None = None,
) -> Path:
    """
    Write `<root>/checkpoint-<step>`, replacing one of that name, and delete the oldest beyond `keep`.

    data: where in the data the next step begins. Returns the directory.
    """
    root.mkdir(parents=True, exist_ok=True)
    path, fresh, old = root / f"checkpoint-{step}", root / f".new-{step}", root / f".old-{step}"
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    save_policy(learner.policy, fresh)
    torch.save(learner.optimizer.state_dict(), fresh / "optimizer.pt")
    torch.save(learner.scheduler.state_dict(), fresh / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, fresh / "rng_state.pth")
    state = {"global_step": step, "data": dict(data), "log_history": list(log_history)}
    (fresh / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    for file in fresh.iterdir():
        _flush(file)
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    _flush(root)
    shutil.rmtree(old, ignore_errors=True)
    if keep is not None:
        for step_kept in sorted(steps(root))[:-keep]:
            shutil.rmtree(root / f"checkpoint-{step_kept}")
    return path


def load(path: Path, learner: Learner) -> dict[str, Any]:
    """
    Load a checkpoint into the learner and the RNG; returns `trainer_state.json`.

    Raises OSError when a file is missing, ValueError when the state is not one.
    """
    from safetensors.torch import load_file  # noqa: PLC0415 - beside torch, for those who only list checkpoints

    state = json.loads((path / STATE_FILE).read_text())
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        raise ValueError(f"{path / STATE_FILE}: no global_step; not a checkpoint of this trainer")
    learner.policy.load_state_dict(load_file(path / "model.safetensors"))
    learner.optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True))
    learner.scheduler.load_state_dict(torch.load(path / "scheduler.pt", weights_only=True))
    torch.set_rng_state(torch.load(path / "rng_state.pth", weights_only=True)["cpu"])
    return state


def steps(root: Path) -> list[int]:
    """The steps of all complete checkpoints, in no order."""
    if not root.is_dir():
        return []
    found = [(NAME.fullmatch(entry.name), entry) for entry in root.iterdir()]
    return [int(match[1]) for match, entry in found if match and (entry / STATE_FILE).is_file()]


def newest(root: Path, *, at_most: int | None = None) -> Path | None:
    """The newest complete checkpoint, or the newest that is no newer than a step."""
    candidates = [step for step in steps(root) if at_most is None or step <= at_most]
    return root / f"checkpoint-{max(candidates)}" if candidates else None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
