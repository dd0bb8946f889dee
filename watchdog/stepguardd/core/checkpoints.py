"""
The ledger, as events change it: what is saved, what was vetted, what healthy steps have proven.

The rows are part of the state, so a journal gives them back as they were. Whoever vets and pins reads them
here and answers by events: neither is a command, because both are begun anew after a crash by looking at the
rows, and neither touches what the trainer wrote.
"""

from dataclasses import replace

from . import ledger, levels
from .events import (
    CheckpointGone,
    CheckpointPinned,
    CheckpointSaved,
    CheckpointVetted,
    StepCommitted,
)
from .ledger import LedgerRow
from .reasons import Reason
from .state import CHECKPOINTS_KEPT, State
from .turn import Turn
from .verdict import Depth, Finding, Verdict, Vetting

_NORMS_OF = 2


def saved(turn: Turn, event: CheckpointSaved) -> None:
    """
    A new row; saved again in the same attempt, it replaces the one before.

    While an incident is open, its probation included, nobody knows yet what was saved: such a one is never
    gone back to.
    """
    state = turn.state
    around = levels.level(state.recent, before_step=event.step + 1)
    row = LedgerRow(
        step=event.step,
        attempt=event.attempt,
        path=event.path,
        reward=None if around is None else around.mean,
        kl=state.metrics.get("kl"),
        gradient_norm=state.metrics.get("grad_norm"),
        norms=ledger.kept_norms(event.norms),
        inside=state.incident is not None or state.trip is not None,
    )
    others = [old for old in state.checkpoints if (old.attempt, old.step) != (row.attempt, row.step)]
    rows = _kept([*others, row])
    # Norms are compared with the checkpoint before, and are of no use after that.
    slim = [replace(old, norms=()) if old.vetted else old for old in rows[:-_NORMS_OF]]
    turn.state = replace(state, checkpoints=(*slim, *rows[-_NORMS_OF:]))


def vetted(turn: Turn, event: CheckpointVetted) -> None:
    """Its files were looked at: keep the verdict, and tell what a person should know."""
    row = _row(turn.state, event.attempt, event.step)
    if row is None:
        return
    found = Vetting(
        verdict=Verdict(event.verdict),
        finding=Finding(event.finding),
        reason=event.reason,
        size_bytes=event.size_bytes,
        depth=Depth.FULL,
    )
    judged = ledger.after_vetting(row, found)
    _put(turn, judged)
    if judged.verdict in {Verdict.BAD, Verdict.INCOMPLETE}:
        what = f"the checkpoint of step {row.step} is {judged.verdict.value}: {judged.reason}"
        turn.note("warning", Reason.CHECKPOINT_BAD, what)
    earlier = [r for r in turn.state.checkpoints if r.step < row.step and r.verdict is Verdict.GOOD]
    if earlier and judged.verdict is Verdict.GOOD:
        for warning in ledger.norm_warnings(earlier[-1], judged)[:3]:
            turn.note("warning", Reason.CHECKPOINT_BAD, warning)


def pinned(turn: Turn, event: CheckpointPinned) -> None:
    """A copy was made, let go, or could not be made; the last is told once for each checkpoint."""
    row = _row(turn.state, event.attempt, event.step)
    if row is None:
        return
    if not event.trouble:
        _put(turn, replace(row, pinned_path=event.path, unpinned_because=""))
    elif event.trouble != row.unpinned_because:
        _put(turn, replace(row, unpinned_because=event.trouble))
        if not row.unpinned_because:
            what = f"the checkpoint of step {row.step} is not kept from rotation: {event.trouble}"
            turn.note("call", Reason.PIN_REFUSED, what)


def gone(turn: Turn, event: CheckpointGone) -> None:
    """The trainer's own rotation took it."""
    row = _row(turn.state, event.attempt, event.step)
    if row is not None:
        _put(turn, replace(row, gone=True))


def stepped(turn: Turn, event: StepCommitted, *, healthy: bool) -> None:
    """A step was committed: it is proof for the checkpoints before it, or the end of their proof."""
    changed = ledger.after_step(
        turn.state.checkpoints,
        attempt=event.attempt,
        step=event.step,
        healthy=healthy,
        proven_after=turn.state.settings.proven_after_steps,
    )
    for row in changed:
        _put(turn, row)


def doubt(turn: Turn, onset_step: int) -> None:
    """Trouble began at this step: whatever was saved from there on holds it, however good it looks."""
    attempt = turn.state.trainer.attempt
    for row in turn.state.checkpoints:
        if row.attempt >= attempt and row.step >= onset_step and not row.inside:
            _put(turn, replace(row, inside=True))


def set_aside(turn: Turn, target_step: int) -> None:
    """A rollback moved every newer one to the quarantine."""
    for row in turn.state.checkpoints:
        if row.step > target_step and not row.set_aside:
            _put(turn, replace(row, set_aside=True))


def _row(state: State, attempt: int, step: int) -> LedgerRow | None:
    return next((row for row in state.checkpoints if (row.attempt, row.step) == (attempt, step)), None)


def _put(turn: Turn, row: LedgerRow) -> None:
    turn.state = replace(
        turn.state,
        checkpoints=tuple(
            row if (old.attempt, old.step) == (row.attempt, row.step) else old
            for old in turn.state.checkpoints
        ),
    )


def _kept(rows: list[LedgerRow]) -> list[LedgerRow]:
    """At most so many; a row with a copy of ours is the last to be forgotten."""
    rows = sorted(rows, key=lambda row: (row.attempt, row.step))
    while len(rows) > CHECKPOINTS_KEPT:
        rows.remove(next((row for row in rows if row.pinned_path is None), rows[0]))
    return rows
