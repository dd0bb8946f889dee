"""
The report as one HTML page: no script, nothing is fetched, it prints well, and follows the reader's light or
dark. Small enough for a mail or a ticket.

Whatever came out of a log, a name or a config is text on the page, never markup.
"""

import html
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ..core.diagnosis import NAMES, Hypothesis
from .chart import picture
from .markdown import NOT_DONE, action_rows, costs, nothing_done, shown_lines, sources, window, worth_showing
from .report import Report
from .slices import LogSlice
from .words import seconds

_STAGES: Final = {"closed": "good", "probation": "warn", "held": "bad", "locked out": "bad"}


def as_page(report: Report) -> str:
    """The whole page."""
    incident = report.incident
    opened = datetime.fromtimestamp(report.opened_wall, UTC)
    badge = _STAGES.get(report.stage, "warn")
    title = f"Incident {incident.number}: {report.title}"
    sections = [
        f'<div class="top"><span class="badge {badge}">{_text(report.stage)}</span>'
        f"<span>run {_text(report.run)}</span><span>mode {_text(report.mode)}</span>"
        f"<span>{opened:%Y-%m-%d %H:%M:%S} UTC</span><code>{_text(incident.reason.value)}</code></div>",
        f"<h1>{_text(title)}</h1>",
        f'<p class="lead">{_text(" ".join(report.summary))}</p>',
        _tiles(report),
        _section("What to do", _to_do(report)),
        _section("The reward", _chart(report)),
        _section("What happened", _timeline(report)),
        _section("Why, most likely", _causes(report)),
        _section("What Stepguard did", _actions(report)),
        _section("What it cost", f"<ul>{_items(costs(report))}</ul>"),
        _section("The server’s metrics, before and after", _figures(report)),
        _section("Logs", "".join(_log(log) for log in report.logs if log.lines)),
        _section(
            "Stacks", "".join(_folded(name, f"<pre>{_text(text)}</pre>") for name, text in report.stacks)
        ),
        _section("The configuration in force", _config(report)),
        _section("What this rests on", f'<ul class="quiet">{_items(sources(report))}</ul>'),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_beside('page.css')}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


def _tiles(report: Report) -> str:
    cost = report.cost
    tiles = [
        (seconds(cost.held_s), "held"),
        (str(cost.garbage_steps), "optimizer steps on garbage"),
        (str(cost.refused_batches), "bad batches refused"),
        (str(report.incident.restarts), "restarts"),
    ]
    if report.incident.onset_step is not None:
        tiles.insert(0, (str(report.incident.onset_step), "step of the onset"))
    if cost.gpu_hours is not None:
        tiles.append((f"{cost.gpu_hours:.3g}", f"GPU-hours on {cost.gpus} GPUs"))
    told = "".join(
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(what)}</span></div>' for value, what in tiles
    )
    return f'<div class="tiles">{told}</div>'


def _to_do(report: Report) -> str:
    commands = "".join(
        f"<dt>{_text(what)}</dt><dd><code>{_text(command)}</code></dd>" for what, command in report.commands
    )
    steps = _items([*report.steps, *report.advice])
    return f'<div class="do"><ul>{steps}</ul><dl class="commands">{commands}</dl></div>'


def _timeline(report: Report) -> str:
    rows, passed = [], False
    for moment in report.moments:
        begins = not passed and moment.after_s >= 0
        passed = passed or begins
        classes = " ".join(name for name, on in (("bad", moment.bad), ("zero", begins)) if on)
        at = datetime.fromtimestamp(moment.wall, UTC)
        rows.append(
            f'<tr class="{classes}"><td class="n">{moment.after_s:+.3f} s</td>'
            f'<td class="n quiet">{at:%H:%M:%S}</td>'
            f'<td><span class="plane">{moment.plane.value}</span></td>'
            f'<td class="t">{_text(moment.text)}</td></tr>'
        )
    head = "<tr><th class=n>from the hold</th><th class=n>UTC</th><th>where</th><th>what</th></tr>"
    return f'<div class="wide" tabindex="0"><table class="moments">{head}{"".join(rows)}</table></div>'


