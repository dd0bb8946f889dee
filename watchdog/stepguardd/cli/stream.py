"""
`stepguard stream`: what the reward readers see in a file or a folder, as it is or as it grows.

stdout carries rows and nothing else; what a person should know about the file goes to stderr. Nothing is
kept: a file of any size is shown in the memory of one piece of it.
"""

import json as json_text
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from stepguardd.cli.output import bad_news, fail, say
from stepguardd.sources.reward.aliases import find_reward_metric
from stepguardd.sources.reward.formats import Format, open_stream
from stepguardd.sources.reward.rows import Position, Reader, Row, StreamError

_WAIT_S = 0.2


def stream(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A file, a W&B run's folder, or a folder of runs (the newest)."),
    ],
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as it grows, until the run ends or Ctrl-C.")
    ] = False,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="KEY", help="Only this metric; auto: the reward.")
    ] = None,
    step_key: Annotated[
        str | None,
        typer.Option("--step-key", metavar="KEY", help="Where the step is (train/global_step, else _step)."),
    ] = None,
    format_: Annotated[Format | None, typer.Option("--format", help="Do not guess the format.")] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern", metavar="REGEX", help="For a log: groups value and, where present, metric, step."
        ),
    ] = None,
    position: Annotated[
        Path | None,
        typer.Option("--position", metavar="FILE", help="Go on where FILE says, and keep it up to date."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show the reward stream as Stepguard reads it. Exit code 1 when the metric asked for is not in it."""
    try:
        reader = open_stream(
            path,
            step_key=step_key,
            format_=format_,
            pattern=pattern,
            position=_load(position) if position else None,
        )
        if json:
            _show(reader, Chooser(metric), follow=follow, write=_as_json, position=position)
        else:
            _show(reader, Chooser(metric), follow=follow, write=_Table().write, position=position)
    except StreamError as wrong:
        fail(str(wrong))
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # The reader of our output went away, which is its right; Python must not flush into the closed pipe
        # at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Chooser:
    """Which rows were asked for; `auto` settles on the best reward name among those seen so far."""

    def __init__(self, metric: str | None) -> None:
        self._auto = metric == "auto"
        self._metric = None if self._auto else metric
        self._all = metric is None
        self._seen: dict[str, None] = {}
        self.shown = 0

    def choose(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return the rows to show."""
        new = [row.metric for row in rows if row.metric not in self._seen]
        if new:
            if len(self._seen) < 10_000:
                self._seen.update(dict.fromkeys(new))
            if self._auto:
                self._metric = find_reward_metric(self._seen)
        chosen = rows if self._all else [row for row in rows if row.metric == self._metric]
        self.shown += len(chosen)
        return chosen

    def missing(self) -> str | None:
        """Say which metric was asked for in vain and what there is instead; None when rows were shown."""
        if self._all or self.shown:
            return None
        wanted = (
            "no metric here is known to be the reward" if self._auto else f"no metric {self._metric!r} here"
        )
        names = ", ".join(sorted(self._seen)[:12]) or "none"
        return f"{wanted}; name one with --metric KEY, of: {names}"


def _show(
    reader: Reader,
    chooser: Chooser,
    *,
    follow: bool,
    write: Callable[[Sequence[Row]], None],
    position: Path | None,
) -> None:
    """Print rows until the end of the stream, or until it ends when it is followed."""
    advised = False
    stored: Position = {}
    while True:
        rows = chooser.choose(reader.poll())
        if rows:
            write(rows)
            sys.stdout.flush()
        if position is not None and reader.position != stored:
            stored = reader.position
            _store(position, stored)
        for note in reader.notes():
            say(note)
        if not reader.caught_up:
            continue
        if not follow or reader.finished:
            break
        advice = None if advised else reader.advice()
        if advice is not None:
            say(advice)
            advised = True
        time.sleep(_WAIT_S)
    for sentence in reader.unfinished():
        say(sentence)
    missing = chooser.missing()
    if missing is not None:
        bad_news(missing)


class _Table:
    """Rows for a person: one line each under one heading."""

    def __init__(self) -> None:
        self._headed = False

    def write(self, rows: Sequence[Row]) -> None:
        """Print the rows."""
        lines = [] if self._headed else [f"{'step':>9}  {'value':>13}  {'time':<19}  metric\n"]
        self._headed = True
        for row in rows:
            step = "-" if row.step is None else str(row.step)
            value = "unknown" if row.value is None else f"{row.value:.6g}"
            lines.append(f"{step:>9}  {value:>13}  {_clock(row.time):<19}  {_printable(row.metric)}\n")
        sys.stdout.write("".join(lines))


def _clock(seconds: float | None) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds is not None else "-"
    except (OverflowError, ValueError, OSError):
        return "-"


def _printable(name: str) -> str:
    return name if name.isprintable() else "".join(c if c.isprintable() else "?" for c in name)


def _as_json(rows: Sequence[Row]) -> None:
    sys.stdout.write("".join([_json_line(row) for row in rows]))


_quoted: dict[str, str] = {}


def _json_line(row: Row) -> str:
    """One object; written by hand, since the numbers need no escaping and names repeat."""
    name = _quoted.get(row.metric)
    if name is None:
        name = json_text.dumps(row.metric)
        if len(_quoted) < 10_000:
            _quoted[row.metric] = name
    step = "null" if row.step is None else str(row.step)
    return (
        f'{{"step": {step}, "metric": {name}, "value": {_number(row.value)}, "time": {_number(row.time)}}}\n'
    )


def _number(value: float | None) -> str:
    if value is None:
        return "null"
    if math.isfinite(value):
        return repr(value)
    return '"NaN"' if math.isnan(value) else ('"Infinity"' if value > 0 else '"-Infinity"')


def _load(file: Path) -> Position | None:
    try:
        stored = json_text.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as unreadable:
        raise StreamError(
            f"{file}: the stored position cannot be read ({unreadable}); remove it to start over"
        ) from None
    if not isinstance(stored, dict):
        raise StreamError(f"{file}: this is no stored position; remove it to start over")
    return stored


def _store(file: Path, position: Position) -> None:
    beside = file.with_name(file.name + ".new")
    try:
        beside.write_text(json_text.dumps(position), encoding="utf-8")
        beside.replace(file)
    except OSError as refused:
        raise StreamError(f"{file}: the position cannot be stored: {refused.strerror}") from None
