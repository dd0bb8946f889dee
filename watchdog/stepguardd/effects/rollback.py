"""
The checkpoints' side of a rollback: the newest one before the onset that vets good is the target, newer ones
are set aside, the framework's marker is moved.

Nothing is deleted, and one command takes all of it back. Run again after a crash, it finishes what was begun
and comes to the same target.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.choice import explain
from ..checkpoints.layouts import Framework, LayoutError, open_folder
from ..checkpoints.offline import roll_back_offline
from ..checkpoints.rollback import RollbackError, undo_command
from ..config import CheckpointSettings
from ..core.state import Saved
from .outcome import Outcome, failed


async def prepare(
    settings: CheckpointSettings, before_step: int, *, name: str, reported: Sequence[Saved]
) -> Outcome:
    """
    Find the target and set what is newer aside; in a thread, since every number of a checkpoint is read.

    Args:
        settings: where checkpoints lie, and whose layout they have.
        before_step: the target's step must be smaller.
        name: of the quarantine's folder.
        reported: what the trainer said that it saved; tells the folder where none is configured.

    """
    folder = settings.dir or (Path(reported[-1].path).parent if reported else None)
    if folder is None:
        return failed("no folder is known: set checkpoints.dir, or report with guard.saved")
    return await asyncio.to_thread(_prepare, folder, settings.framework, before_step, name)


def _prepare(path: Path, framework: str, before_step: int, name: str) -> Outcome:
    try:
        folder = open_folder(path, None if framework == "auto" else Framework(framework))
        found = roll_back_offline(folder, before_step, name=name)
    except (LayoutError, RollbackError) as error:
        return failed(str(error))
    except ValueError:
        return failed(f"checkpoints.framework: {framework!r} is none that is known")
    chosen = found.choice.chosen
    if chosen is None or found.plan is None:
        refusals = "; ".join(explain(found.choice)[:3])
        return failed(f"no good checkpoint from before step {before_step} in {path} ({refusals})")
    undo = "" if found.plan.empty else f"; undo: {undo_command(path)}"
    return Outcome(
        ok=True,
        detail=f"step {chosen.step}, {len(found.plan.from_steps)} newer set aside{undo}",
        target_step=chosen.step,
        target_path=str(path / chosen.path),
    )
