"""
The process that draws: one JSON request on stdin, a PNG on stdout.

Niced and capped in memory before it imports anything large. It opens the journal for reading alone.
"""

import contextlib
import io
import json
import math
import os
import resource
import sqlite3
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY_BYTES = 2 << 30
EVENTS_MAX = 6000
STEPS_MAX = 600

_INK, _QUIET, _GRID = "#1c2024", "#60646c", "#e0e1e6"
_LINE, _BAD = "#3451b2", "#c62a2f"


@dataclass(slots=True)
class Curve:
    """Rewards of optimizer steps that were taken, and of batches that were refused. By (attempt, step)."""

    taken: list[tuple[int, float]] = field(default_factory=list)
    refused: list[tuple[int, float]] = field(default_factory=list)
    held_from: float | None = None
    held_until: float | None = None


def main() -> None:
    """Draw what is asked for."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = json.load(sys.stdin)
    os.environ["MPLBACKEND"] = "Agg"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if request["cache"] is not None:
        os.environ["MPLCONFIGDIR"] = request["cache"]
    curve = _example() if request["journal"] is None else read(Path(request["journal"]), request)
    if not curve.taken and not curve.refused:
        raise SystemExit("the journal has no rewards yet")
    sys.stdout.buffer.write(picture(curve, str(request["title"]), request["onset_step"]))


def read(journal: Path, request: dict[str, Any]) -> Curve:
    """The newest rewards of a journal, and which of them were refused."""
    with contextlib.closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True, timeout=5.0)) as db:
        rows = db.execute(
            "SELECT kind, body, commands FROM events WHERE kind IN ('StepCommitted', 'BatchReported', "
            "'RewardLogged') ORDER BY seq DESC LIMIT ?",
            (EVENTS_MAX,),
        ).fetchall()
    curve = Curve()
    taken: dict[int, float] = {}
    refused: dict[int, float] = {}
    for kind, body, commands in reversed(rows):
        event = json.loads(body)
        step, value = event.get("step"), event.get("reward")
        if not isinstance(step, int) or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        if kind == "BatchReported":
            if any(name == "Notify" and one.get("what") == "refused" for name, one in json.loads(commands)):
                refused[step] = float(value)
        else:
            taken[step] = float(value)
    curve.taken = sorted(taken.items())[-STEPS_MAX:]
    first = curve.taken[0][0] if curve.taken else 0
    curve.refused = [point for point in sorted(refused.items()) if point[0] >= first]
    if request["onset_step"] is not None:
        curve.held_from = float(request["onset_step"])
        later = [step for step, _ in curve.taken if step >= request["onset_step"]]
        curve.held_until = float(later[0]) if later else None
    return curve


def picture(curve: Curve, title: str, onset_step: int | None) -> bytes:
    """The curve, quiet and legible at the width of a phone."""
    import matplotlib as mpl  # noqa: PLC0415 - after the limits are set
    from matplotlib.figure import Figure  # noqa: PLC0415

    mpl.rcParams["font.family"] = "DejaVu Sans"
    mpl.rcParams["text.parse_math"] = False  # a run's name is text
    figure = Figure(figsize=(7.3, 3.1), dpi=160, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_QUIET, labelsize=9, length=0, pad=6)
    steps, values = [step for step, _ in curve.taken], [value for _, value in curve.taken]
    axes.plot(steps, values, color=_LINE, linewidth=1.7, solid_joinstyle="round")
    _limits(axes, [*values, *(value for _, value in curve.refused)])
    if onset_step is not None:
        axes.axvline(onset_step, color=_BAD, linewidth=1.2, linestyle=(0, (4, 3)))
        low, high = axes.get_xlim()
        right = onset_step > low + 0.72 * (high - low)
        axes.annotate(
            f"held at step {onset_step}",
            (onset_step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if right else 6, -4),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            fontsize=9.5,
            color=_BAD,
        )
    if curve.refused:
        axes.plot(
            [step for step, _ in curve.refused],
            [value for _, value in curve.refused],
            linestyle="none",
            marker="x",
            markersize=7,
            markeredgewidth=1.8,
            color=_BAD,
            label="batch refused, no step taken",
        )
        axes.legend(loc="lower left", fontsize=9, frameon=False, labelcolor=_QUIET, handletextpad=0.3)
    axes.set_title(title, loc="left", fontsize=11.5, color=_INK, pad=10)
    axes.set_xlabel("optimizer step", fontsize=9.5, color=_QUIET)
    axes.set_ylabel("reward", fontsize=9.5, color=_QUIET)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _limits(axes: Any, values: list[float]) -> None:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low >= 0.0 and high <= 1.0:
        low, high = 0.0, 1.0
    margin = 0.06 * ((high - low) or 1.0)
    axes.set_ylim(low - margin, high + margin)


def _example() -> Curve:
    """A run that rises, for `stepguard alert-test`."""
    curve = Curve()
    for step in range(120):
        noise = 0.04 * math.sin(step * 1.7) + 0.03 * math.sin(step * 0.61)
        curve.taken.append((step, 0.75 / (1 + math.exp(-(step - 45) / 14)) + 0.08 + noise))
    return curve


if __name__ == "__main__":
    main()
