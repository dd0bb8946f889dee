"""
Which checkpoint to go back to. Pure: rows go in; the chosen one, and why each newer one was refused, come
out.

It promises never to choose a checkpoint saved inside the incident, one that did not vet good, or one that has
been set aside, and to explain every refusal. With no row left it chooses nothing: a wrong target is worse
than none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from stepguardd.core.verdict import Verdict


class Refusal(StrEnum):
    """Why a checkpoint was not chosen."""

    INSIDE_INCIDENT = "inside_incident"
    BAD = "bad"
    INCOMPLETE = "incomplete"
    UNKNOWN = "unknown"
    NOT_PROVEN = "not_proven"
    SET_ASIDE = "set_aside"
    GONE = "gone"
    NO_STEP = "no_step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A checkpoint as the choice sees it. `healthy_steps` is None where no ledger tells."""

    step: int | None
    path: str
    verdict: Verdict
    reason: str
    healthy_steps: int | None = None
    inside: bool = False
    set_aside: bool = False
    gone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """One refusal: the code for programs, the sentence for people."""

    step: int | None
    path: str
    why: Refusal
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The newest checkpoint to go back to, or none; and every newer one with its refusal, newest first."""

    chosen: Candidate | None
    refused: tuple[Refused, ...]


def choose(candidates: Iterable[Candidate], *, before_step: int, healthy_steps: int = 0) -> Choice:
    """
    The newest candidate that is from before the incident, good, and proven.

    Args:
        candidates: in any order.
        before_step: the onset. A checkpoint of this step or a later one holds what the incident did.
        healthy_steps: how many healthy steps must have followed a checkpoint; 0 asks for none (offline).
    """
    refused: list[Refused] = []
    for candidate in sorted(candidates, key=lambda c: -1 if c.step is None else c.step, reverse=True):
        why = _refusal(candidate, before_step, healthy_steps)
        if why is None:
            return Choice(chosen=candidate, refused=tuple(refused))
        refused.append(Refused(step=candidate.step, path=candidate.path, why=why[0], detail=why[1]))
    return Choice(chosen=None, refused=tuple(refused))


def may_be_chosen(step: int | None, before_step: int) -> bool:
    """Whether vetting this step can matter at all: it is not of the incident."""
    return step is not None and step < before_step


def explain(choice: Choice) -> Sequence[str]:
    """One line per refusal, newest first, for a report."""
    return [
        f"{'step ' + str(refused.step) if refused.step is not None else refused.path} {refused.detail}"
        for refused in choice.refused
    ]


def _refusal(candidate: Candidate, before_step: int, healthy_steps: int) -> tuple[Refusal, str] | None:
    if candidate.step is None:
        return Refusal.NO_STEP, "does not tell its step"
    if candidate.gone:
        return Refusal.GONE, "is no longer on disk"
    if candidate.set_aside:
        return Refusal.SET_ASIDE, "was set aside by an earlier rollback"
    if not may_be_chosen(candidate.step, before_step):
        return Refusal.INSIDE_INCIDENT, f"was saved inside the incident, which began at step {before_step}"
    if candidate.inside:
        return Refusal.INSIDE_INCIDENT, "was saved inside an earlier incident"
    match candidate.verdict:
        case Verdict.BAD:
            return Refusal.BAD, f"is bad: {candidate.reason}"
        case Verdict.INCOMPLETE:
            return Refusal.INCOMPLETE, f"is incomplete: {candidate.reason}"
        case Verdict.UNKNOWN:
            return Refusal.UNKNOWN, f"could not be judged: {candidate.reason}"
        case Verdict.GOOD:
            pass
    if candidate.healthy_steps is not None and candidate.healthy_steps < healthy_steps:
        seen = f"{candidate.healthy_steps} of {healthy_steps}"
        return Refusal.NOT_PROVEN, f"is not proven: {seen} healthy steps followed it"
    return None
