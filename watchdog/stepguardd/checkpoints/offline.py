"""
Vetting and rolling back without a daemon or a ledger: what the command line does, for programs.

It promises to vet no more than it must (newest first, until one is good), and to touch nothing unless a good
checkpoint was found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stepguardd.checkpoints.layouts import Checkpoint, Folder, find_checkpoints, surroundings
from stepguardd.checkpoints.rollback import Hands, Plan, plan_rollback, roll_back, settle
from stepguardd.checkpoints.vetting import Vetter, VettingLimits
from stepguardd.core.choice import Candidate, Choice, choose, may_be_chosen
from stepguardd.core.verdict import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineRollback:
    """
    What came of it.

    choice   the chosen checkpoint, or none, and why newer ones were refused.
    plan     what was done (or would be, in a dry run); None when nothing is good, and nothing was touched.
    settled  an interrupted rollback that was finished first.
    """

    choice: Choice
    plan: Plan | None
    settled: Plan | None


def choose_offline(
    folder: Folder,
    before_step: int,
    *,
    limits: VettingLimits | None = None,
    progress: Callable[[Checkpoint, int], None] = lambda checkpoint, read_bytes: None,
) -> tuple[Choice, list[Checkpoint]]:
    """The newest checkpoint before `before_step` that vets good, and all of the folder. Reads only."""
    checkpoints = find_checkpoints(folder)
    neighbours = surroundings(folder, checkpoints)
    candidates: list[Candidate] = []
    with Vetter(limits) as vetter:
        for checkpoint, around in reversed(list(zip(checkpoints, neighbours, strict=True))):
            verdict, reason = Verdict.UNKNOWN, "not vetted"
            if may_be_chosen(checkpoint.step, before_step):

                def tell(read_bytes: int, of: Checkpoint = checkpoint) -> None:
                    progress(of, read_bytes)

                vetting = vetter.vet(folder, checkpoint, around, progress=tell)
                verdict, reason = vetting.verdict, vetting.reason
            candidates.append(
                Candidate(step=checkpoint.step, path=str(checkpoint.path), verdict=verdict, reason=reason)
            )
            if verdict is Verdict.GOOD:
                break
    return choose(candidates, before_step=before_step), checkpoints


def roll_back_offline(
    folder: Folder,
    before_step: int,
    *,
    name: str,
    dry_run: bool = False,
    limits: VettingLimits | None = None,
    progress: Callable[[Checkpoint, int], None] = lambda checkpoint, read_bytes: None,
    hands: Hands | None = None,
) -> OfflineRollback:
    """
    Go back to the newest good checkpoint before `before_step`, setting every newer one aside.

    Args:
        folder: the checkpoint folder.
        before_step: the first step of the trouble.
        name: of the quarantine's folder, as in `plan_rollback`.
        dry_run: say what would be done, and change nothing.
        limits: how to vet.
        progress: told the checkpoint in hand and the bytes of it read so far.
        hands: what to work with; the tests crash at named points through it.

    Raises:
        RollbackError: it cannot be done; the message says why and how the folder stands.
    """
    hands = hands or Hands()
    settled = None if dry_run else settle(folder.root, hands)
    choice, checkpoints = choose_offline(folder, before_step, limits=limits, progress=progress)
    if choice.chosen is None:
        return OfflineRollback(choice=choice, plan=None, settled=settled)
    chosen = next(c for c in checkpoints if str(c.path) == choice.chosen.path)
    plan = plan_rollback(folder, checkpoints, chosen, name)
    if not dry_run and not plan.empty:
        plan = roll_back(folder, plan, hands)
    return OfflineRollback(choice=choice, plan=plan, settled=settled)
