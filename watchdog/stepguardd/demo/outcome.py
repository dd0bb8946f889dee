"""What a run of the demo came to, in figures. All of them are counted or read off clocks, none is assumed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Final

from stepguard_grpo.ground_truth import TruthRecord, summarise

from .faults import Fault, Scenario

STOOD_STILL: Final = "it stands still"
"""How `Figures.died` begins where a run hung: its figures end there, and it never would have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """
    One run.

    Args:
        steps: optimizer steps committed.
        garbage_steps: those with a failed or stale reward in the loss.
        final_reward: mean of the last ten steps; None when no step was committed, or the run did not get to
            its end.
        holds: times that the trainer was held.
        restarts: of the server, by Stepguard.
        rollbacks: by Stepguard.
        relaunches: of the trainer, by Stepguard.
        detect_s: from the blow to the hold on the page; None without either.
        recover_s: from the hold to the trainer's going on.
        lost_s: time that brought no good step: the pause at the fault, or the garbage after it; None where
            the run never went on.
        died: how the run ended, when it did not end by itself.

    """

    steps: int
    garbage_steps: int
    final_reward: float | None
    holds: int
    restarts: int
    rollbacks: int
    relaunches: int
    detect_s: float | None
    recover_s: float | None
    lost_s: float | None
    died: str | None = None


def ending(run: Figures) -> str:
    """How a run ended, in as many words as a table has room for."""
    if run.died is None:
        return "by itself"
    how = "stood still" if run.died.startswith(STOOD_STILL) else "died"
    return f"{how} after {run.steps} steps"


def figures(
    records: Sequence[TruthRecord],
    *,
    incidents: Sequence[Mapping[str, object]],
    struck_at: float | None,
    fault_step: int | None,
    died: str | None,
) -> Figures:
    """
    The figures of one run.

    Args:
        records: its ground truth.
        incidents: as the daemon's status tells them, oldest first; empty for an unguarded run.
        struck_at: when the fault was injected, in monotonic seconds.
        fault_step: the newest step committed at that moment.
        died: the error that ended the run, if one did.

    """
    summary = summarise(records)
    final_reward = None if died is not None else summary.final_reward
    first = incidents[0] if incidents else None
    opened = _number(first, "opened_at")
    resumed = _number(first, "resumed_at")
    return Figures(
        steps=summary.steps,
        garbage_steps=summary.garbage_steps,
        final_reward=None if final_reward is None else round(final_reward, 4),
        holds=len(incidents),
        restarts=sum(_count(incident, "restarts") for incident in incidents),
        rollbacks=sum(_count(incident, "rollbacks") for incident in incidents),
        relaunches=sum(_count(incident, "relaunches") for incident in incidents),
        detect_s=None if opened is None or struck_at is None else round(opened - struck_at, 4),
        recover_s=None if opened is None or resumed is None else round(resumed - opened, 3),
        lost_s=None if died is not None else _lost_s(records, fault_step),
        died=died,
    )


def _lost_s(records: Sequence[TruthRecord], fault_step: int | None) -> float | None:
    """
    Time after the fault that brought the run no further.

    The whole time of a garbage step and of one that was taken before, and of another what goes beyond the
    usual.
    """
    if fault_step is None or len(records) < 3:
        return None
    gaps = [after.time - before.time for before, after in pairwise(records)]
    usual = median(gaps)
    lost, furthest = 0.0, records[0].step
    for gap, record in zip(gaps, records[1:], strict=True):
        again = record.step <= furthest
        furthest = max(furthest, record.step)
        if furthest <= fault_step and not again:
            continue
        if record.garbage or again:
            lost += gap
        elif gap > 2 * usual:
            lost += gap - usual
    return round(lost, 2)


def as_expected(scenario: Scenario, run: Figures) -> list[str]:
    """What of a guarded run is not as its scenario says; empty when all of it is."""
    wrong = []
    if run.garbage_steps:
        wrong.append(f"{run.garbage_steps} garbage steps, expected none")
    if run.restarts != scenario.restarts:
        wrong.append(f"{run.restarts} restarts, expected {scenario.restarts}")
    if run.holds != scenario.holds:
        wrong.append(f"{run.holds} holds, expected {scenario.holds}")
    if run.rollbacks != scenario.rollbacks:
        wrong.append(f"{run.rollbacks} rollbacks, expected {scenario.rollbacks}")
    if run.relaunches != scenario.relaunches:
        wrong.append(f"{run.relaunches} relaunches, expected {scenario.relaunches}")
    if run.died is not None:
        wrong.append(f"the run died: {run.died}")
    return wrong


def report(
    fault: Fault, fault_step: int | None, guarded: Figures, unguarded: Figures | None
) -> dict[str, object]:
    """The object that `--json` prints last."""
    return {
        "fault": fault.value,
        "fault_step": fault_step,
        "guarded": _plain(guarded),
        "unguarded": None if unguarded is None else _plain(unguarded),
    }


def _plain(run: Figures) -> dict[str, object]:
    found = asdict(run)
    if found["died"] is None:
        del found["died"]
    return found


def _number(incident: Mapping[str, object] | None, key: str) -> float | None:
    value = None if incident is None else incident.get(key)
    return float(value) if isinstance(value, int | float) else None


def _count(incident: Mapping[str, object], key: str) -> int:
    value = incident.get(key)
    return value if isinstance(value, int) else 0
