"""
The verifiable task: read four digits, write them again.

Promise: prompts and sampling seeds are functions of (seed, step, index) alone, so the position in the data is
the step number and a batch can be drawn again, after a refusal or a resume, exactly as it was.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from stepguard_grpo.grading import score
from stepguard_grpo.model import BOS, SEP

__all__ = ["DIGITS", "MAX_NEW_TOKENS", "Request", "batch", "score"]

DIGITS = 4
MAX_NEW_TOKENS = DIGITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One trajectory to roll out."""

    index: int  # place in the batch
    group_id: int  # members of one group share the prompt
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    sampling_seed: int
    deadly: bool = False  # the server dies of it: a fault


def batch(*, seed: int, step: int, groups: int, group_size: int) -> list[Request]:
    """The `groups * group_size` requests of one step, group after group."""
    requests = []
    for group_id in range(groups):
        digits = random.Random(f"prompt {seed} {step} {group_id}").choices(range(10), k=DIGITS)
        for member in range(group_size):
            index = group_id * group_size + member
            sampling = random.Random(f"sample {seed} {step} {index}").getrandbits(31)
            requests.append(
                Request(
                    index=index,
                    group_id=group_id,
                    prompt=(BOS, *digits, SEP),
                    target=tuple(digits),
                    sampling_seed=sampling,
                )
            )
    return requests
