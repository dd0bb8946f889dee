"""
The reward around an incident as a picture in the page: SVG, a few KB, no script.

It takes the page's own colours, so it is light or dark as its reader likes, prints, and is drawn by every
viewer of HTML. What a person points at says its value.
"""

import html
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from math import floor, isfinite, log10
from typing import Final

from .report import Curve
from .words import plain

_WIDTH: Final = 1000.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 14.0, 42.0
_HEIGHT: Final = 330.0
_WHOLE_HEIGHT: Final = 64.0
_POINTS_MAX: Final = 600
"""Of the whole run, more than there are pixels for: each stretch is drawn by its lowest and its highest."""

_OFF_THE_PAPER: Final = 1e100
"""A value that no scale can show beside others."""

_Point = tuple[float, float]


class _Plane:
    """A rectangle of the picture with its two scales."""

    def __init__(self, steps: tuple[float, float], values: tuple[float, float], top: float, height: float):
        self.steps, self.values = steps, values
        self.top, self.height = top, height

    def x(self, step: float) -> float:
        low, high = self.steps
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - low) / ((high - low) or 1.0)

    def y(self, value: float) -> float:
        low, high = self.values
        return self.top + self.height * (high - value) / ((high - low) or 1.0)


def picture(curve: Curve, window: tuple[int, int], held_for: str) -> str:
    """
    The picture; empty where the journal has no reward.

    Args:
        curve: the rewards and what happened along them.
        window: which of the curve's rows show the incident: from and up to, as indices.
        held_for: how long the run was held, in words.

    """
    first, last = window
    rows = range(first, last)
    if not rows:
        return ""
    steps = [curve.steps[row] for row in rows]
    inside = min(steps) - 1, max(steps) + 1
    refused = [one for one in curve.refused if inside[0] <= one[0] <= inside[1] + 1]
    inside = inside[0], max([inside[1], *(step for step, _, _ in refused)])
    known = [value for row in rows if (value := _known(curve.values[row])) is not None]
    known += [value for _, reward, _ in refused if (value := _known(reward)) is not None]
    plane = _Plane(inside, _span(known), _TOP, _HEIGHT - _TOP - _BOTTOM)
    parts = [*_axes(plane), *_held(curve, plane, held_for), *_lines(curve, rows, plane)]
    parts += _marks(curve, refused, plane)
    parts += [
        _dot(plane, curve.steps[row], value)
        for row in rows
        if (value := _known(curve.values[row])) is not None
    ]
    height = _HEIGHT
    if len(curve.steps) > len(rows):
        parts += _whole(curve, inside)
        height += _WHOLE_HEIGHT
    label = f"The reward of steps {min(steps)} to {max(steps)}"
    if curve.held is not None:
        label += f"; held after step {curve.held[0]} for {held_for}"
    return (
        f'<div class="wide" tabindex="0"><svg class="chart" viewBox="0 0 {_WIDTH:g} {height:g}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(parts)}</svg></div>'
    )


def _known(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) and abs(value) < _OFF_THE_PAPER else None