def _causes(report: Report) -> str:
    told = [_cause(number, one) for number, one in enumerate(report.hypotheses, start=1)]
    count = len(worth_showing(report))
    shown, rest = "".join(told[:count]), told[count:]
    return shown + (_folded(f"{len(rest)} less likely", "".join(rest)) if rest else "")


def _cause(number: int, one: Hypothesis) -> str:
    name = NAMES[one.cause]
    against = f'<p>against</p><ul class="against">{_items(one.opposing)}</ul>' if one.opposing else ""
    return (
        f'<div class="cause"><header><h3>{number}. {_text(name[:1].upper() + name[1:])}</h3>'
        f"<b>{one.confidence:.0%}</b></header>"
        f'<div class="bar"><i style="width:{one.confidence:.0%}"></i></div>'
        f"<p>for</p><ul>{_items(one.supporting)}</ul>{against}</div>"
    )


def _actions(report: Report) -> str:
    would = f"<p>{NOT_DONE}</p><ul>{_items(report.would)}</ul>" if report.would else ""
    if not report.actions:
        return f'<p class="quiet">{nothing_done(report)}</p>{would}'
    rows = "".join(
        f'<tr><td class="n">{_text(when)}</td><td>{_text(what)}</td><td class="n">{_text(took)}</td>'
        f'<td class="t">{_text(how)}</td></tr>'
        for when, what, took, how in action_rows(report)
    )
    head = "<tr><th class=n>begun</th><th>what</th><th class=n>took</th><th>how it ended</th></tr>"
    return f'<div class="wide" tabindex="0"><table>{head}{rows}</table></div>{would}'


def _figures(report: Report) -> str:
    if not report.figures:
        return ""
    rows = "".join(
        f'<tr><td>{_text(figure.server)}</td><td class="t"><code>{_text(figure.name)}</code></td>'
        f'<td class="n">{_number(figure.before)}</td><td class="n">{_number(figure.after)}</td></tr>'
        for figure in report.figures
    )
    head = "<tr><th>server</th><th>metric</th><th class=n>before</th><th class=n>after</th></tr>"
    table = f'<div class="wide" tabindex="0"><table>{head}{rows}</table></div>'
    return f'<p class="quiet">{_text(report.scraped)}</p>{table}'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _log(log: LogSlice) -> str:
    before, after, hidden_before, hidden_after = shown_lines(log)
    lines = [f'<span class="gap">… {hidden_before} earlier lines</span>'] if hidden_before else []
    lines += [_text(line) for line in before]
    lines.append('<span class="cut">— here the run was held —</span>')
    lines += [_text(line) for line in after]
    if hidden_after:
        lines.append(f'<span class="gap">… {hidden_after} more lines</span>')
    joined = "\n".join(lines)
    return f"<h3>{_text(log.name)} <code class=quiet>{_text(log.path)}</code></h3><pre>{joined}</pre>"


def _config(report: Report) -> str:
    if not report.config:
        return ""
    own = "\n".join(f"{key} = {value}" for key, value, differs in report.config if differs)
    rest = "\n".join(f"{key} = {value}" for key, value, differs in report.config if not differs)
    return f"<pre>{_text(own)}</pre>" + _folded("all defaults", f"<pre>{_text(rest)}</pre>")


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{_text(line)}</li>" for line in lines)


def _text(value: str) -> str:
    return html.escape(value)


# --- The chart


def _chart(report: Report) -> str:
    drawn = picture(report.curve, window(report), seconds(report.cost.held_s))
    if not drawn:
        return '<p class="quiet">The journal has no reward of this run.</p>'
    void = (
        " Dashed: steps that were taken back."
        if len({report.curve.attempts[row] for row in range(*window(report))}) > 1
        else ""
    )
    refused = (
        " Crosses: batches that were refused, with the reward they would have been trained on."
        if report.curve.refused
        else ""
    )
    saved = " Triangles: checkpoints." if report.curve.saved else ""
    told = f"Line: reward of each committed step.{void}{refused}{saved} Point at one for its value."
    return f'{drawn}<p class="quiet">{told}</p>'


def _beside(name: str) -> str:
    """A file of this package, to stand in the page."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
