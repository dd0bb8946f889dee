"""
A training script as one finds them: it knows nothing of Stepguard, and no line of it is to be changed.

    python train.py OUTPUT_DIR [STEPS]

A policy learns by REINFORCE to answer each of ten prompts with its own number. It logs to W&B, saves in the
layout of Hugging Face's Trainer, and begins again where the newest folder says, whatever is in it.
"""

import json
import sys
import time
from pathlib import Path

import torch
import wandb
from safetensors.torch import load_file, save_file

PROMPTS = 10
BATCH = 64
SAVE_STEPS = 20
STEP_S = 0.02


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest number."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return found[-1] if found else None


def save(
    folder: Path, step: int, policy: torch.nn.Module, optimizer: torch.optim.Optimizer, log: list
) -> None:
    """`checkpoint-<step>`, with the state last."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file(policy.state_dict(), path / "model.safetensors")
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    torch.save({"last_epoch": step}, path / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, path / "rng_state.pth")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))


def main() -> None:
    """Train, from the newest checkpoint where there is one."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 300
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = torch.nn.Embedding(PROMPTS, PROMPTS)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    first, log = 1, []
    resume = newest(folder)
    if resume is not None:
        print(f"resuming from {resume}", flush=True)
        policy.load_state_dict(load_file(resume / "model.safetensors"))
        optimizer.load_state_dict(torch.load(resume / "optimizer.pt", weights_only=True))
        torch.set_rng_state(torch.load(resume / "rng_state.pth", weights_only=True)["cpu"])
        state = json.loads((resume / "trainer_state.json").read_text())
        first, log = state["global_step"] + 1, state["log_history"]
    run = wandb.init(project="unmodified", mode="offline", dir=folder.parent)
    for step in range(first, steps + 1):
        prompts = torch.randint(PROMPTS, (BATCH,))
        answers = torch.distributions.Categorical(logits=policy(prompts))
        chosen = answers.sample()
        reward = (chosen == prompts).float()
        loss = -((reward - reward.mean()) * answers.log_prob(chosen)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        row = {"train/reward": reward.mean().item(), "train/loss": loss.item(), "train/global_step": step}
        run.log(row)
        log.append(row)
        if step % SAVE_STEPS == 0:
            save(folder, step, policy, optimizer, log)
        time.sleep(STEP_S)
    run.finish()


if __name__ == "__main__":
    main()
