"""
A trainer that logs with the real `wandb`, offline: run as a program by the tests.

`wandb_trainer.py FOLDER RUN_ID FIRST_STEP LAST_STEP PAUSE_S END`, END being `finish` or `kill` (SIGKILL to
itself and to the machinery of wandb, after the log was flushed).
"""

import math
import os
import signal
import sys
import time

import wandb


def main() -> None:
    folder, run_id, first, last, pause_s, end = sys.argv[1:]
    settings = {"silent": True}
    version = tuple(int(part) for part in wandb.__version__.split(".")[:2])
    if version >= (0, 31):
        settings["x_transaction_log_flush_interval"] = 0.05
    run = wandb.init(
        mode="offline",
        project="p",
        id=run_id,
        dir=folder,
        resume="allow",
        settings=wandb.Settings(**settings),
    )
    for step in range(int(first), int(last) + 1):
        run.log(
            {
                "train/reward": step / 100,
                "train/global_step": step,
                "loss": math.nan if step == 3 else -0.5,
                "up": math.inf if step == 4 else 1,
                "down": -math.inf if step == 4 else 1,
                "nested": {"deep": step},
                "nothing": None,
                "flag": True,
                "text": "words",
                "list": [1, 2],
            }
        )
        print(f"logged {step} {time.time()}", flush=True)
        time.sleep(float(pause_s))
    if end == "kill":
        time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGKILL)
    run.finish()


if __name__ == "__main__":
    main()
