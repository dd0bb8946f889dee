"""The search for the checkpoint to roll back to: the newest one before the onset that vets good."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ..config import CheckpointSettings
from ..core.state import Saved
from .outcome import Outcome, failed


async def find_checkpoint(
    settings: CheckpointSettings, before_step: int, *, reported: Sequence[Saved]
) -> Outcome:
    """
    Find it, in a thread: a checkpoint folder may be slow.

    Args:
        settings: where checkpoints lie, and whose layout they have.
        before_step: the target's step must be smaller.
        reported: what the trainer said that it saved; used where no folder is configured.

    """
    return await asyncio.to_thread(_find, settings, before_step, tuple(reported))


def _find(settings: CheckpointSettings, before_step: int, reported: tuple[Saved, ...]) -> Outcome:
    candidates = sorted(
        {(saved.step, saved.path) for saved in reported if saved.step < before_step}, reverse=True
    )
    for step, path in candidates:
        if Path(path).is_dir():
            return Outcome(ok=True, detail=path, target_step=step, target_path=path)
    return failed(f"none of {len(reported)} reported checkpoints is from before step {before_step}")
