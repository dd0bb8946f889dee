"""
Metrics as JSON lines: verl's file logger, prime-rl's `metrics.jsonl`, miles' dashboard, and anything flat.

Known shapes: `{"step", "data": {…}}` (verl), `{"ts", "step_key", "step", "metrics": {…}}` (miles), and flat
objects with a step and a time among the values (prime-rl). Promises that a line which is no JSON object costs
that line alone, and is said. Nested objects are flattened with dots; text and lists are no metrics.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from stepguardd.sources.lines import Lines
from stepguardd.sources.reward.rows import POLL_BYTES, Notes, Position, Row, StreamError, number, whole

STEP_KEYS = (
    "train/global_step",
    "global_step",
    "training/global_step",
    "step",
    "_step",
    "iteration",
    "rollout/step",
)
"""Where a row's step is looked for when no key is configured, in this order."""

TIME_KEYS = ("_timestamp", "timestamp", "time", "ts", "wall_time")

_PAYLOADS = ("data", "metrics")
_DEPTH_MAX = 8


def rows_of(record: Mapping[str, object], step_key: str | None = None) -> tuple[Row, ...]:
    """Turn one decoded line into rows; empty when it holds no number."""
    payload: Mapping[str, object] = record
    for name in _PAYLOADS:
        inner = record.get(name)
        if isinstance(inner, dict):
            payload = inner
            break
    step = _step(record, payload, step_key)
    time = _first(record, TIME_KEYS)
    skip = (
        {*TIME_KEYS, "step", "_step", "_runtime"}
        if payload is record
        else {"_step", "_timestamp", "_runtime"}
    )
    return tuple(
        Row(step, name, value, time) for name, value in _numbers(payload, "", _DEPTH_MAX) if name not in skip
    )


def _step(record: Mapping[str, object], payload: Mapping[str, object], step_key: str | None) -> int | None:
    keys = (step_key,) if step_key is not None else STEP_KEYS
    found = _first(payload, keys)
    return whole(found if found is not None else _first(record, keys))


def _first(values: Mapping[str, object], keys: tuple[str, ...]) -> float | None:
    for key in keys:
        if key in values:
            numeric, value = number(values[key])
            if numeric and value is not None:
                return value
    return None


def _numbers(values: Mapping[str, object], prefix: str, depth: int) -> Iterator[tuple[str, float | None]]:
    for key, value in values.items():
        if isinstance(value, dict):
            if depth:
                yield from _numbers(value, f"{prefix}{key}.", depth - 1)
            continue
        numeric, metric = number(value)
        if numeric:
            yield prefix + key, metric


class JsonLines:
    """Follows one file of JSON lines; see `rows.Reader`."""

    def __init__(
        self, path: Path, *, step_key: str | None = None, position: Mapping[str, object] | None = None
    ) -> None:
        self._path = path
        self._step_key = step_key
        self._lines = Lines(path, position)
        self._notes = Notes()
        self._broken = 0

    @property
    def position(self) -> Position:
        """See `rows.Reader`."""
        return self._lines.position

    @property
    def caught_up(self) -> bool:
        """See `rows.Reader`."""
        return self._lines.caught_up

    @property
    def finished(self) -> bool:
        """Never: nothing in such a file says that it is complete."""
        return False

    def poll(self, bytes_max: int = POLL_BYTES) -> tuple[Row, ...]:
        """Read on; see `rows.Reader`."""
        restarted = self._lines.restarted
        try:
            lines = self._lines.read(bytes_max)
        except OSError as failed:
            raise StreamError(f"{self._path}: {failed.strerror}") from None
        if self._lines.restarted > restarted:
            self._notes.add(f"{self._path}: cut or written anew; reading it from its start")
        rows: list[Row] = []
        for line in lines:
            if line and not line.isspace():
                rows.extend(self._take(line))
        return tuple(rows)

    def notes(self) -> tuple[str, ...]:
        """See `rows.Reader`."""
        return self._notes.take()

    def unfinished(self) -> tuple[str, ...]:
        """See `rows.Reader`."""
        said = []
        if self._broken:
            said.append(f"{self._path}: {self._broken} lines are no JSON objects")
        if self._lines.torn:
            said.append(
                f"{self._path}: the last {self._lines.torn} bytes are no whole line (torn or half written)"
            )
        return tuple(said)

    def advice(self) -> str | None:
        """None: such files are written line by line."""
        return None

    def close(self) -> None:
        """See `rows.Reader`."""
        self._lines.close()

    def _take(self, line: bytes) -> tuple[Row, ...]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            return rows_of(record, self._step_key)
        self._broken += 1
        if self._broken == 1:
            self._notes.add(f"{self._path}: a line is no JSON object: {line[:60].decode(errors='replace')!r}")
        return ()
