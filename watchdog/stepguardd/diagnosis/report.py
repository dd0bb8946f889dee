"""
The report on a case, as an engineer would write it: what happened, why, what was done, what to do.

Markdown for a terminal or a ticket (80 columns), one self-contained page with the curve, and plain data for
programs. Whatever came out of a file is quoted as text.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable

from stepguardd.core.diagnosis import NAMES, Hypothesis
from stepguardd.diagnosis.case import Case

__all__ = ["as_json", "as_markdown", "as_page"]

_SHOWN = 4
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2024; background: #fff; margin: 2rem auto;
       max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } li { margin: .2rem 0; overflow-wrap:
anywhere; } .chart { height: 22rem; } .against { color: #60646c; } .sure { color: #60646c; font-weight:
normal; }
"""


def as_json(case: Case) -> dict[str, object]:
    """The case in the shape of `stepguard diagnose --json`."""
    return {
        "onset_step": case.onset_step,
        "garbage_steps": case.garbage_steps,
        "hypotheses": [
            {
                "cause": hypothesis.cause.value,
                "confidence": hypothesis.confidence,
                "for": list(hypothesis.supporting),
                "against": list(hypothesis.opposing),
            }
            for hypothesis in case.hypotheses
        ],
        "actions": case.actions,
        "advice": case.advice,
    }


def as_markdown(case: Case) -> str:
    """The report in Markdown."""
    parts = [f"# Diagnosis: {_title(case)}", _fill(case.summary)]
    if case.onset_step is not None:
        parts.append(
            _list([f"Onset: step {case.onset_step}", f"Steps trained on nothing: {case.garbage_steps}"])
        )
    if case.hypotheses:
        parts.append("## What may have happened")
    for number, hypothesis in enumerate(case.hypotheses[:_SHOWN], start=1):
        parts.append(f"### {number}. {_capital(NAMES[hypothesis.cause])} ({hypothesis.confidence:.0%})")
        parts.append("For:\n\n" + _list(hypothesis.supporting))
        if hypothesis.opposing:
            parts.append("Against:\n\n" + _list(hypothesis.opposing))
    rest = [f"{NAMES[one.cause]} ({one.confidence:.0%})" for one in case.hypotheses[_SHOWN:]]
    if rest:
        parts.append(_fill(f"Less likely: {', '.join(rest)}."))
    parts += ["## What was done", _list(_capital(action) + "." for action in case.actions)]
    if case.advice:
        parts += ["## What to do next", _list(case.advice)]
    parts += ["## What was read", _list(case.read)]
    return "\n\n".join(parts) + "\n"


def as_page(case: Case) -> str:
    """
    The report as one HTML page with the curve.

    Raises:
        ModuleNotFoundError: plotly is not installed.

    """
    from stepguardd.curves import chart, script  # noqa: PLC0415 - plotly, when a page is really written

    curve = chart(case.replayed, "curve") if case.replayed is not None else ""
    head = script() if case.replayed is not None else ""
    causes = "".join(_cause(number, one) for number, one in enumerate(case.hypotheses, start=1))
    sections = "".join(
        f"<h2>{title}</h2><ul>{_items(lines)}</ul>"
        for title, lines in (
            ("What was done", case.actions),
            ("What to do next", case.advice),
            ("What was read", case.read),
        )
        if lines
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Stepguard: diagnosis</title>'
        f"<style>{_STYLE}</style>{head}</head><body><h1>{html.escape(_title(case))}</h1>"
        f"<p>{html.escape(case.summary)}</p>{curve}{causes}{sections}</body></html>\n"
    )


def _title(case: Case) -> str:
    if not case.hypotheses:
        return "nothing wrong was found"
    first = case.hypotheses[0]
    return f"{NAMES[first.cause]} ({first.confidence:.0%} sure)"


def _cause(number: int, hypothesis: Hypothesis) -> str:
    sure = f'<span class="sure">{hypothesis.confidence:.0%}</span>'
    against = f'<ul class="against">{_items(hypothesis.opposing)}</ul>' if hypothesis.opposing else ""
    named = html.escape(_capital(NAMES[hypothesis.cause]))
    told = f"<p>For</p><ul>{_items(hypothesis.supporting)}</ul>"
    return f"<h2>{number}. {named} {sure}</h2>{told}" + (f"<p>Against</p>{against}" if against else "")


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{html.escape(line)}</li>" for line in lines)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _fill(text: str) -> str:
    return textwrap.fill(text, 80, break_on_hyphens=False, break_long_words=False)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(
        textwrap.fill(line, 80, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for line in lines
    )
