"""
A curve of any length, drawn with few points: the least and the greatest value of each stretch are kept.

A pyramid over the points answers any window in time that grows with the points asked for, not with those
there are: the decision loop may draw while it watches. Pure.
"""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

FAN_OUT: Final = 4
POINTS_MAX: Final = 262_144
LINES_MAX: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The reward of one step. `wall` is seconds since 1970; a reward of None is unknown."""

    attempt: int
    step: int
    wall: float
    reward: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A stretch of one line, ready to be drawn; a value of None is a gap."""

    attempt: int
    steps: list[int]
    walls: list[float]
    values: list[float | None]


class Line:
    """One attempt's points, with rising steps."""

    __slots__ = ("_levels", "_steps", "_values", "_walls", "attempt")

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self._steps = array("q")
        self._walls = array("d")
        self._values = array("d")  # NaN where no finite value is known: a gap either way
        # For each level, the indices of the least and the greatest value in stretches of FAN_OUT ** level.
        self._levels: list[tuple[array[int], array[int]]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def takes(self, point: Point) -> bool:
        """Whether the point goes on where this line ends."""
        return point.attempt == self.attempt and (not self._steps or point.step > self._steps[-1])

    def append(self, step: int, wall: float, value: float | None) -> None:
        """Add a point after all others."""
        self._steps.append(step)
        self._walls.append(wall)
        self._values.append(value if value is not None and math.isfinite(value) else math.nan)
        count, size, level = len(self._steps), FAN_OUT, 0
        while count % size == 0:
            if level == len(self._levels):
                self._levels.append((array("L"), array("L")))
            if level == 0:
                below: Iterable[int] = range(count - FAN_OUT, count)
            else:
                lows, highs = self._levels[level - 1]
                below = (*lows[-FAN_OUT:], *highs[-FAN_OUT:])
            low, high = self._extremes(below)
            self._levels[level][0].append(low)
            self._levels[level][1].append(high)
            size, level = size * FAN_OUT, level + 1

    def draw(self, from_step: int | None, to_step: int | None, points: int) -> Drawn:
        """
        The window's points, at most about so many, with every peak and trough among them.

        The point before the window and the one after are there as well, so that a line runs to the edges.
        """
        steps = self._steps
        first = 0 if from_step is None else max(0, bisect_left(steps, from_step) - 1)
        last = len(steps) if to_step is None else min(len(steps), bisect_right(steps, to_step) + 1)
        chosen = self._chosen(first, last, points)
        return Drawn(
            attempt=self.attempt,
            steps=[steps[i] for i in chosen],
            walls=[round(self._walls[i], 3) for i in chosen],
            values=[None if math.isnan(self._values[i]) else self._values[i] for i in chosen],
        )

    def thinned(self) -> "Line":
        """Half the points, with the extremes kept."""
        thin = Line(self.attempt)
        for i in self._chosen(0, len(self), len(self) // 2):
            thin.append(self._steps[i], self._walls[i], self._values[i])
        return thin

    def _chosen(self, first: int, last: int, points: int) -> list[int]:
        if last - first <= points:
            return list(range(first, last))
        size, level = FAN_OUT, 0
        while 2 * (last - first) > points * size and level + 1 < len(self._levels):
            size, level = size * FAN_OUT, level + 1
        begin, end = -(-first // size), last // size
        chosen = {first, last - 1}
        if begin >= end:
            chosen.update(self._extremes(range(first, last)))
            return sorted(chosen)
        for ragged in (range(first, begin * size), range(end * size, last)):
            if ragged:
                chosen.update(self._extremes(ragged))
        lows, highs = self._levels[level]
        chosen.update(lows[begin:end])
        chosen.update(highs[begin:end])
        return sorted(chosen)

    def _extremes(self, indices: Iterable[int]) -> tuple[int, int]:
        """Where the least and the greatest known value are; the first index twice where none is known."""
        values = self._values
        low = high = -1
        first = -1
        for i in indices:
            if first < 0:
                first = i
            value = values[i]
            if value != value:  # noqa: PLR0124 - NaN
                continue
            if low < 0 or value < values[low]:
                low = i
            if high < 0 or value > values[high]:
                high = i
        return (first, first) if low < 0 else (low, high)


class Curve:
    """
    The reward over the life of a run: one line for each attempt, the newest last.

    Bounded: the oldest attempts get coarser first, and are forgotten last.
    """

    def __init__(self, points_max: int = POINTS_MAX) -> None:
        self._points_max = points_max
        self.lines: list[Line] = []
        self.points = 0  # ever taken in
        self._kept = 0

    def append(self, point: Point) -> None:
        """Take in the newest point."""
        if not self.lines or not self.lines[-1].takes(point):
            self.lines.append(Line(point.attempt))
        self.lines[-1].append(point.step, point.wall, point.reward)
        self.points += 1
        self._kept += 1
        if self._kept > self._points_max or len(self.lines) > LINES_MAX:
            self._shrink()

    def draw(self, from_step: int | None, to_step: int | None, points: int) -> list[Drawn]:
        """The window of every line; lines that have nothing in it are left out."""
        shown = max(1, len(self.lines))
        drawn = [line.draw(from_step, to_step, max(16, points // shown)) for line in self.lines]
        return [
            one
            for one in drawn
            if one.steps
            and (from_step is None or one.steps[-1] >= from_step)
            and (to_step is None or one.steps[0] <= to_step)
        ]

    def _shrink(self) -> None:
        if len(self.lines) > LINES_MAX:
            del self.lines[0]
        else:
            at = max(range(len(self.lines)), key=lambda i: len(self.lines[i]))
            self.lines[at] = self.lines[at].thinned()
        self._kept = sum(map(len, self.lines))
