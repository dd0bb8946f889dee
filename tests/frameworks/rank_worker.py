"""
One rank of a guarded run over gloo: `rank_worker.py RUN_DIR RECORD WHAT`, in torch.distributed's environment.

WHAT is `bare` (the guard's calls alone), `trl` (TRL's GRPOTrainer) or `dies` (bare, and rank 1 is killed at
step 4). Each rank appends one line a gate to `RECORD.<rank>`: the step, and CLOCK_MONOTONIC on both sides.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from guard.virtual_daemon import BOOT
from stepguard import Guard, RollbackRequested, StopRequested
from stepguard.integrations.ranks import over_gloo

STEPS = 8


def note(record: Path, **what: Any) -> None:
    with record.open("a") as file:
        file.write(json.dumps(what) + "\n")


def gated(guard: Guard, record: Path, step: int) -> None:
    before = time.monotonic()
    try:
        guard.before_step(step)
    finally:
        note(record, step=step, before=before, after=time.monotonic())


def bare(guard: Guard, record: Path, *, dies: bool) -> None:
    import torch
    import torch.distributed as dist

    guard.on_rollback(lambda path, step: None)
    step = 0
    while step < STEPS:
        step += 1
        if dies and step == 4 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            batch = guard.admit(step, ["a"] * 4, rewards=[float(dist.get_rank())] * 4)
            if not batch.ok:
                step -= 1
                continue
            gated(guard, record, step)
        except RollbackRequested as order:
            note(record, rolled_back_to=order.step)
            continue
        dist.all_reduce(torch.ones(1))  # the step itself: a rank that went on alone would hang here
        guard.after_step(step, reward=0.5)


def trl(guard: Guard, record: Path) -> None:
    from frameworks.tiny_trl import tiny_trainer
    from stepguard.integrations.trl import StepguardCallback

    class Noted(StepguardCallback):
        def _pass_gate(self, step: int) -> None:
            before = time.monotonic()
            super()._pass_gate(step)
            note(record, step=step, before=before, after=time.monotonic())

    trainer = tiny_trainer(record.parent / "out", max_steps=STEPS, per_device_train_batch_size=16)
    callback = Noted(trainer, guard)
    trainer.add_callback(callback)
    trainer.train()
    total = sum(float(value.sum()) for value in trainer.model.parameters())
    note(record, refused=callback.refused, total=total)


def main() -> int:
    import torch
    import torch.distributed as dist

    run_dir, record, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    record = record.with_suffix(f".{rank}")
    guard = Guard(run_dir, rank=rank, world=dist.get_world_size(), boot_id=BOOT, **over_gloo(timeout_s=60))
    try:
        if what == "trl":
            trl(guard, record)
        else:
            bare(guard, record, dies=what == "dies")
    except StopRequested as order:
        note(record, stopped=order.reason)
    except RuntimeError as error:
        note(record, error=str(error)[:200])
        return 3
    finally:
        guard.close()
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
