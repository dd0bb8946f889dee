"""
Where metrics go: `<run_root>/metrics.jsonl`, W&B, and a line on stdout now and then.

Promise: a row is in the JSONL file when `log` returns, and in W&B's local log within a fraction of a second
(rows are logged without an explicit step, which would keep each one back until the next). W&B is offline
unless WANDB_MODE says otherwise; its other variables are honoured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STDOUT_EVERY_STEPS = 10
REWARD = "grpo_actor/task_reward/avg"


class Tracker:
    """Takes one row of metrics a step."""

    def __init__(self, run_root: Path, *, wandb: bool, config: Mapping[str, Any]) -> None:
        self._file = (run_root / "metrics.jsonl").open("a")
        self._run = _start_wandb(run_root, config) if wandb else None

    def log(self, row: Mapping[str, float | None], *, step: int, of_steps: int) -> None:
        """Write a row; None is null."""
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()
        if self._run is not None:
            self._run.log(dict(row))
        if step % STDOUT_EVERY_STEPS == 0 or step == of_steps:
            reward = row.get(REWARD)
            shown = "none" if reward is None else f"{reward:.3f}"
            print(f"step {step}/{of_steps}  reward {shown}  loss {row['grpo_actor/loss']:+.4f}", flush=True)

    def close(self) -> None:
        """Finish the W&B run."""
        self._file.close()
        if self._run is not None:
            self._run.finish()


def _start_wandb(run_root: Path, config: Mapping[str, Any]) -> Any:
    import wandb  # noqa: PLC0415 - half a second and 50 MB, and optional

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "stepguard-grpo"),
        mode=None if "WANDB_MODE" in os.environ else "offline",
        dir=os.environ.get("WANDB_DIR", str(run_root)),
        config=dict(config),
        settings=wandb.Settings(x_transaction_log_flush_interval=0.2, console="off", silent=True),
    )
    run.define_metric("*", step_metric="train/global_step")
    return run
