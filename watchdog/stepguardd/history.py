"""
A recorded run as the judgement wants it: one observation a step, in order, with what else was logged beside
it.

CSV and JSON lines are read strictly here: a step that is no step, steps out of order and a file of another
kind are refused with file, row and column; a reward that cannot be read is unknown and counted, never
guessed. W&B logs, TensorBoard files and logs come through the readers of the live stream. A step that goes
back to one seen before, and goes on from there, is a restart from an older checkpoint and starts a new
attempt.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from stepguardd.sources.reward.aliases import Signal, canonical, find_reward_metric
from stepguardd.sources.reward.formats import Format, detect, open_stream
from stepguardd.sources.reward.jsonl import STEP_KEYS, TIME_KEYS, rows_of
from stepguardd.sources.reward.rows import Row, StreamError, number

__all__ = ["History", "HistoryError", "read_history"]

STEP_MAX = 2**53
_FOLLOWED = {
    Signal.REWARD_STD,
    Signal.LOSS,
    Signal.GRAD_NORM,
    Signal.ENTROPY,
    Signal.KL,
    Signal.RESPONSE_LENGTH,
    Signal.CLIP_RATIO,
    Signal.ABORTED_RATIO,
    Signal.LOGPROB_DIFF,
}
# Second witnesses under names that no table can list: whatever says which share of the rollouts failed.
_FAILING = re.compile(
    r"abort|(?:fail|error|reject)\w*[_/]?(?:ratio|rate|frac|share|mean)|has_error", re.IGNORECASE
)
_GPU_MEMORY = re.compile(r"gpu\S*mem", re.IGNORECASE)
_MISMATCH = re.compile(r"log_?p\w*[_/]?\w*diff", re.IGNORECASE)


class HistoryError(Exception):
    """The file cannot be read as a recorded run; the message names the file, the row and the column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """One recorded run. All lists have one entry a step, in order."""

    source: str
    metric: str
    steps: list[int]
    values: list[float | None]
    """The reward; None is unknown, NaN and infinities are themselves."""
    attempts: list[int]
    times: list[float | None] = field(default_factory=list)
    """Wall-clock seconds; empty when the file has none."""
    columns: Mapping[str, list[float | None]] = field(default_factory=dict)
    """Other metrics under their canonical names, as the judgement knows them."""
    unknown: int = 0
    """Rows without a reward that could be read."""


def read_history(path: Path, *, metric: str | None = None) -> History:
    """
    Read one recorded run.

    Args:
        path: a CSV or JSON-lines file, a W&B run or TensorBoard log (file or folder), or a text log.
        metric: the reward's name in it, or a pattern for it; None: the one that the table of names knows.

    Raises:
        HistoryError: see the module.

    """
    try:
        form = detect(path)
        if path.is_file() and path.stat().st_size == 0:
            raise HistoryError(f"{path}: the file is empty")
        match form:
            case Format.CSV:
                return _from_csv(path, metric)
            case Format.JSONL:
                return _from_jsonl(path, metric)
            case _:
                return _from_stream(path, metric)
    except StreamError as wrong:
        raise HistoryError(str(wrong)) from None
    except OSError as wrong:
        raise HistoryError(f"{path}: {wrong.strerror or wrong}") from None


def signal_of(name: str) -> str | None:
    """The canonical name of a column, None when neither the judgement nor the diagnosis wants it."""
    known = canonical(name)
    if known is not None:
        return known.value if known in _FOLLOWED else None
    if _FAILING.search(name):
        return Signal.ABORTED_RATIO.value
    if _MISMATCH.search(name):
        return Signal.LOGPROB_DIFF.value
    if _GPU_MEMORY.search(name):
        return "gpu_memory"
    return None


def _chosen(path: Path, names: Iterable[str], metric: str | None) -> str:
    names = list(names)
    if metric is not None:
        matching = sorted(name for name in names if name == metric or fnmatchcase(name, metric))
        if not matching:
            raise HistoryError(f"{path}: no column {metric!r}; there are: {_listed(names)}")
        return metric if metric in matching else matching[0]
    found = find_reward_metric(names)
    if found is None:
        raise HistoryError(
            f"{path}: no column is known to be a reward; name it with --metric, out of: {_listed(names)}"
        )
    return found