def _span(values: Sequence[float]) -> _Point:
    """The values' range with zero in it and some air."""
    low, high = min([0.0, *values]), max([0.0, *values])
    if high - low < 1 / _OFF_THE_PAPER:
        high = low + 1.0
    return low - 0.07 * (high - low), high + 0.07 * (high - low)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two values, at most so many."""
    rough = (high - low) / most
    if not rough > 0:
        return [low]
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = floor(low / step) + (0 if floor(low / step) * step >= low else 1)
    return [number * step for number in range(first, floor(high / step + 1e-9) + 1)]


def _axes(plane: _Plane) -> Iterator[str]:
    for value in ticks(*plane.values, 6):
        y = plane.y(value)
        yield f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>'
    below = plane.top + plane.height
    for step in ticks(*plane.steps, 12):
        if step == int(step):
            yield f'<text x="{plane.x(step):.1f}" y="{below + 17:.1f}" text-anchor="middle">{step:.0f}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text x="{middle:g}" y="{below + 35:.1f}" text-anchor="middle">optimizer step</text>'


def _held(curve: Curve, plane: _Plane, held_for: str) -> Iterator[str]:
    if curve.held is None:
        return
    begin, end = curve.held
    back = "" if end > begin else f", then back to step {end - 1}"
    end = max(end, begin + 1)
    x0, x1 = plane.x(begin), min(plane.x(end), _WIDTH - _RIGHT)
    right = x0 > 0.7 * _WIDTH
    at, anchor = (x0 - 6, "end") if right else (x1 + 6, "start")
    yield (
        f'<rect class="held" x="{x0:.1f}" y="{plane.top:g}" width="{max(2.0, x1 - x0):.1f}" '
        f'height="{plane.height:g}"/><text class="bad" x="{at:.1f}" y="{plane.top + 12:g}" '
        f'text-anchor="{anchor}">held {html.escape(held_for + back)}</text>'
    )


def _lines(curve: Curve, rows: range, plane: _Plane) -> Iterator[str]:
    """Each attempt by itself; what a rollback or a relaunch took back is dashed."""
    attempts = [list(group) for _, group in groupby(rows, key=lambda row: curve.attempts[row])]
    for own, following in pairwise([*attempts, []]):
        again = curve.steps[following[0]] if following else None
        kept = [row for row in own if again is None or curve.steps[row] < again]
        void = own[max(0, len(kept) - 1) :]
        yield from _stretches(curve, kept, plane, "line")
        if again is not None:
            yield from _stretches(curve, void, plane, "line void")


def _stretches(curve: Curve, rows: Sequence[int], plane: _Plane, kind: str) -> Iterator[str]:
    """A line for each stretch of known values: an unknown one is a gap."""
    for known, group in groupby(rows, key=lambda row: _known(curve.values[row]) is not None):
        if known:
            yield _line(
                kind, [(plane.x(curve.steps[row]), plane.y(curve.values[row] or 0.0)) for row in group]
            )


def _line(kind: str, points: Sequence[_Point]) -> str:
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{drawn}"/>'


def _dot(plane: _Plane, step: int, value: float) -> str:
    where = f'cx="{plane.x(step):.1f}" cy="{plane.y(value):.1f}"'
    return f'<circle class="dot" r="6" {where}><title>step {step}: reward {value:.4g}</title></circle>'


def _marks(curve: Curve, refused: Sequence[tuple[int, float | None, str]], plane: _Plane) -> Iterator[str]:
    below = plane.top + plane.height
    for step in {step for step in curve.saved if plane.steps[0] <= step <= plane.steps[1]}:
        x = plane.x(step)
        yield (
            f'<path class="saved" d="M{x:.1f} {below - 9:.1f}l5 9h-10z"><title>checkpoint of step {step}'
            "</title></path>"
        )
    for step, reward, why in refused:
        value = _known(reward)
        x, y = plane.x(step), below if value is None else plane.y(value)
        told = "unknown" if value is None else f"{value:.4g}"
        title = f"step {step}: batch refused ({plain(why)}), its reward was {told}"
        yield (
            f'<path class="refused" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10">'
            f"<title>{html.escape(title)}</title></path>"
        )


def _whole(curve: Curve, inside: tuple[float, float]) -> Iterator[str]:
    """The whole of what the journal has, small, with the stretch above marked in it."""
    known = [value for one in curve.values if (value := _known(one)) is not None]
    span = float(min(curve.steps)), float(max(curve.steps))
    plane = _Plane(span, _span(known), _HEIGHT, _WHOLE_HEIGHT - 16)
    x0, x1 = plane.x(max(inside[0], span[0])), plane.x(min(inside[1], span[1]))
    yield (
        f'<rect class="window" x="{x0:.1f}" y="{plane.top:g}" width="{max(2.0, x1 - x0):.1f}" '
        f'height="{plane.height:g}"/>'
    )
    rows = _thinned(curve)
    for _, group in groupby(rows, key=lambda row: curve.attempts[row]):
        yield from _stretches(curve, list(group), plane, "line thin")
    below = plane.top + plane.height + 13
    yield f'<text x="{_LEFT:g}" y="{below:g}">{curve.steps[0]}</text>'
    yield f'<text x="{_WIDTH - _RIGHT:g}" y="{below:g}" text-anchor="end">{curve.steps[-1]}</text>'


def _thinned(curve: Curve) -> list[int]:
    count = len(curve.steps)
    if count <= _POINTS_MAX:
        return list(range(count))
    size = -(-2 * count // _POINTS_MAX)
    rows: set[int] = {0, count - 1}
    for begin in range(0, count, size):
        known = [
            row for row in range(begin, min(begin + size, count)) if _known(curve.values[row]) is not None
        ]
        if known:
            rows |= {
                min(known, key=lambda row: curve.values[row] or 0.0),
                max(known, key=lambda row: curve.values[row] or 0.0),
            }
    return sorted(rows)
