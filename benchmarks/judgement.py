"""
The judgement's speed: steps a second of `replay`, reading the file included, beside reading the file alone.

Anchors of the same run: the CSV module's own pass over the file, and a fixed streak of ten zeros.
"""

from __future__ import annotations

import csv
import random
import tempfile
import time
from pathlib import Path

from stepguardd.core.reward import RewardConfig
from stepguardd.history import read_history
from stepguardd.replay import replay

_STEPS = 100_000
_GOAL = 100_000


def main() -> None:
    """Measure on three kinds of curves and print steps a second."""
    rng = random.Random(3)
    curves = {
        "shares of 32": lambda: sum(rng.random() < 0.7 for _ in range(32)) / 32,
        "shaped": lambda: rng.gauss(0.3, 0.1),
        "sparse (2 %)": lambda: sum(rng.random() < 0.02 for _ in range(32)) / 32,
    }
    print(f"{'curve':16}{'read':>12}{'streak of 10':>14}{'replay':>12}   steps/s (goal for replay {_GOAL:,})")
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in curves.items():
            path = Path(folder) / "curve.csv"
            rows = (f"{step},{draw():.6g}" for step in range(_STEPS))
            path.write_text("step,reward\n" + "\n".join(rows) + "\n")
            figures = [_rate(how, path) for how in (_read, _streak, _replay)]
            print(f"{name:16}{figures[0]:12,.0f}{figures[1]:14,.0f}{figures[2]:12,.0f}")


def _rate(how: object, path: Path) -> float:
    assert callable(how)
    begin = time.perf_counter()
    how(path)
    return _STEPS / (time.perf_counter() - begin)


def _read(path: Path) -> None:
    with path.open(newline="") as file:
        for cells in csv.reader(file):
            assert cells


def _streak(path: Path) -> None:
    zeros = 0
    with path.open(newline="") as file:
        for cells in csv.reader(file):
            zeros = zeros + 1 if cells[1] == "0" else 0
            assert zeros < _STEPS


def _replay(path: Path) -> None:
    result = replay(RewardConfig(), read_history(path))
    assert len(result.history.steps) == _STEPS


if __name__ == "__main__":
    main()
