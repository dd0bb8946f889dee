"""
The ground truth: what each committed optimizer step was really fed.

Promise: it is taken from the very members that were in the loss, by the trainer itself, guarded or not.
Garbage is a step with at least one failed or stale reward in its loss; stale is a rollout that another weight
version generated than the one that the trainer held (unknown counts as another).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

FINAL_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TruthRecord:
    """One committed optimizer step."""

    step: int
    attempt: int
    rollouts: int  # asked for
    failed_in_loss: int
    stale_in_loss: int
    reward_mean_true: float | None  # of the genuine rollouts, in the loss or not; None: there were none
    reward_mean_in_loss: float | None
    committed: bool
    time: float  # seconds since the epoch

    @property
    def garbage(self) -> bool:
        """Whether a failed or stale reward was in the loss of a step that was taken."""
        return self.committed and (self.failed_in_loss > 0 or self.stale_in_loss > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run in three figures."""

    steps: int  # committed
    garbage_steps: int
    final_reward: float | None  # mean of the last ten committed; a step without a genuine rollout earned 0


def append(path: Path, record: TruthRecord) -> None:
    """Add one line; one that a kill tore is closed first."""
    with path.open("a+b") as file:
        file.seek(0, 2)
        torn = file.tell() > 0 and _last_byte(file) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(asdict(record)).encode() + b"\n")


def read(path: Path) -> list[TruthRecord]:
    """All records in the order they were written; a line torn by a kill is left out, no file is no record."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(TruthRecord(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return records


def summarise(records: Iterable[TruthRecord]) -> Summary:
    """Count."""
    committed = [record for record in records if record.committed]
    last = [record.reward_mean_true or 0.0 for record in committed[-FINAL_STEPS:]]
    return Summary(
        steps=len(committed),
        garbage_steps=sum(record.garbage for record in committed),
        final_reward=sum(last) / len(last) if last else None,
    )


def summary(path: Path) -> Summary:
    """The figures of a `ground_truth.jsonl`."""
    return summarise(read(path))


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, 2)
    return file.read(1)
