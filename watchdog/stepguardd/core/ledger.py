"""
What is known about each checkpoint of a run, and which ones must not be lost.

Functions here take rows and give rows. It promises that a checkpoint is *proven* only when it vetted good,
was not saved inside an incident, and the wanted number of healthy steps followed it without a break in the
same attempt; and that the plan for pinning names each copy it cannot afford. Making and releasing the copies
is the task of `checkpoints/pinning.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stepguardd.core.choice import Candidate, Choice, choose
from stepguardd.core.verdict import Verdict, Vetting

HEALTHY_STEPS = 5
PINNED_COUNT = 2
NORMS_KEPT = 64
# Copies of a slot that wait for their proof: what it takes for saves at each step.
SLOT_PINS_MAX = 8
# A parameter norm this many times another is no step of an optimizer.
NORM_RATIO_MAX = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """
    One checkpoint.

    step, attempt     of the trainer; a step may come again in a later attempt.
    path              as the trainer reported it.
    verdict, reason   of the last vetting; `unknown` before the first.
    size_bytes        of all its files; 0 before the first vetting.
    vetted            whether its files were looked at, whatever came of it.
    reward            mean of the rewards just before it was saved; None where the trainer reports none.
    kl, gradient_norm of the newest step before it; the same.
    norms             the trainer's own proof of finite parameters: (name, norm), at most `NORMS_KEPT`.
    healthy_steps     how many healthy steps have followed it without a break.
    inside            it was saved inside an incident, or the onset was found to lie before it.
    pinned_path       Stepguard's own copy, or None.
    unpinned_because  why there is none although there should be; empty where that was not tried.
    set_aside         a rollback moved it to the quarantine.
    gone              it is no longer on disk (rotated away), and no copy was made.
    """

    step: int
    attempt: int
    path: str
    verdict: Verdict = Verdict.UNKNOWN
    reason: str = "not vetted yet"
    size_bytes: int = 0
    vetted: bool = False
    reward: float | None = None
    kl: float | None = None
    gradient_norm: float | None = None
    norms: tuple[tuple[str, float], ...] = ()
    healthy_steps: int = 0
    inside: bool = False
    pinned_path: str | None = None
    unpinned_because: str = ""
    set_aside: bool = False
    gone: bool = False


def kept_norms(norms: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """The norms that are remembered: those that are not finite first, then as many as fit, by name."""
    ranked = sorted(norms.items(), key=lambda item: (math.isfinite(item[1]), item[0]))
    return tuple(ranked[:NORMS_KEPT])


def after_vetting(row: LedgerRow, vetting: Vetting) -> LedgerRow:
    """
    The row with its new verdict.

    Where the files could not be judged, the trainer's own norms count: all finite means good, one that is not
    means bad. Norms that are not finite condemn a checkpoint whatever its files say.
    """
    verdict, reason = vetting.verdict, vetting.reason
    broken = [name for name, norm in row.norms if not math.isfinite(norm)]
    if broken:
        verdict, reason = Verdict.BAD, f"the trainer reported a norm of {broken[0]} that is not finite"
    elif verdict is Verdict.UNKNOWN and row.norms:
        verdict = Verdict.GOOD
        reason = f"the trainer reported {len(row.norms)} finite norms; its files: {vetting.reason}"
    size_bytes = vetting.size_bytes or row.size_bytes
    return replace(row, verdict=verdict, reason=reason, size_bytes=size_bytes, vetted=True)


def after_step(
    rows: Sequence[LedgerRow],
    *,
    attempt: int,
    step: int,
    healthy: bool,
    proven_after: int = HEALTHY_STEPS,
) -> list[LedgerRow]:
    """
    The rows that a finished step changes: a healthy one counts for every checkpoint of its attempt saved
    before it, until it is proven.

    A step that was not healthy sets back to zero those that were not proven yet: what follows a checkpoint
    directly is its proof, not what came after a disturbance had passed.
    """
    changed = []
    for row in rows:
        if row.attempt != attempt or row.step >= step:
            continue
        if healthy and row.healthy_steps < proven_after:
            changed.append(replace(row, healthy_steps=row.healthy_steps + 1))
        elif not healthy and 0 < row.healthy_steps < proven_after:
            changed.append(replace(row, healthy_steps=0))
    return changed


def proven(row: LedgerRow, healthy_steps: int = HEALTHY_STEPS) -> bool:
    """Good, of no incident, followed by enough healthy steps, and still there."""
    present = not row.set_aside and not (row.gone and row.pinned_path is None)
    trusted = row.verdict is Verdict.GOOD and not row.inside
    return trusted and row.healthy_steps >= healthy_steps and present


def newest_proven(
    rows: Sequence[LedgerRow], *, onset_step: int, healthy_steps: int = HEALTHY_STEPS
) -> Choice:
    """
    The newest proven checkpoint from before the onset, and why every newer one was refused.

    Args:
        rows: the ledger. Where a step came in several attempts, its newest attempt counts.
        onset_step: the first step of the incident, as estimated; not the step at which it was noticed.
        healthy_steps: how many healthy steps make a proof.
    """
    return choose(
        [as_candidate(row) for row in newest_by_step(rows).values()],
        before_step=onset_step,
        healthy_steps=healthy_steps,
    )


def newest_by_step(rows: Sequence[LedgerRow]) -> dict[int, LedgerRow]:
    """The row that counts for each step: of its newest attempt, and of those one that is still in place."""
    newest: dict[int, LedgerRow] = {}
    for row in sorted(rows, key=lambda r: (r.attempt, not r.set_aside)):
        newest[row.step] = row
    return newest


def as_candidate(row: LedgerRow) -> Candidate:
    """The row as the choice sees it."""
    return Candidate(
        step=row.step,
        path=row.path,
        verdict=row.verdict,
        reason=row.reason,
        healthy_steps=row.healthy_steps,
        inside=row.inside,
        set_aside=row.set_aside,
        gone=row.gone and row.pinned_path is None,
    )


def norm_warnings(previous: LedgerRow, current: LedgerRow) -> list[str]:
    """Norms that moved further since the previous good checkpoint than an optimizer could move them."""
    before = dict(previous.norms)
    warnings = []
    for name, norm in current.norms:
        old = before.get(name)
        if old is None or not (math.isfinite(norm) and math.isfinite(old)):
            continue
        low, high = sorted((abs(old), abs(norm)))
        if high > NORM_RATIO_MAX * low and high > 0.0:
            warnings.append(
                f"the norm of {name} is {norm:.4g} at step {current.step}, {old:.4g} at step {previous.step}"
            )
    return warnings


@dataclass(frozen=True, slots=True, kw_only=True)
class PinPlan:
    """What to copy, which copies to release, and what could not be afforded, with the arithmetic."""

    pin: tuple[LedgerRow, ...]
    release: tuple[LedgerRow, ...]
    refused: tuple[tuple[LedgerRow, str], ...]


def plan_pins(
    rows: Sequence[LedgerRow],
    *,
    keep: int = PINNED_COUNT,
    healthy_steps: int = HEALTHY_STEPS,
    copies: bool,
    budget_bytes: int,
    free_bytes: int,
    slot: bool = False,
) -> PinPlan:
    """
    The last `keep` proven checkpoints are to be pinned; older pins are to be released, but only once newer
    ones hold.

    A slot is rewritten before anything in it could be proven: there the good ones since the last proven one
    are to be pinned as well.

    Args:
        rows: the ledger.
        keep: how many.
        healthy_steps: how many healthy steps make a proof.
        copies: pins are copies and cost their size (AReaL, DCP, another file system); hard links cost
            nothing.
        budget_bytes: the most that all pins together may take.
        free_bytes: what the file system has left; a tenth of it is never used.
        slot: the framework keeps one checkpoint, and rewrites it in place.
    """
    wanted = sorted((r for r in rows if proven(r, healthy_steps)), key=lambda r: (r.attempt, r.step))[-keep:]
    if slot:
        newest = (wanted[-1].attempt, wanted[-1].step) if wanted else (-1, -1)
        wanted += [r for r in rows if (r.attempt, r.step) > newest and proven(r, 0)][-SLOT_PINS_MAX:]
    held = [row for row in rows if row.pinned_path is not None]
    used = sum(row.size_bytes for row in held if row in wanted) if copies else 0
    left = free_bytes - free_bytes // 10
    pin: list[LedgerRow] = []
    refused: list[tuple[LedgerRow, str]] = []
    # The newest comes first: with room for one, that is the one.
    for row in reversed(wanted):
        if row.pinned_path is not None or row.gone:
            continue
        cost = row.size_bytes if copies else 0
        if used + cost > budget_bytes:
            refused.append((row, f"{_mib(cost)} more than the budget of {_mib(budget_bytes)} allows"))
        elif cost > left:
            refused.append((row, f"{_mib(cost)} needed, {_mib(left)} of the disk may be used"))
        else:
            pin.append(row)
            used, left = used + cost, left - cost
    release = [row for row in held if row not in wanted and not refused]
    return PinPlan(pin=tuple(pin), release=tuple(release), refused=tuple(refused))


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
