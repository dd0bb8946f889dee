"""
The checkpoints' side of a rollback or relaunch: the target is chosen by the ledger, newer ones are set aside,
the framework's marker is moved.

Nothing is deleted, and one command takes all of it back. Run again after a crash, it finishes what was begun
and comes to the same target.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from ..checkpoints.layouts import (
    PINNED,
    Checkpoint,
    Folder,
    Framework,
    LayoutError,
    find_checkpoints,
    open_folder,
    surroundings,
)
from ..checkpoints.rollback import Hands, RollbackError, plan_rollback, roll_back, settle, undo_command
from ..checkpoints.vetting import Vetter, VettingLimits
from ..config import CheckpointSettings
from ..core.choice import Candidate, Choice, choose, explain, may_be_chosen
from ..core.ledger import LedgerRow, as_candidate, newest_by_step
from ..core.verdict import Depth, Verdict
from ..failpoint import failpoint
from .outcome import Outcome, failed

EVER: Final = 1 << 62
HANDS: Final = Hands(at=lambda point: failpoint(f"rollback_{point}"))
REFUSALS_TOLD: Final = 4


async def prepare(
    settings: CheckpointSettings, before_step: int | None, *, name: str, rows: Sequence[LedgerRow]
) -> Outcome:
    """
    Find the target and set what is newer aside; in a thread, since files are read.

    Args:
        settings: where checkpoints lie, and whose layout they have.
        before_step: the target's step must be smaller; None for a relaunch, which may also start from none.
        name: of the quarantine's folder.
        rows: the ledger; it also tells the folder where none is configured.

    """
    folder = folder_of(settings, rows)
    if folder is None:
        if before_step is None:
            return Outcome(ok=True, detail="from its beginning: it never said that it saved anything")
        return failed("no folder is known: set checkpoints.dir, or report with guard.saved")
    return await asyncio.to_thread(_prepare, folder, settings, before_step, name, rows)


def folder_of(settings: CheckpointSettings, rows: Sequence[LedgerRow]) -> Path | None:
    """Where the checkpoints lie: as configured, else beside the newest that was reported."""
    if settings.dir is not None:
        return settings.dir
    return Path(rows[-1].path).parent if rows else None


def opened(settings: CheckpointSettings, path: Path) -> Folder:
    """
    The folder, by the configured layout or the one that it is recognised by.

    Raises:
        LayoutError: nothing is there, or it could be several frameworks'.

    """
    return open_folder(path, None if settings.framework == "auto" else Framework(settings.framework))


def _prepare(
    path: Path, settings: CheckpointSettings, before_step: int | None, name: str, rows: Sequence[LedgerRow]
) -> Outcome:
    try:
        folder = opened(settings, path)
    except LayoutError as error:
        if before_step is None and not rows:
            return Outcome(ok=True, detail="from its beginning: nothing was saved yet")
        return failed(str(error))
    try:
        settle(folder.root, HANDS)
        found = find_checkpoints(folder)
        choice = Chooser(folder, found, rows, settings).choose(before_step)
        if choice.chosen is None:
            refusals = "; ".join(list(explain(choice))[:REFUSALS_TOLD])
            before = "" if before_step is None else f" from before step {before_step}"
            return failed(f"no proven checkpoint{before} in {path} ({refusals or 'there is none'})")
        chosen = next(one for one in found if one.step == choice.chosen.step and not one.linked)
        plan = plan_rollback(folder, found, chosen, name)
        if not plan.empty:
            plan = roll_back(folder, plan, HANDS)
    except (LayoutError, RollbackError) as error:
        return failed(str(error))
    aside = "" if plan.empty else f", {len(plan.from_steps)} newer set aside; undo: {undo_command(path)}"
    passed = "".join(f"; {refusal}" for refusal in list(explain(choice))[:REFUSALS_TOLD])
    live = chosen.parts[0].path.removeprefix(f"{PINNED}/step-{chosen.step}/")
    return Outcome(
        ok=True,
        detail=f"step {chosen.step}{aside}{passed}",
        target_step=chosen.step,
        target_path=str(folder.root / live),
    )


class Chooser:
    """
    The design's rule over what lies on the disk.

    Newest first: proven, and from before the onset. Where nothing is proven: what the ledger never heard of
    (it was saved before anybody watched) and vets good now; for a relaunch at last the newest that vets good
    and is of no incident, since losing some proof is better than losing the run.

    Args:
        folder: where they lie.
        found: what lies there.
        rows: the ledger.
        settings: how far to read what was not vetted yet.

    """

    def __init__(
        self,
        folder: Folder,
        found: Sequence[Checkpoint],
        rows: Sequence[LedgerRow],
        settings: CheckpointSettings,
    ) -> None:
        self._folder = folder
        self._found = found
        self._around = surroundings(folder, found)
        self._rows = newest_by_step(rows)
        self._settings = settings

    def choose(self, before_step: int | None) -> Choice:
        """The target, or none; and why each newer one was refused."""
        before = EVER if before_step is None else before_step
        proven_after = self._settings.proven_after_steps
        first = self._by(before, healthy_steps=proven_after, known=True)
        if first.chosen is not None:
            return first
        unheard = self._by(before, healthy_steps=0, known=False)
        if unheard.chosen is not None or before_step is not None:
            return replace(unheard, refused=(*first.refused, *unheard.refused))
        return self._by(before, healthy_steps=0, known=True)

    def _by(self, before: int, *, healthy_steps: int, known: bool) -> Choice:
        """Newest first, each looked at only when nothing newer would do."""
        candidates: list[Candidate] = []
        for index in reversed(range(len(self._found))):
            step = self._found[index].step
            row = None if step is None else self._rows.get(step)
            if (row is not None) is not known:
                continue
            candidate = self._candidate(index, row)
            if may_be_chosen(step, before):
                ready = choose([candidate], before_step=before, healthy_steps=healthy_steps)
                unjudged = candidate.verdict is Verdict.UNKNOWN and not (row and row.vetted)
                if ready.chosen is not None or unjudged:
                    candidate = self._vetted(index, candidate, unjudged=unjudged)
            candidates.append(candidate)
            if choose([candidate], before_step=before, healthy_steps=healthy_steps).chosen is not None:
                break
        return choose(candidates, before_step=before, healthy_steps=healthy_steps)

    def _candidate(self, index: int, row: LedgerRow | None) -> Candidate:
        checkpoint = self._found[index]
        if row is None:
            return Candidate(
                step=checkpoint.step,
                path=str(checkpoint.path),
                verdict=Verdict.UNKNOWN,
                reason="not vetted",
            )
        return replace(as_candidate(row), path=str(checkpoint.path), gone=False)

    def _vetted(self, index: int, candidate: Candidate, *, unjudged: bool) -> Candidate:
        """Read it now: whole where nobody has, else only whether it is still all there."""
        depth = Depth(self._settings.vetting) if unjudged else Depth.STRUCTURE
        with Vetter(VettingLimits(depth=depth)) as vetter:
            vetting = vetter.vet(self._folder, self._found[index], self._around[index])
        return replace(candidate, verdict=vetting.verdict, reason=vetting.reason)
