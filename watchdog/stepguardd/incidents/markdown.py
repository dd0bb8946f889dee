"""The report as Markdown, for a terminal, a ticket or a pager: the answer first, at most 80 columns."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Final

from ..core.diagnosis import NAMES, Hypothesis
from ..core.state import Mode
from ..sparkline import sparkline
from .report import Report
from .slices import LogSlice
from .words import plain, seconds

NOT_DONE: Final = "What it did not do, because of the mode:"
_WIDTH: Final = 80
_CAUSES_SHOWN: Final = 4
_LOG_LINES_BEFORE: Final = 12
_LOG_LINES_AFTER: Final = 24
_STACK_LINES: Final = 60
_STAMP: Final = re.compile(r"^\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,\d]*\]?|^\[ *\d+\.\d+\]")


def as_markdown(report: Report) -> str:
    """The whole report."""
    incident = report.incident
    parts = [
        f"# Incident {incident.number}: {report.title}",
        _fill(" ".join(report.summary)),
        _list(f"{label}: {value}" for label, value in headline(report)),
        "## What to do",
        _list([*report.steps, *report.advice]),
        _commands(report),
        "## The reward",
        _curve(report),
        "## What happened",
        _timeline(report),
    ]
    if report.hypotheses:
        parts += ["## Why, most likely", *_causes(report)]
    parts += ["## What Stepguard did", _actions(report), "## What it cost", _list(costs(report))]
    if report.figures:
        parts += ["## The server's metrics, before and after", f"{report.scraped}.", _figures(report)]
    for log in report.logs:
        if log.lines:
            parts += [f"## Log: {log.name}", _log(log)]
    for name, text in report.stacks:
        lines = text.splitlines()
        more = (
            [f"… {len(lines) - _STACK_LINES} more lines in stacks/{name}.txt"]
            if len(lines) > _STACK_LINES
            else []
        )
        parts += [f"## Stacks: {name}", _code([*lines[:_STACK_LINES], *more])]
    if report.config:
        parts += ["## The configuration in force", _config(report)]
    parts += ["## What this rests on", _list(sources(report))]
    return "\n\n".join(parts) + "\n"


def headline(report: Report) -> list[tuple[str, str]]:
    """The facts that stand on top, in order."""
    incident, cost = report.incident, report.cost
    opened = datetime.fromtimestamp(report.opened_wall, UTC)
    facts = [
        ("Run", f"{report.run}, mode {report.mode}"),
        ("State", report.stage),
        ("Opened", f"{opened:%Y-%m-%d %H:%M:%S} UTC, reason {incident.reason.value}"),
    ]
    if incident.onset_step is not None:
        facts.append(("Since step", str(incident.onset_step)))
    if incident.server is not None:
        facts.append(("Server", incident.server))
    facts.append(("Held", seconds(cost.held_s)))
    facts.append(("Optimizer steps on garbage", str(cost.garbage_steps)))
    return facts


def costs(report: Report) -> list[str]:
    """What it cost, one line each, with the figures it comes from."""
    cost = report.cost
    lines = [f"Time held: {seconds(cost.held_s)}"]
    if cost.steps_lost is not None and cost.step_s is not None:
        lines.append(
            f"Steps lost: {cost.steps_lost:.1f} (a step took {seconds(cost.step_s)}; "
            f"steps taken again: {cost.steps_again}; batches generated anew: {cost.refused_batches})"
        )
    else:
        lines.append(f"Batches refused: {cost.refused_batches}")
    lines.append(f"Optimizer steps on garbage: {cost.garbage_steps}")
    if cost.gpu_hours is not None:
        lines.append(f"GPU-hours: {cost.gpu_hours:.3g} ({cost.gpus} GPUs on this machine)")
    else:
        lines.append(f"GPU-hours: {cost.held_s / 3600:.2g} for each GPU of the run; none was seen here")
    return lines


def sources(report: Report) -> list[str]:
    """What was read, and what could not be."""
    lines = [
        f"{report.decisions} decisions of the journal; `stepguard replay decisions.jsonl` decides them again",
        *(f"log of {log.name}: {log.path}" for log in report.logs),
        *(f"not there: {note}" for note in report.notes),
    ]
    written = datetime.fromtimestamp(report.written_wall, UTC)
    return [*lines, f"written {written:%Y-%m-%d %H:%M:%S} UTC"]


def window(report: Report) -> tuple[int, int]:
    """The part of the curve's rows that shows the incident: as indices, from and up to."""
    steps, curve = report.curve.steps, report.curve
    if not steps:
        return 0, 0
    middle = next(
        (i for i, step in enumerate(steps) if curve.onset is not None and step >= curve.onset), len(steps) - 1
    )
    return max(0, middle - 40), min(len(steps), middle + 30)


def worth_showing(report: Report) -> list[Hypothesis]:
    """The causes to look at: the first, and every other that is not far-fetched."""
    return [
        one for at, one in enumerate(report.hypotheses[:_CAUSES_SHOWN]) if not at or one.confidence >= 0.05
    ]


def action_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """When, what, how long, and how it ended."""
    ends = {True: "done", False: "failed", None: "under way"}
    return [
        (
            f"{action.after_s:+.2f} s",
            action.name,
            seconds(action.took_s),
            ends[action.ok] + (f": {action.detail}" if action.detail else ""),
        )
        for action in report.actions
    ]


