"""
Presence: what the trainer shows on its half of the page.

Promise: cheap enough for every guard call, and correct whoever else looks: counters and phase are single
words, the rest goes whole or not at all.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from stepguard.gate import BEATS_WORD, PROGRESS_WORD, STEP_PHASE_WORD, Phase, TrainerHalf, step_phase_word
from stepguard.link import Link


class Presence:
    """
    The trainer's state as the daemon sees it.

    Args:
        link: where it is shown.

    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._waiting = 0
        self.attempt = 0
        self.acked_generation = 0
        self.step: int | None = None
        self.phase = Phase.UNKNOWN
        self.beats = 0
        self.progress = 0
        self.last_reward: float | None = None
        self.rollouts_ok = 0
        self.rollouts_failed = 0
        self.weight_version: str | None = None
        self.handles: frozenset[str] = frozenset()

    @property
    def waiting(self) -> bool:
        """Whether a guard call waits; the page then says HELD."""
        return self._waiting > 0

    def beat(self) -> None:
        """The process lives; and how far its loop has come."""
        self.beats += 1
        self._link.out_words[BEATS_WORD] = self.beats
        self._link.out_words[PROGRESS_WORD] = self.progress

    def progressed(self) -> None:
        """The loop works."""
        self.progress += 1
        self._link.out_words[PROGRESS_WORD] = self.progress

    def at(self, step: Any) -> None:
        """The step that the loop is at; anything that is no number leaves the one before."""
        self.step = max(0, whole_number(step, 0 if self.step is None else self.step))

    def enter(self, phase: Phase) -> None:
        """What the loop does from now on."""
        self.phase = phase
        self._show_phase()

    def wait(self) -> None:
        """A guard call begins to wait."""
        with self._lock:
            self._waiting += 1
        self._show_phase()

    def wait_over(self) -> None:
        """It waits no more."""
        with self._lock:
            self._waiting -= 1
        self._show_phase()

    def show(self) -> None:
        """Put the whole half on the page."""
        with self._lock:
            self._link.show(
                TrainerHalf(
                    pid=os.getpid(),
                    acked_generation=self.acked_generation,
                    attempt=self.attempt,
                    step=self.step,
                    phase=self._shown_phase(),
                    beats=self.beats,
                    progress=self.progress,
                    last_reward=self.last_reward,
                    rollouts_ok=self.rollouts_ok,
                    rollouts_failed=self.rollouts_failed,
                    weight_version=self.weight_version,
                    handles_resync="resync" in self.handles,
                    handles_rollback="rollback" in self.handles,
                    handles_save="save" in self.handles,
                )
            )

    def _shown_phase(self) -> Phase:
        return Phase.HELD if self.waiting else self.phase

    def _show_phase(self) -> None:
        self._link.out_words[STEP_PHASE_WORD] = step_phase_word(self.step, self._shown_phase())


def whole_number(value: Any, otherwise: int) -> int:
    """An int out of a number, a text or a tensor with one element; else the other."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return otherwise
