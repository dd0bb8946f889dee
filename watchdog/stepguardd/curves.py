"""
Replayed runs as one page: the reward, bands for holds and warnings, values under the pointer.

One self-contained file: plotly's script is inlined, nothing is fetched. Whatever came out of a file is text
on the page, never markup. Raises ModuleNotFoundError where plotly is not installed.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable

from stepguardd.replay import Replayed, Trip, Warned

__all__ = ["chart", "page", "script"]

_HOLD, _WARNING, _LINE = "rgba(205, 43, 49, 0.16)", "rgba(245, 159, 0, 0.20)", "#3451b2"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2024; background: #fff; margin: 2rem auto;
       max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2.2rem; overflow-wrap: anywhere; }
li { margin: .15rem 0; } .hold { color: #a1161c; } .warning { color: #8a5a00; } .quiet { color: #60646c; }
.chart { height: 22rem; } code { font-size: .92em; }
"""


def page(results: Iterable[Replayed]) -> str:
    """The page, as HTML."""
    parts = [_section(result, at) for at, result in enumerate(results)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Stepguard: replay</title>'
        f"<style>{_STYLE}</style>{script()}</head><body><h1>What Stepguard would have done</h1>"
        f"{''.join(parts)}</body></html>\n"
    )


def script() -> str:
    """Plotly's own script, to stand once in a page's head."""
    from plotly.offline import get_plotlyjs  # noqa: PLC0415 - 5 MB of text, when a page is really written

    return f"<script>{get_plotlyjs()}</script>"


def chart(result: Replayed, name: str) -> str:
    """One curve with its bands, as HTML; the page must hold `script()`."""
    history = result.history
    data = [
        {
            "type": "scattergl" if len(history.steps) > 5000 else "scatter",
            "mode": "lines",
            "x": history.steps,
            "y": [value if value is not None and math.isfinite(value) else None for value in history.values],
            "line": {"color": _LINE, "width": 1.3},
            "name": history.metric,
            "hovertemplate": "step %{x}<br>reward %{y:.4g}<extra></extra>",
        },
        _marks(result, result.trips, "hold", "#cd2b31"),
        _marks(result, result.warnings, "warning", "#f59f00"),
    ]
    layout = {
        "margin": {"l": 48, "r": 16, "t": 8, "b": 40},
        "xaxis": {"title": {"text": "step"}, "zeroline": False},
        "yaxis": {"title": {"text": history.metric}, "zeroline": False},
        "shapes": [*_bands(result, result.warnings, _WARNING), *_bands(result, result.trips, _HOLD)],
        "hovermode": "closest",
        "showlegend": False,
        "plot_bgcolor": "#fff",
    }
    arguments = f"{_script_json(name)}, {_script_json(data)}, {_script_json(layout)}, {{responsive: true}}"
    return f'<div class="chart" id="{html.escape(name)}"></div><script>Plotly.newPlot({arguments})</script>'


def _section(result: Replayed, at: int) -> str:
    history = result.history
    said = [
        f'<li class="hold">step {trip.step}: hold, <code>{trip.reason.value}</code> ({trip.kind.value}), '
        f"since step {trip.onset_step}: {_figures(trip)}</li>"
        for trip in result.trips
    ]
    said += [
        f'<li class="warning">step {warning.step}: warning, <code>{warning.reason.value}</code></li>'
        for warning in result.warnings
    ]
    if result.garbage_steps_avoided:
        said.append(f"<li>{result.garbage_steps_avoided} optimizer steps on garbage avoided</li>")
    told = "<p class=quiet>Nothing to hold, nothing to warn about.</p>"
    if said:
        told = f"<ul>{''.join(said)}</ul>"
    size = f"<p class=quiet>{len(history.steps)} steps of <code>{html.escape(history.metric)}</code></p>"
    return f"<h2>{html.escape(history.source)}</h2>{size}{chart(result, f'curve-{at}')}{told}"


def _figures(trip: Trip) -> str:
    return html.escape(", ".join(f"{key} {value:.4g}" for key, value in trip.evidence.items()))


def _marks(result: Replayed, found: Iterable[Trip | Warned], what: str, colour: str) -> dict[str, object]:
    found = list(found)
    values = [result.history.values[one.index] for one in found]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [one.step for one in found],
        "y": [value if value is not None and math.isfinite(value) else 0.0 for value in values],
        "text": [f"{what}: {one.reason.value}" for one in found],
        "marker": {"color": colour, "size": 8},
        "hovertemplate": "step %{x}<br>%{text}<extra></extra>",
    }


def _bands(result: Replayed, found: Iterable[Trip | Warned], colour: str) -> list[dict[str, object]]:
    steps = result.history.steps
    return [
        {
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": one.step,
            "x1": steps[min(one.until, len(steps) - 1)],
            "y0": 0,
            "y1": 1,
            "fillcolor": colour,
            "line": {"width": 0},
            "layer": "below",
        }
        for one in found
    ]


def _script_json(value: object) -> str:
    """JSON that cannot end the script that it stands in."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