def _listed(names: Iterable[str]) -> str:
    shown = sorted(names)
    return (
        ", ".join(shown[:12]) + (f", and {len(shown) - 12} more" if len(shown) > 12 else "")
        if shown
        else "none"
    )


def _step_of(path: Path, row: int, column: str, raw: object) -> int:
    """The step in a cell; anything but a whole number from 0 on is refused."""
    where = f"{path}: row {row}, column {column}"
    if isinstance(raw, str):
        text = raw.strip()
        if not text:
            raise HistoryError(f"{where}: the step is missing")
        try:
            value: float = int(text)
        except ValueError:
            try:
                value = float(text)
            except ValueError:
                raise HistoryError(f"{where}: {text[:40]!r} is no step (a whole number)") from None
    elif isinstance(raw, bool) or not isinstance(raw, int | float):
        raise HistoryError(f"{where}: {str(raw)[:40]!r} is no step (a whole number)")
    else:
        value = raw
    if not math.isfinite(value) or value != int(value):
        raise HistoryError(f"{where}: {raw} is no step (a whole number)")
    if value < 0:
        raise HistoryError(f"{where}: the step {int(value)} is negative")
    if value >= STEP_MAX:
        raise HistoryError(f"{where}: the step {int(value)} is too large to be one")
    return int(value)


# --- CSV


def _from_csv(path: Path, metric: str | None) -> History:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
        delimiter = "\t" if "\t" in first and "," not in first else ","
        header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        _check_header(path, header)
        step_at = next((header.index(key) for key in STEP_KEYS if key in header), None)
        if step_at is None:
            raise HistoryError(
                f"{path}: row 1: no column for the step; it is called one of {', '.join(STEP_KEYS)}"
            )
        others = [name for at, name in enumerate(header) if at != step_at and name not in TIME_KEYS]
        value_at = header.index(_chosen(path, others, metric))
        time_at = next((header.index(key) for key in TIME_KEYS if key in header), None)
        attempt_at = header.index("attempt") if "attempt" in header else None
        taken = {step_at, value_at, time_at, attempt_at}
        signals: dict[str, int] = {}
        for at, name in enumerate(header):
            signal = signal_of(name) if at not in taken else None
            if signal is not None:
                signals.setdefault(signal, at)
        reader = csv.reader(file, delimiter=delimiter)
        try:
            return _csv_rows(path, reader, header, step_at, value_at, time_at, attempt_at, signals)
        except csv.Error as wrong:
            raise HistoryError(f"{path}: row {reader.line_num + 1}: {wrong}") from None


def _check_header(path: Path, header: list[str]) -> None:
    if len(header) < 2:
        raise HistoryError(f"{path}: row 1 names fewer than two columns; a header like step,reward is needed")
    if any(_number_in(name) is not None for name in header):
        raise HistoryError(
            f"{path}: row 1 holds numbers, not the names of columns; add a header like step,reward"
        )
    doubled = next((name for name in header if header.count(name) > 1), None)
    if doubled is not None:
        raise HistoryError(f"{path}: row 1: there are two columns {doubled!r}")


def _csv_rows(
    path: Path,
    reader: Iterator[list[str]],
    header: list[str],
    step_at: int,
    value_at: int,
    time_at: int | None,
    attempt_at: int | None,
    signals: dict[str, int],
) -> History:
    whole = _plain_rows(path, header, step_at, value_at) if len(header) == 2 else None
    if whole is not None:
        return whole
    steps: list[int] = []
    rows: list[int] = []
    values: list[float | None] = []
    attempts: list[int] = []
    times: list[float | None] = []
    columns: dict[str, list[float | None]] = {signal: [] for signal in signals}
    unknown, width, row = 0, len(header), 1
    for cells in reader:
        row += 1
        if not cells:
            continue
        if len(cells) != width:
            # Torn or malformed: without its step it cannot be placed, and nothing in it is trusted.
            unknown += 1
            continue
        text = cells[step_at]
        steps.append(
            int(text) if text.isdecimal() and len(text) < 16 else _step_of(path, row, header[step_at], text)
        )
        rows.append(row)
        text = cells[value_at]
        try:
            values.append(float(text))
        except ValueError:
            unknown += 1
            values.append(None)
        if time_at is not None:
            times.append(_number_in(cells[time_at]))
        if attempt_at is not None:
            attempts.append(_step_of(path, row, "attempt", cells[attempt_at]))
        for signal, at in signals.items():
            columns[signal].append(_number_in(cells[at]))
    metric = header[value_at]
    if not steps:
        raise HistoryError(f"{path}: no row under the header" + (" could be read" if unknown else ""))
    if all(value is None for value in values):
        raise HistoryError(f"{path}: column {metric}: no row holds a number")
    attempts = attempts or _attempts(path, header[step_at], steps, rows)
    return History(
        source=str(path),
        metric=metric,
        steps=steps,
        values=values,
        attempts=attempts,
        times=times,
        columns=columns,
        unknown=unknown,
    )


