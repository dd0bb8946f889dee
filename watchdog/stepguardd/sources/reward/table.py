"""
Metrics as text: CSV files with a header line, and log files in which numbers are found by regular
expressions.

In logs, four shapes are known without configuration: verl's console line (`step:12 - critic/score/mean:0.5 -
…`), printed dictionaries (`rollout 12: {'rollout/raw_reward': 0.5}`, `{'loss': 0.1, 'reward': 0.5}`), AReaL's
statistics table (cells between bars, after a line `Train step 13/100 done`), and `name=value` pairs on a line
that names a step. A pattern of the user's own replaces them: with the groups `value`, and `metric` and `step`
where the line has them. Promises that a line which does not fit costs that line alone. Logs carry no
trustworthy time: it is left unknown.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from stepguardd.sources.lines import Lines
from stepguardd.sources.reward.jsonl import STEP_KEYS, TIME_KEYS
from stepguardd.sources.reward.rows import POLL_BYTES, Notes, Position, Row, StreamError, number, whole

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf|NaN|Infinity|None)"
_NAME = r"[A-Za-z_][\w./@%-]*"

_VERL = re.compile(rf"(?:^|\s)step:(\d{{1,18}})((?: - {_NAME}:(?:np\.float\d+\()?{_NUMBER}\)?)+)")
_VERL_PAIR = re.compile(rf" - ({_NAME}):(?:np\.float\d+\()?({_NUMBER})")
_DICT = re.compile(r"(?:\b(?:rollout|step|iteration|eval)\s+(\d{1,18})\s*:\s*)?\{(\s*['\"][^{}]*)\}")
_DICT_PAIR = re.compile(rf"['\"]([^'\"]+)['\"]\s*:\s*['\"]?(?:np\.float\d+\(|tensor\()?({_NUMBER})['\"]?")
_AREAL_STEP = re.compile(r"Train step (\d{1,18})/\d+ done")
_STEP = re.compile(r"\b(?:global_)?step\s*[=:]\s*(\d{1,18})\b", re.IGNORECASE)
_PAIR = re.compile(rf"(?<![\w./@%-])({_NAME})=({_NUMBER})(?![\w.])")
_LINE_CHARS_MAX = 16_384


def _value(text: str) -> float | None:
    return None if text == "None" else float(text)


class _TextReader:
    """What CSV and log readers share: a followed file and the sentences about it."""

    def __init__(self, path: Path, position: Mapping[str, object] | None) -> None:
        self._path = path
        self._lines = Lines(path, position)
        self._notes = Notes()

    @property
    def caught_up(self) -> bool:
        """See `rows.Reader`."""
        return self._lines.caught_up

    @property
    def finished(self) -> bool:
        """Never: nothing in such a file says that it is complete."""
        return False

    def notes(self) -> tuple[str, ...]:
        """See `rows.Reader`."""
        return self._notes.take()

    def unfinished(self) -> tuple[str, ...]:
        """See `rows.Reader`."""
        torn = self._lines.torn
        if not torn:
            return ()
        return (f"{self._path}: the last {torn} bytes are no whole line (torn or half written)",)

    def advice(self) -> str | None:
        """None: nothing is known about when such files are written."""
        return None

    def close(self) -> None:
        """See `rows.Reader`."""
        self._lines.close()

    def _next_lines(self, bytes_max: int) -> list[str]:
        restarted = self._lines.restarted
        try:
            lines = self._lines.read(bytes_max)
        except OSError as failed:
            raise StreamError(f"{self._path}: {failed.strerror}") from None
        if self._lines.restarted > restarted:
            self._notes.add(f"{self._path}: cut or written anew; reading it from its start")
        return [line.decode(errors="replace") for line in lines]


class Csv(_TextReader):
    """Follows one CSV file whose first line names the columns; see `rows.Reader`."""

    def __init__(
        self, path: Path, *, step_key: str | None = None, position: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(path, position)
        self._step_key = step_key
        columns = position.get("columns") if position else None
        self._columns = [str(name) for name in columns] if isinstance(columns, list) else []

    @property
    def position(self) -> Position:
        """Where the file stands, and its columns."""
        return {**self._lines.position, "columns": list(self._columns)}

    def poll(self, bytes_max: int = POLL_BYTES) -> tuple[Row, ...]:
        """Read on; see `rows.Reader`. Raises StreamError where the first line names no columns."""
        fresh, restarted = self._lines.fresh, self._lines.restarted
        lines = self._next_lines(bytes_max)
        if not lines:
            return ()
        if fresh or self._lines.restarted > restarted or not self._columns:
            self._columns = self._cells(lines.pop(0))
            if len(self._columns) < 2 or any(_is_number(name) for name in self._columns):
                raise StreamError(
                    f"{self._path}: the first line names no columns; add a header line, or use --format"
                )
        rows: list[Row] = []
        for line in lines:
            rows.extend(self._rows(self._cells(line)))
        return tuple(rows)

    def _cells(self, line: str) -> list[str]:
        delimiter = "\t" if "\t" in line else ","
        try:
            return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
        except csv.Error:
            return []

    def _rows(self, cells: list[str]) -> Iterator[Row]:
        if len(cells) != len(self._columns):
            if cells:
                self._notes.add(
                    f"{self._path}: a line has {len(cells)} cells, not {len(self._columns)}; left out"
                )
            return
        values: dict[str, float | None] = {}
        for name, cell in zip(self._columns, cells, strict=True):
            if not cell:
                values[name] = None
            elif _is_number(cell):
                values[name] = float(cell)
        keys = (self._step_key,) if self._step_key is not None else STEP_KEYS
        step = whole(next((values[key] for key in keys if values.get(key) is not None), None))
        time = next((values[key] for key in TIME_KEYS if values.get(key) is not None), None)
        for name, value in values.items():
            if name not in keys and name not in TIME_KEYS:
                yield Row(step, name, value, time)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return number(text)[0]
    return True


class LogTable(_TextReader):
    """
    Follows one log file; see `rows.Reader`.

    `pattern` is a regular expression of the user's own. The step of a line without one is the last that was
    seen.
    """

    def __init__(
        self,
        path: Path,
        *,
        pattern: str | None = None,
        metric: str = "reward",
        position: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(path, position)
        self._metric = metric
        self._step: int | None = None
        stored = position.get("step") if position else None
        if isinstance(stored, int):
            self._step = stored
        self._pattern = None
        if pattern is not None:
            try:
                self._pattern = re.compile(pattern)
            except re.error as wrong:
                raise StreamError(f"the pattern {pattern!r} is no regular expression: {wrong}") from None
            if "value" not in self._pattern.groupindex:
                raise StreamError(f"the pattern {pattern!r} has no group (?P<value>…)")

    @property
    def position(self) -> Position:
        """Where the file stands, and the last step that was seen."""
        return {**self._lines.position, "step": self._step}

    def poll(self, bytes_max: int = POLL_BYTES) -> tuple[Row, ...]:
        """Read on; see `rows.Reader`."""
        rows: list[Row] = []
        for line in self._next_lines(bytes_max):
            if len(line) <= _LINE_CHARS_MAX:
                rows.extend(self._own(line) if self._pattern is not None else self._known(line))
        return tuple(rows)

    def _own(self, line: str) -> Iterator[Row]:
        assert self._pattern is not None
        for match in self._pattern.finditer(line):
            groups = match.groupdict()
            if groups.get("step") is not None:
                self._step = whole(_float_or_none(groups["step"]))
            value = groups["value"]
            if value is not None and _is_number(value):
                yield Row(self._step, groups.get("metric") or self._metric, float(value), None)

    def _known(self, line: str) -> Iterator[Row]:
        if "│" in line or "|" in line:
            yield from self._bars(line)
            return
        done = _AREAL_STEP.search(line)
        if done is not None:
            self._step = int(done[1]) - 1  # the line counts from one, AReaL's other logs from zero
            return
        verl = _VERL.search(line)
        if verl is not None:
            self._step = int(verl[1])
            for name, text in _VERL_PAIR.findall(verl[2]):
                yield Row(self._step, name, _value(text), None)
            return
        printed = _DICT.search(line) if "{" in line else None
        if printed is not None:
            yield from self._printed(printed)
            return
        named = _STEP.search(line)
        if named is not None:
            self._step = int(named[1])
            for name, text in _PAIR.findall(line):
                if name.lower() not in {"step", "global_step"}:
                    yield Row(self._step, name, _value(text), None)

    def _printed(self, printed: re.Match[str]) -> Iterator[Row]:
        pairs = [(name, _value(text)) for name, text in _DICT_PAIR.findall(printed[2])]
        values = dict(pairs)
        step = printed[1] or next((values[key] for key in STEP_KEYS if values.get(key) is not None), None)
        if step is not None:
            self._step = whole(float(step))
        for name, value in pairs:
            yield Row(self._step, name, value, None)

    def _bars(self, line: str) -> Iterator[Row]:
        """Read the cells of a drawn table: a name, then its number, as often as the line repeats that."""
        cells = [cell.strip() for cell in re.split("[│|]", line)]
        for name, text in pairwise(cells):
            if re.fullmatch(_NAME, name) and re.fullmatch(_NUMBER, text):
                yield Row(self._step, name, _value(text), None)


def _float_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
