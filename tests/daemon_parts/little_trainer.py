"""
A trainer without torch: it commits steps, saves checkpoints in Hugging Face's layout, and resumes from the
newest. Run as `python little_trainer.py ROOT [reload]`; it notes what it does in ROOT.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import time
from pathlib import Path

from stepguard import Guard, RollbackRequested, StopRequested

SAVE_EVERY = 10
STEP_S = 0.05


def save(root: Path, step: int) -> Path:
    """One checkpoint, whole under its name or not there."""
    fresh, path = root / f".new-{step}", root / f"checkpoint-{step}"
    fresh.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    body = struct.pack("<Q", len(header)) + header + struct.pack("<f", float(step))
    (fresh / "model.safetensors").write_bytes(body)
    (fresh / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if not path.exists():
        fresh.rename(path)
    return path


def newest(root: Path) -> int:
    """The step to resume from."""
    if not root.is_dir():
        return 0
    names = [re.fullmatch(r"checkpoint-(\d+)", entry.name) for entry in root.iterdir()]
    return max((int(found[1]) for found in names if found), default=0)


def main() -> None:
    root = Path(sys.argv[1])
    checkpoints = root / "checkpoints"
    with (root / "trainer_starts").open("a") as starts:
        starts.write(os.environ.get("STEPGUARD_TRAINER_INTENT", "by-hand") + "\n")
    guard = Guard.from_env()
    target: list[int] = []
    if "reload" in sys.argv:
        guard.on_rollback(lambda path, step: target.append(step or 0))
    guard.on_save(lambda: None)
    step = newest(checkpoints)
    with (root / "steps").open("a", buffering=1) as steps:
        while not (root / "enough").exists():
            try:
                reward = 0.7 + 0.01 * ((step * 7) % 5)
                if not guard.admit(step + 1, [1] * 4, rewards=[reward, 1.0, 0.4, reward]).ok:
                    continue
                guard.before_step(step + 1)
                step += 1
                steps.write(f"{guard.attempt} {step}\n")
                time.sleep(STEP_S)
                if step % SAVE_EVERY == 0:
                    guard.saved(step, save(checkpoints, step))
                guard.after_step(step, reward=0.7, metrics={"grad_norm": 0.4})
            except RollbackRequested:
                step = target.pop()
            except StopRequested:
                break
    guard.close()


if __name__ == "__main__":
    main()
