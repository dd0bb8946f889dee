"""
Rows of a metric stream, and what every reader of one promises.

A reader is synchronous and incremental: nothing here waits, sleeps or starts a thread. Whoever owns a reader
wakes it (by inotify or by a timer), polls until it has caught up, and stores its position beside what it did
with the rows. A reader says nothing about what a value means.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, Protocol

Position = dict[str, object]
"""Where a reader stands, in values that JSON can hold."""

POLL_BYTES = 256 * 1024
"""What one poll reads of a file at most, unless a single record is longer."""

WORDS = {
    b"true": 1.0,
    b"false": 0.0,
    b"null": None,
    b'"NaN"': math.nan,
    b'"Infinity"': math.inf,
    b'"-Infinity"': -math.inf,
}


# A tuple and no dataclass: a backtest makes millions of these, and a frozen dataclass costs three times as
# much.
class Row(NamedTuple):
    """One value of one metric: as it was logged, under the name that it was logged with."""

    step: int | None
    """The training step, None where the row carries none."""
    metric: str
    """The metric's name, as logged."""
    value: float | None
    """The value; NaN and the infinities are values, None is unknown."""
    time: float | None
    """Wall-clock seconds since 1970, None where the format keeps no time."""


class StreamError(Exception):
    """The stream cannot be read as what it was said to be; the message names the file and the remedy."""


class Reader(Protocol):
    """What the daemon and `stepguard stream` know of every format."""

    def poll(self) -> tuple[Row, ...]:
        """
        Read on from the position, a bounded piece, and return its rows; whole records only.

        An empty tuple is no sign of the end: `caught_up` is. Raises StreamError, and nothing else.
        """
        ...

    @property
    def position(self) -> Position:
        """Where the next poll goes on; given to a new reader of the same path, no row is lost or doubled."""
        ...

    @property
    def caught_up(self) -> bool:
        """Whether the last poll met the end of what there is for now."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the writer has said that nothing more will come."""
        ...

    def notes(self) -> tuple[str, ...]:
        """Hand out what a person should know about the stream, each sentence once."""
        ...

    def unfinished(self) -> tuple[str, ...]:
        """Say what would be missing if nothing more ever came: a torn tail, no end record."""
        ...

    def advice(self) -> str | None:
        """Say how the writer could be made to write sooner, where it is known to be late."""
        ...

    def close(self) -> None:
        """Give the files back. A closed reader is not polled again."""
        ...


class Notes:
    """A bounded list of sentences for a person; one that is already waiting is not taken twice."""

    def __init__(self, size_max: int = 64) -> None:
        self._waiting: deque[str] = deque(maxlen=size_max)

    def add(self, sentence: str) -> None:
        """Keep the sentence until `take`; the oldest one gives way when there are too many."""
        if sentence not in self._waiting:
            self._waiting.append(sentence)

    def take(self) -> tuple[str, ...]:
        """Hand out what was kept, once."""
        taken = tuple(self._waiting)
        self._waiting.clear()
        return taken


def number(value: object) -> tuple[bool, float | None]:
    """
    Tell whether a decoded JSON value can be a metric's, and which: (False, None) for text, lists and objects.

    Null is unknown (True, None). The three words that JSON lacks are accepted as strings, in Python's and in
    JavaScript's spelling.
    """
    if value is None:
        return True, None
    if isinstance(value, int | float):
        try:
            return True, float(value)
        except OverflowError:
            return True, math.inf if value > 0 else -math.inf
    if isinstance(value, str) and value.lower() in {"nan", "inf", "-inf", "infinity", "-infinity"}:
        return True, float(value)
    return False, None


def whole(value: float | None) -> int | None:
    """Return a step as an integer: None for what is no finite number."""
    if value is None or not math.isfinite(value):
        return None
    return int(value)


def offset_in(position: Mapping[str, object], key: str) -> int:
    """Read a byte offset out of a stored position; anything but a count of bytes is a StreamError."""
    offset = position.get(key, 0)
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise StreamError(
            f"the stored position has {key}={offset!r}, which is no byte offset; remove it to start over"
        )
    return offset