def _plain_rows(path: Path, header: list[str], step_at: int, value_at: int) -> History | None:
    """
    A file of nothing but ascending steps and numbers, read by columns; None for any other, which is read by
    rows.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        file.readline()
        try:
            columns = list(zip(*csv.reader(file), strict=True))
            steps, values = list(map(int, columns[step_at])), list(map(float, columns[value_at]))
        except (ValueError, IndexError, csv.Error):
            return None
    if steps[0] < 0 or steps[-1] >= STEP_MAX or not all(map(operator.lt, steps, steps[1:])):
        return None
    return History(
        source=str(path), metric=header[value_at], steps=steps, values=[*values], attempts=[0] * len(steps)
    )


def _number_in(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# --- The order of steps


def _attempts(path: Path, column: str, steps: list[int], rows: list[int]) -> list[int]:
    """
    Which attempt each row belongs to; refuses steps that are doubled or out of order.

    A restart goes back to steps that were there before and walks through them again.
    """
    attempts = [0] * len(steps)
    if all(map(operator.lt, steps, steps[1:])):
        return attempts
    attempt, previous, highest = 0, -1, -1
    seen: set[int] | None = None
    for i, step in enumerate(steps):
        if step <= previous:
            if seen is None:
                seen = set(steps[:i])
            where = f"{path}: row {rows[i]}, column {column}"
            if step == previous:
                raise HistoryError(f"{where}: step {step} stands there twice (also in row {rows[i - 1]})")
            if not _walks_again(steps[i : i + 6], seen, highest):
                raise HistoryError(
                    f"{where}: step {step} comes after step {previous}: the steps are not in order"
                )
            attempt += 1
        previous = step
        highest = max(highest, step)
        attempts[i] = attempt
        if seen is not None:
            seen.add(step)
    return attempts


def _walks_again(ahead: list[int], seen: set[int], highest: int) -> bool:
    old = [step for step in ahead if step <= highest]
    ascending = all(a < b for a, b in itertools.pairwise(ahead))
    starts_inside = len(ahead) == 1 or ahead[1] <= highest
    return ascending and starts_inside and sum(step in seen for step in old) * 2 > len(old)


# --- JSON lines


def _from_jsonl(path: Path, metric: str | None) -> History:
    names: set[str] = set()
    records: list[tuple[int, dict[str, object]]] = []
    unreadable = 0
    with path.open("rb") as file:
        for row, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                unreadable += 1
                continue
            records.append((row, record))
            if len(record) > len(names) or not record.keys() <= names:
                names.update(entry.metric for entry in rows_of(record))
                names.update(record.keys())
    if not records:
        raise HistoryError(f"{path}: no line is a JSON object")
    flat = {name for name in names if name not in STEP_KEYS and name not in TIME_KEYS}
    chosen = _chosen(path, flat, metric)
    return _jsonl_rows(path, records, chosen, unreadable)


def _jsonl_rows(
    path: Path, records: list[tuple[int, dict[str, object]]], metric: str, unreadable: int
) -> History:
    steps: list[int] = []
    rows: list[int] = []
    values: list[float | None] = []
    times: list[float | None] = []
    others: list[dict[str, float | None]] = []
    named: dict[str, str | None] = {}
    has_value: list[bool] = []
    unknown, column = unreadable, "step"
    for row, record in records:
        payload = next(
            (record[key] for key in ("data", "metrics") if isinstance(record.get(key), dict)), record
        )
        assert isinstance(payload, dict)
        column, raw = _json_step(path, row, record, payload)
        step = _step_of(path, row, column, raw)
        if payload is record and metric in record:
            found, present = number(record[metric])[1], True
            extra = {key: number(value)[1] for key, value in record.items()} if len(record) > 3 else {}
        else:
            flat = {entry.metric: entry.value for entry in rows_of(record)}
            present = metric in flat or metric in record
            found, extra = flat.get(metric), flat
        signals: dict[str, float | None] = {}
        for name, value in extra.items():
            if name not in named:
                named[name] = signal_of(name) if name != metric else None
            if (signal := named[name]) is not None:
                signals.setdefault(signal, value)
        if steps and step == steps[-1] and not (present and has_value[-1]):
            # Several lines of one step, of which at most one carries the reward.
            if present:
                values[-1], has_value[-1] = found, True
            others[-1] = {**others[-1], **signals}
            continue
        steps.append(step)
        rows.append(row)
        values.append(found)
        has_value.append(present)
        others.append(signals)
        times.append(next((number(record[key])[1] for key in TIME_KEYS if key in record), None))
    if not any(has_value) or all(value is None for value in values):
        raise HistoryError(f"{path}: column {metric}: no row holds a number")
    attempts = _attempts(path, column, steps, rows)
    # A line without the reward, of a step without one, is another kind of line: not a step whose reward is
    # missing.
    kept = [i for i, has in enumerate(has_value) if has]
    unknown += sum(values[i] is None for i in kept)
    signals_seen = sorted({signal for i in kept for signal in others[i]})
    return History(
        source=str(path),
        metric=metric,
        steps=[steps[i] for i in kept],
        values=[values[i] for i in kept],
        attempts=[attempts[i] for i in kept],
        times=[times[i] for i in kept] if any(t is not None for t in times) else [],
        columns={signal: [others[i].get(signal) for i in kept] for signal in signals_seen},
        unknown=unknown,
    )


def _json_step(
    path: Path, row: int, record: Mapping[str, object], payload: Mapping[str, object]
) -> tuple[str, object]:
    for source in (payload, record):
        for key in STEP_KEYS:
            if key in source and source[key] is not None:
                return key, source[key]
    raise HistoryError(f"{path}: row {row}, column step: the step is missing")


# --- Everything that the live readers read


def _from_stream(path: Path, metric: str | None) -> History:
    names: set[str] = set()
    for batch in _polled(path):
        names.update(row.metric for row in batch)
    if not names:
        raise HistoryError(f"{path}: there is no metric in it")
    chosen = _chosen(path, names, metric)
    wanted = {name: signal for name in names if name != chosen and (signal := signal_of(name)) is not None}
    steps: list[int] = []
    values: list[float | None] = []
    attempts: list[int] = []
    times: list[float | None] = []
    beside: dict[int, dict[str, float | None]] = {}
    others: list[dict[str, float | None]] = []
    for batch in _polled(path):
        for row in batch:
            if row.step is None or row.step < 0:
                continue
            if row.metric != chosen:
                if row.metric in wanted:
                    beside.setdefault(row.step, {}).setdefault(wanted[row.metric], row.value)
                continue
            if steps and row.step == steps[-1]:
                values[-1] = row.value
                continue
            restarted = bool(steps) and row.step < steps[-1]
            if restarted:
                others += [beside.get(step, {}) for step in steps[len(others) :]]
                beside.clear()
            attempts.append(attempts[-1] + restarted if attempts else 0)
            steps.append(row.step)
            values.append(row.value)
            times.append(row.time)
    if not steps:
        raise HistoryError(f"{path}: column {chosen}: no row of it carries a step")
    others += [beside.get(step, {}) for step in steps[len(others) :]]
    signals = sorted({signal for extra in others for signal in extra})
    return History(
        source=str(path),
        metric=chosen,
        steps=steps,
        values=values,
        attempts=attempts,
        times=times if any(t is not None for t in times) else [],
        columns={signal: [extra.get(signal) for extra in others] for signal in signals},
        unknown=sum(value is None for value in values),
    )


def _polled(path: Path) -> Iterator[tuple[Row, ...]]:
    """All rows that are there now, piece by piece."""
    reader = open_stream(path)
    try:
        while True:
            rows = reader.poll()
            yield rows
            if reader.caught_up and not rows:
                return
    finally:
        reader.close()
