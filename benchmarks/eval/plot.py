"""The delays beside the bound, as one small SVG that a diff can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

_WIDTH, _LEFT, _ROW = 760, 190, 26
_LIMIT = 45.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One family's figures; infinite where there is none."""

    name: str
    alarm: float
    hold: float
    hold_late: float
    """The 95th percentile of the hold's delay."""
    bound: float
    goal: float


def svg(bars: Sequence[Bar]) -> str:
    """The picture: a row a family, delays in steps on a square-root scale."""
    height = 64 + _ROW * len(bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        'font-size="12" role="img" aria-label="Delay of alarms and holds per kind of fault">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for tick in (0, 1, 2, 5, 10, 20, 40):
        x = _x(tick)
        parts.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="26" y2="{height - 34}" stroke="#e4e4e7"/>')
        parts.append(f'<text x="{x:.0f}" y="{height - 18}" text-anchor="middle" fill="#60646c">{tick}</text>')
    parts.append(f'<text x="{_LEFT}" y="{height - 4}" fill="#60646c">steps from the first bad one</text>')
    for row, bar in enumerate(bars):
        parts += _row(bar, 38 + _ROW * row)
    parts += _legend()
    return "\n".join([*parts, "</svg>", ""])


def _x(delay: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - 24) * sqrt(min(delay, _LIMIT) / _LIMIT)


def _row(bar: Bar, y: int) -> list[str]:
    parts = [f'<text x="{_LEFT - 14}" y="{y + 4}" text-anchor="end">{bar.name}</text>']
    if isfinite(bar.hold):
        late = bar.hold_late if isfinite(bar.hold_late) else _LIMIT
        parts.append(
            f'<line x1="{_x(bar.hold):.1f}" x2="{_x(late):.1f}" y1="{y}" y2="{y}" stroke="#cd2b31" '
            'stroke-opacity=".35" stroke-width="4"/>'
        )
        parts.append(f'<circle cx="{_x(bar.hold):.1f}" cy="{y}" r="5" fill="#cd2b31"/>')
    if isfinite(bar.alarm):
        parts.append(f'<circle cx="{_x(bar.alarm):.1f}" cy="{y}" r="3.2" fill="#f59f00" stroke="#fff"/>')
    if isfinite(bar.bound):
        x = _x(bar.bound)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 9}" y2="{y + 9}" stroke="#3451b2" stroke-width="2"/>'
        )
    if isfinite(bar.goal):
        x = _x(bar.goal)
        parts.append(f'<path d="M{x - 4:.1f} {y - 11} h8 l-4 6 z" fill="#8b8d98"/>')
    return parts


def _legend() -> list[str]:
    items = (
        ("#f59f00", "alarm, median"),
        ("#cd2b31", "hold, median to 95 %"),
        ("#3451b2", "optimal CUSUM"),
        ("#8b8d98", "goal"),
    )
    parts, x = [], _LEFT
    for colour, text in items:
        parts.append(f'<rect x="{x}" y="8" width="10" height="10" rx="2" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="17" fill="#60646c">{text}</text>')
        x += 28 + 6 * len(text)
    return parts