def shown_lines(log: LogSlice) -> tuple[list[str], list[str], int, int]:
    """The lines of a log that a report shows: before and after the opening, and how many it leaves out."""
    before, after = _folded(log.lines[: log.before]), _folded(log.lines[log.before :])
    kept_before = list(before[-_LOG_LINES_BEFORE:])
    kept_after = list(after[:_LOG_LINES_AFTER])
    return kept_before, kept_after, len(before) - len(kept_before), len(after) - len(kept_after)


def _folded(lines: Sequence[str]) -> list[str]:
    """A line that comes again and again, once, with its number; of a traceback the end."""
    folded: list[str] = []
    for _, same in groupby(_without_frames(lines), key=lambda line: _STAMP.sub("", line)):
        first, *others = same
        folded.append(f"{first}   [{len(others) + 1} times]" if others else first)
    return folded


def _without_frames(lines: Sequence[str]) -> Iterator[str]:
    """
    A log whose tracebacks are told by their last frame and their exception: the rest is how Python got there.

    A frame is the line that names it, and what of its source is indented further.
    """
    at = 0
    while at < len(lines):
        yield lines[at]
        at += 1
        if not lines[at - 1].endswith("Traceback (most recent call last):"):
            continue
        frames = []
        while at < len(lines) and lines[at].startswith("  "):
            if lines[at].lstrip().startswith("File "):
                frames.append(at)
            at += 1
        if len(frames) > 1:
            yield f"  … {len(frames) - 1} frames"
        if frames:
            yield from lines[frames[-1] : at]


def _commands(report: Report) -> str:
    return _code([f"{command}    # {what}" for what, command in report.commands], "sh")


def _curve(report: Report) -> str:
    first, last = window(report)
    values = report.curve.values[first:last]
    if not values:
        return "The journal has no reward of this run."
    steps = report.curve.steps
    known = [value for value in values if value is not None]
    line = sparkline(values)
    told = ", then ".join(
        f"steps {steps[rows[0]]} to {steps[rows[-1]]}"
        for rows in (
            [*group] for _, group in groupby(range(first, last), key=lambda row: report.curve.attempts[row])
        )
    )
    if known:
        told += f", {min(known):.3g} to {max(known):.3g}"
    mark = ""
    if report.curve.onset is not None:
        at = next((i for i in range(first, last) if steps[i] >= report.curve.onset), None)
        if at is not None:
            mark = " " * (at - first) + "^ " + f"step {report.curve.onset}"
    refused = [
        f"step {step}: batch refused ({plain(reason)}), its reward was "
        + ("unknown" if reward is None else f"{reward:.3g}")
        for step, reward, reason in report.curve.refused[:5]
    ]
    text = _code([line, *([mark] if mark else []), told])
    return text + ("\n\n" + _list(refused) if refused else "")


def _timeline(report: Report) -> str:
    lines = []
    for moment in report.moments:
        head = f"{moment.after_s:+9.3f} s  {moment.plane.value:<9} {'!' if moment.bad else ' '} "
        lines += textwrap.wrap(
            moment.text,
            _WIDTH,
            initial_indent=head,
            subsequent_indent=" " * len(head),
            break_on_hyphens=False,
        )
    return _code(lines)


def _causes(report: Report) -> list[str]:
    parts = []
    shown = worth_showing(report)
    for number, one in enumerate(shown, start=1):
        name = NAMES[one.cause]
        parts.append(f"### {number}. {name[:1].upper()}{name[1:]} ({one.confidence:.0%})")
        parts.append("For:\n\n" + _list(one.supporting))
        if one.opposing:
            parts.append("Against:\n\n" + _list(one.opposing))
    rest = [f"{NAMES[one.cause]} ({one.confidence:.0%})" for one in report.hypotheses[len(shown) :]]
    return [*parts, _fill(f"Less likely: {', '.join(rest)}.")] if rest else parts


def _actions(report: Report) -> str:
    would = f"\n\n{NOT_DONE}\n\n{_list(report.would)}" if report.would else ""
    if not report.actions:
        return nothing_done(report) + would
    rows = [f"{when:>9}  {what} ({took}): {how}" for when, what, took, how in action_rows(report)]
    lines = [part for row in rows for part in textwrap.wrap(row, _WIDTH, subsequent_indent=" " * 11)]
    return _code(lines) + would


def nothing_done(report: Report) -> str:
    """One sentence, for a report without acts."""
    return "Nothing: it only looked on." if report.mode == Mode.SHADOW.value else "Nothing: it held and told."


def _figures(report: Report) -> str:
    rows = [
        f"{figure.name:<46} {_number(figure.before):>12} {_number(figure.after):>12}"
        for figure in report.figures
    ]
    return _code([f"{'':<46} {'before':>12} {'after':>12}", *rows])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _log(log: LogSlice) -> str:
    before, after, hidden_before, hidden_after = shown_lines(log)
    lines = [f"… {hidden_before} earlier lines in logs/{log.name}.log"] if hidden_before else []
    lines += [*before, "--- here the run was held ---", *after]
    if hidden_after:
        lines.append(f"… {hidden_after} more lines in logs/{log.name}.log")
    return _code(lines)


def _config(report: Report) -> str:
    own = [f"{key} = {value}" for key, value, differs in report.config if differs]
    same = len(report.config) - len(own)
    return _code([*own, f"# and {same} defaults: see config.toml beside this report"], "toml")


def _code(lines: Sequence[str], language: str = "text") -> str:
    """A block that nothing in it can end."""
    fence = "```"
    while any(fence in line for line in lines):
        fence += "`"
    return "\n".join([f"{fence}{language}", *lines, fence])


def _fill(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False, break_long_words=False)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(
        textwrap.fill(line, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for line in lines
    )
