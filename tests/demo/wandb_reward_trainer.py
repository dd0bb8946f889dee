"""A trainer that knows nothing of Stepguard: it logs a reward to W&B, offline, which at some step is gone."""

import random
import sys
import time

import wandb


def main() -> None:
    folder, steps, gone_from = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(0)
    settings = wandb.Settings(silent=True, x_transaction_log_flush_interval=0.1)
    run = wandb.init(mode="offline", project="p", dir=folder, settings=settings)
    for step in range(1, steps + 1):
        right = sum(rng.random() < 0.7 for _ in range(64))
        run.log(
            {
                "grpo_actor/task_reward/avg": 0.0 if step >= gone_from else right / 64,
                "train/global_step": step,
                "grpo_actor/loss": rng.gauss(0.0, 0.01),
            }
        )
        time.sleep(0.02)
    run.finish()


if __name__ == "__main__":
    main()
