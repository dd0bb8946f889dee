"""
The mix-in over verl's real trainer: `on_verl.py RUN_DIR`, in a process of its own, with verl importable.

verl's own `_step_once` runs; what it calls that needs GPUs is recorded instead. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from guard.virtual_daemon import VirtualDaemon, VirtualTime, virtual_guard
from stepguard.gate import Order
from stepguard.integrations.verl import StepguardMixin

done: list[str] = []
NAMES = (
    "on_sample_begin", "on_sample_end", "_balance_batch", "_compute_old_log_prob", "_compute_values",
    "_compute_advantage", "_update_critic", "_update_actor",
)  # fmt: skip


def recorder(name: str) -> Any:
    def record(self: Any, batch: Any = None, metrics: Any = None) -> Any:
        done.append(name)
        if name == "_update_actor":
            metrics["actor/grad_norm"] = 1.5
        return batch

    return record


Recorded = type("Recorded", (PPOTrainerSync,), {name: recorder(name) for name in NAMES})


class Driver(StepguardMixin, Recorded):  # type: ignore[misc,valid-type]
    def _rewards(self, batch: Any) -> tuple[list[float], list[Any]]:
        return batch.rewards, list("aabb")


def main() -> None:
    time = VirtualTime()
    daemon = VirtualDaemon(Path(sys.argv[1]), time)
    rewards = {1: [1.0, 0.0, 1.0, 0.0], 2: [0.0] * 4, 3: [1.0, 0.0, 1.0, 1.0]}

    def judge(batch: dict[str, Any]) -> str | None:
        if batch["reward"]["max"] > 0:
            return None
        time.after(20, lambda: daemon.order(Order.GO))
        return "reward_collapse"

    daemon.judge = judge
    driver = Driver.__new__(Driver)
    driver._guard = virtual_guard(daemon.run_dir, time)
    driver.use_reference_policy, driver.use_critic = False, True
    driver.config = SimpleNamespace(
        actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(temperature=1.0)),
        trainer=SimpleNamespace(critic_warmup=0),
    )
    driver.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[1])

    def pushing() -> str:
        seen = daemon.page.trainer()
        return "nothing" if seen is None else seen.phase.name

    driver.checkpoint_manager = SimpleNamespace(
        update_weights=lambda step: done.append(f"update_weights in {pushing()}")
    )
    driver.replay_buffer = SimpleNamespace(
        sample=lambda **asked: (
            SimpleNamespace(extra_info={}, rewards=rewards[driver.global_steps], tags=[], keys=[]),
            {},
        )
    )
    by_step = {}
    for driver.global_steps in (1, 2, 3):
        done.clear()
        driver.timing_raw = {}
        if driver.global_steps == 3:
            daemon.order(Order.HOLD, "server_dead")
            time.after(30, lambda: daemon.order(Order.GO))
        began = time.ns
        driver.on_step_begin()
        held_s = (time.ns - began) / 1e9
        driver._step_once({}, driver.timing_raw, 4)
        driver.on_step_end()
        by_step[driver.global_steps] = {"done": list(done), "held_s": held_s}
    print(
        json.dumps(
            {
                "steps": by_step,
                "reported": daemon.of_kind("step"),
                "batches": daemon.of_kind("batch"),
                "registered": {
                    mode: [base.__name__ for base in get_trainer_cls(f"stepguard_{mode}").__mro__]
                    for mode in ("sync", "colocate_async", "separate_async")
                },
            }
        )
    )


if __name__ == "__main__":
    main()
