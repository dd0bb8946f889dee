"""
A logged reward stream as events: rows of one step gathered, the reward found among them.

A stream is late by its nature (a W&B row reaches the file after seconds, a `log(step=)` row one step later),
so it judges runs whose trainer has no guard, and only informs where there is one.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from ..core.events import Event, RewardLogged
from .reward.aliases import canonical, find_reward_metric
from .reward.jsonl import JsonLines
from .reward.rows import StreamError
from .reward.wandb_log import WandbLog

if TYPE_CHECKING:
    from ..config import Config
    from .reward.rows import Reader, Row

log = logging.getLogger("stepguardd")

POLLS_PER_TURN_MAX: Final = 8
NAMES_MAX: Final = 4096
NOTES_MAX: Final = 8

Emit = Callable[[Event], None]


class RewardStream:
    """
    Follows one stream.

    Args:
        reader: opened at where to begin.
        metric: the reward's name or pattern; "auto" finds it.
        emit: where the events go.

    """

    interval_s = 0.5

    def __init__(self, reader: Reader, metric: str, emit: Emit) -> None:
        self._reader = reader
        self._metric = metric
        self._emit = emit
        self._names: set[str] = set()
        self._ready: list[RewardLogged] = []
        self.metric_found: str | None = None
        self.notes: deque[str] = deque(maxlen=NOTES_MAX)
        self._step: int | None = None
        self._values: dict[str, float | None] = {}

    @classmethod
    def of(cls, config: Config, position: str | None, emit: Emit) -> RewardStream | None:
        """
        The stream that the config names, or None; a folder that is not there yet is waited for.

        Args:
            config: the whole configuration.
            position: where an earlier daemon stood, out of its last `RewardLogged`.
            emit: where the events go.

        """
        stream = config.stream
        stood = None if position is None else json.loads(position)
        reader: Reader
        if stream.wandb_dir is not None:
            reader = WandbLog(stream.wandb_dir, step_key=stream.step_key, position=stood)
        elif stream.jsonl is not None:
            reader = JsonLines(stream.jsonl, step_key=stream.step_key, position=stood)
        else:
            return None
        return cls(reader, config.reward.metric, emit)

    def poll(self) -> None:
        """Read on, a bounded piece, and hand on the steps that are whole."""
        for _ in range(POLLS_PER_TURN_MAX):
            try:
                rows = self._reader.poll()
            except StreamError as error:
                self._note(str(error))
                return
            for row in rows:
                self._take(row)
            if self._reader.caught_up:
                self._flush()
            self._hand_on()
            for note in self._reader.notes():
                self._note(note)
            if self._reader.caught_up:
                return

    def _note(self, note: str) -> None:
        if note not in self.notes:
            log.warning("stream: %s", note)
            self.notes.append(note)

    def _hand_on(self) -> None:
        """The position goes with the last step of the piece: a crash in between reads the piece again."""
        ready, self._ready = self._ready, []
        for event in ready[:-1]:
            self._emit(event)
        if ready:
            # A step that is still being gathered lies before the reader's position: it is not given away yet.
            whole = self._step is None
            position = json.dumps(self._reader.position) if whole else None
            self._emit(replace(ready[-1], position=position))

    def _take(self, row: Row) -> None:
        if row.step is None:
            return
        if row.step != self._step:
            self._flush()
            self._step = row.step
        if len(self._names) < NAMES_MAX:
            self._names.add(row.metric)
        self._values[row.metric] = row.value

    def _flush(self) -> None:
        """Hand on what is known of the step, once its reward is."""
        name = self._reward_name()
        if self._step is None or name is None or name not in self._values:
            return
        metrics = {
            known.value: value
            for metric, value in self._values.items()
            if value is not None and (known := canonical(metric)) is not None
        }
        self.metric_found = name
        self._ready.append(RewardLogged(step=self._step, reward=self._values[name], metrics=metrics))
        self._step, self._values = None, {}

    def _reward_name(self) -> str | None:
        if self._metric == "auto":
            return find_reward_metric(self._names)
        if self._metric in self._values:
            return self._metric
        return next((name for name in self._values if fnmatchcase(name, self._metric)), None)
