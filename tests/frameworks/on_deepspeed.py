"""
The callback on TRL over the real DeepSpeed: `on_deepspeed.py FOLDER`, in a process of its own.

ZeRO stage 2 on the CPU, in one process, as accelerate allows no more there. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

# As `accelerate launch --use_deepspeed` sets them; read on import.
os.environ |= {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
}

import deepspeed.ops
import torch.distributed
import transformers

from frameworks.tiny_trl import Reward, copied, same, tiny_trainer, weights
from guard.virtual_daemon import VirtualDaemon, VirtualTime, virtual_guard
from stepguard.gate import Order
from stepguard.integrations.trl import StepguardCallback
from stepguard.orders import RollbackRequested

# Memory shared between ranks, of which there is one: DeepSpeed would compile that for a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

SETTINGS = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}


class Run:
    """A trainer over DeepSpeed, guarded by a daemon on a virtual clock."""

    def __init__(self, folder: Path, reward: Reward = copied, **options: Any) -> None:
        (folder / "run").mkdir(parents=True)
        self.time = VirtualTime()
        self.daemon = VirtualDaemon(folder / "run", self.time)
        self.trainer = tiny_trainer(
            folder / "out",
            reward=reward,
            deepspeed=SETTINGS,
            optim="adamw_torch",
            use_cpu=False,
            **options,
        )
        assert self.trainer.is_deepspeed_enabled
        self.callback = StepguardCallback(self.trainer, virtual_guard(self.daemon.run_dir, self.time))

    def add(self, event: str, act: Callable[[int], object]) -> None:
        """Do this on an event of the trainer's, with the number of the step that is under way."""
        watcher = transformers.TrainerCallback()
        setattr(watcher, event, lambda args, state, control, **more: act(state.global_step + 1))
        self.trainer.add_callback(watcher)

    def state(self) -> dict[str, Any]:
        """Weights, and what DeepSpeed keeps for its optimizer, by name."""
        found = weights(self.trainer)
        engine = getattr(self.trainer, "deepspeed", None)
        optimizer = {} if engine is None else engine.optimizer.optimizer.state
        for index, kept in enumerate(optimizer.values()):
            found |= {f"{index}.{name}": torch.as_tensor(value).clone() for name, value in kept.items()}
        return found

    def steps(self) -> list[int]:
        return [report["step"] for report in self.daemon.of_kind("step")]

    def close(self) -> None:
        self.callback.guard.close()
        self.daemon.close()


def refused(folder: Path) -> dict[str, Any]:
    """Rewards of 0 at step 4, twice, as from a server that is away."""
    calls: list[dict[str, Any]] = []

    def reward(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
        calls.append(run.state())
        return [0.0] * len(prompts) if len(calls) in {4, 5} else copied(prompts, completions)

    def judge(batch: dict[str, Any]) -> str | None:
        if len(calls) not in {4, 5}:
            return None
        run.time.after(20, lambda: run.daemon.order(Order.GO))
        return "reward_collapse"

    with closing(Run(folder, reward, max_steps=6)) as run:
        run.daemon.judge = judge
        run.trainer.add_callback(run.callback)
        run.trainer.train()
        return {
            "refused": run.callback.refused,
            "batches": [batch["step"] for batch in run.daemon.of_kind("batch")],
            "unmoved": same(calls[3], calls[4]) and same(calls[4], calls[5]),
            "moved_by_a_step": not same(calls[2], calls[3]) and not same(calls[5], calls[6]),
            "kept_for_the_optimizer": sum(name[0].isdigit() for name in calls[3]),
        }


def held(folder: Path) -> dict[str, Any]:
    """HOLD for 30 s while step 4 is generated; and whether weights moved before the trainer's own hook."""
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
        if run.trainer.state.global_step == 3:
            seen["held"] = run.state()
            run.daemon.order(Order.HOLD, "server_dead")
            run.time.after(30, release)
        return copied(prompts, completions)

    def release() -> None:
        seen["released"] = run.state()
        run.daemon.order(Order.GO)

    def before_step(step: int) -> None:
        if step == 4:
            seen["at_the_hook"] = run.state()

    with closing(Run(folder, reward, max_steps=5)) as run:
        run.add("on_pre_optimizer_step", before_step)
        run.trainer.add_callback(run.callback)
        run.trainer.train()
        return {
            "unmoved_while_held": same(seen["held"], seen["released"]),
            "moved_before_the_hook": not same(seen["released"], seen["at_the_hook"]),
            "acks": [ack["order"] for ack in run.daemon.of_kind("ack")],
            "steps": run.steps(),
        }


def rolled_back(folder: Path) -> dict[str, Any]:
    """ROLLBACK at the begin of step 5, to the checkpoint of step 2, and the run resumed from it."""
    target = str(folder / "out" / "checkpoint-2")
    ordered: list[int] = []

    def order(step: int) -> None:
        if step == 5 and not ordered:
            ordered.append(step)
            run.daemon.order(Order.ROLLBACK, target_step=2, target_path=target)

    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    with closing(Run(folder, **saves)) as run:
        run.add("on_step_begin", order)
        run.trainer.add_callback(run.callback)
        try:
            run.trainer.train()
            found: dict[str, Any] = {}
        except RollbackRequested as asked:
            found = {"path": asked.path == target, "reloaded": asked.reloaded}
        found["steps"] = run.steps()
    # As the job started again; of one trainer, transformers trains no second time over DeepSpeed.
    with closing(Run(folder / "again", output_dir=str(folder / "out"), **saves)) as again:
        again.trainer.add_callback(again.callback)
        again.trainer.train(resume_from_checkpoint=target)
        return found | {"steps_again": again.steps()}


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as store:
        at = Path(store) / "store"
        torch.distributed.init_process_group("gloo", init_method=f"file://{at}", rank=0, world_size=1)
        scenarios = (refused, held, rolled_back)
        print(json.dumps({one.__name__: one(folder / one.__name__) for one in scenarios}))
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
