"""
A logged reward stream as events: rows of one step gathered, the reward found among them.

A stream is late by its nature (a W&B row reaches the file after seconds, a `log(step=)` row one step later),
so it judges runs whose trainer has no guard, and only informs where there is one.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from .. import clock
from ..core.events import Event, RewardLogged
from ..credentials import CredentialError, read_secret
from ..status import number
from .reward.aliases import canonical, find_reward_metric
from .reward.formats import Format, open_stream
from .reward.rows import StreamError

if TYPE_CHECKING:
    from ..config import Config
    from ..config.settings import StreamSettings
    from ..control.contract import StreamDict
    from .reward.rows import Position, Reader, Row

log = logging.getLogger("stepguardd")

POLLS_PER_TURN_MAX: Final = 8
NAMES_MAX: Final = 4096
NOTES_MAX: Final = 8

Emit = Callable[[Event], None]


class RewardStream:
    """
    Follows one stream. It is read in a thread: a disk may stall, and W&B's servers take their time.

    Args:
        opener: opens the reader, as often as that fails; raises StreamError.
        where: what it reads, for people, and to know a stored position again.
        metric: the reward's name or pattern; "auto" finds it.
        emit: where the events go.

    """

    interval_s = 0.5

    def __init__(self, opener: Callable[[], Reader], where: str, metric: str, emit: Emit) -> None:
        self._open = opener
        self._where = where
        self._metric = metric
        self._emit = emit
        self._reader: Reader | None = None
        self._names: set[str] = set()
        self._ready: list[RewardLogged] = []
        self._found: str | None = None
        self._last: tuple[float | None, float] | None = None
        self._trouble: str | None = None
        self._told: deque[str] = deque(maxlen=NOTES_MAX)
        self._step: int | None = None
        self._values: dict[str, float | None] = {}

    @classmethod
    def of(cls, config: Config, position: str | None, emit: Emit) -> RewardStream | None:
        """
        The stream that the config names, or None; what is not there yet is waited for.

        Args:
            config: the whole configuration.
            position: where an earlier daemon stood, out of its last `RewardLogged`.
            emit: where the events go.

        """
        key, *others = config.stream.named() or (None,)
        if key is None:
            return None
        where = str(getattr(config.stream, key))
        opener = functools.partial(_opened, config.stream, key, _stood(position, where))
        stream = cls(opener, where, config.reward.metric, emit)
        for other in others:
            stream._note(f"stream.{other} is not followed, since stream.{key} is set")
        return stream

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of it now."""
        return (*self._told, *(() if self._trouble is None else (self._trouble,)))

    def status(self, now: float) -> StreamDict:
        """How it is followed, for `status`; `now` is on the monotonic clock."""
        reward, at = (None, None) if self._last is None else self._last
        return {
            "path": self._where,
            "metric": self._found,
            "reward": number(reward),
            "age_s": None if at is None else round(now - at, 3),
            "trouble": self._trouble,
        }

    async def watch(self) -> None:
        """Look at an interval. Ends by cancellation."""
        while True:
            await self.look()
            await asyncio.sleep(self.interval_s)

    async def look(self) -> None:
        """Read on, a bounded piece, and hand on the steps that are whole."""
        for _ in range(POLLS_PER_TURN_MAX):
            try:
                piece = await asyncio.to_thread(self._poll)
            except StreamError as error:
                self._troubled(str(error))
                return
            self._troubled(None)
            for row in piece.rows:
                self._take(row)
            if piece.caught_up:
                self._flush()
            self._hand_on(piece.position)
            for note in piece.notes:
                self._note(note)
            if piece.caught_up:
                return

    def _poll(self) -> _Piece:
        """In a thread. Raises StreamError."""
        if self._reader is None:
            self._reader = self._open()
        reader = self._reader
        rows = reader.poll()
        return _Piece(rows, reader.caught_up, reader.position, reader.notes())

    def _troubled(self, why: str | None) -> None:
        if why is not None and why != self._trouble:
            log.warning("stream: %s", why)
        self._trouble = why

    def _note(self, note: str) -> None:
        if note not in self._told:
            log.warning("stream: %s", note)
            self._told.append(note)

    def _hand_on(self, position: Position) -> None:
        """The position goes with the last step of the piece: a crash in between reads the piece again."""
        ready, self._ready = self._ready, []
        for event in ready[:-1]:
            self._emit(event)
        if ready:
            # A step that is still being gathered lies before the reader's position: it is not given away yet.
            whole = self._step is None
            stands = json.dumps({"of": self._where, "at": position}) if whole else None
            self._emit(replace(ready[-1], position=stands))

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
        self._found = name
        self._last = (self._values[name], clock.monotonic())
        self._ready.append(RewardLogged(step=self._step, reward=self._values[name], metrics=metrics))
        self._step, self._values = None, {}

    def _reward_name(self) -> str | None:
        if self._metric == "auto":
            return find_reward_metric(self._names)
        if self._metric in self._values:
            return self._metric
        return next((name for name in self._values if fnmatchcase(name, self._metric)), None)


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one poll of the reader gave."""

    rows: Sequence[Row]
    caught_up: bool
    position: Position
    notes: tuple[str, ...]


def _stood(position: str | None, where: str) -> Position | None:
    """Where an earlier daemon stood in this very stream; None where it read another one."""
    known = None if position is None else json.loads(position)
    if not isinstance(known, dict):
        return None
    if "of" not in known:  # a daemon that knew of one stream only
        return known
    return known.get("at") if known["of"] == where else None


def _opened(stream: StreamSettings, key: str, stood: Position | None) -> Reader:
    """The reader of the stream that `key` names. Raises StreamError."""
    if key == "wandb_run":
        try:
            secret = read_secret("stream.wandb_secret", str(stream.wandb_secret))
        except CredentialError as missing:
            raise StreamError(str(missing)) from None
        from .reward.wandb_api import WandbApi  # noqa: PLC0415 - with httpx, which no other stream needs

        return WandbApi(
            str(stream.wandb_run),
            key=secret.reveal(),
            step_key=stream.step_key,
            base_url=stream.wandb_url,
            position=stood,
        )
    formats = {"wandb_dir": Format.WANDB, "jsonl": Format.JSONL}
    return open_stream(
        getattr(stream, key),
        step_key=stream.step_key,
        format_=formats.get(key),
        pattern=stream.pattern,
        position=stood,
    )
