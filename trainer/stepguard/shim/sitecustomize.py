"""
A quicker way for W&B's rows to the daemon: `stepguard shim` has this folder put on PYTHONPATH.

Up to W&B 0.30 the local log is written 32 KiB at a time, and on every version a row logged with `step=` is
kept back until the next. Here each call of `wandb.Run.log` also appends one line of JSON to a file, at once.

Promise: the trainer runs as without it. W&B's own `log` is called in any case, with what it was given;
whatever fails in here is said once on stderr, and then nothing more is tried. A `sitecustomize` that the
environment has of its own runs as well. Standard library only, and none of Stepguard: the trainer's
environment need not have it.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False  # as in typing, which every Python process would have to import here

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import ModuleType
    from typing import Any

FILE_VARIABLE = "STEPGUARD_SHIM_FILE"
_MODULE = "wandb.sdk.wandb_run"
_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib costs each process 10 ms
_DEPTH_MAX = 4


class _Rows:
    """The file of rows: one write a row, at its end, so that ranks can share it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor: int | None = None
        self.broken = False

    def add(self, data: Mapping[str, Any], step: object) -> None:
        """Append every number of a row, and its step."""
        import json  # noqa: PLC0415 - in processes that log alone

        row = dict(_numbers(data, "", _DEPTH_MAX))
        if not row:
            return
        if isinstance(step, int):
            row["_step"] = step
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o644)
        os.write(self._descriptor, json.dumps(row).encode() + b"\n")

    def fail(self, error: Exception) -> None:
        """Say it, once."""
        self.broken = True
        said = f"stepguard shim: {type(error).__name__}: {error}; W&B goes on without it\n"
        from contextlib import suppress  # noqa: PLC0415 - once at most

        with suppress(OSError):
            os.write(2, said.encode(errors="replace"))


def _numbers(values: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            if depth:
                yield from _numbers(value, f"{prefix}{key}.", depth - 1)
        elif isinstance(value, (int, float)):
            yield f"{prefix}{key}", value
        elif hasattr(value, "item") and getattr(value, "size", None) == 1:
            yield f"{prefix}{key}", float(value)  # a number of numpy's
        # A tensor is left to W&B: to read it may mean to wait for a GPU.


def _wrapped(log: Callable[..., object], rows: _Rows) -> Callable[..., object]:
    from functools import wraps  # noqa: PLC0415 - in processes that import W&B alone

    @wraps(log)
    def logged(self: Any, data: Any = None, *more: Any, **named: Any) -> object:
        if not rows.broken:
            try:
                step = more[0] if more else named.get("step")
                rows.add(data, self.step if step is None else step)
            except Exception as error:  # noqa: BLE001 - the border of somebody else's training loop
                rows.fail(error)
        return log(self, data, *more, **named)

    return logged


class _Finder:
    """Wraps `Run.log` when W&B is imported, and is gone; a trainer without W&B never notices."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module as it would be found without us, with one thing to do after it ran."""
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run_module = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run_module(module)
            try:
                module.Run.log = _wrapped(module.Run.log, self._rows)
            except (AttributeError, TypeError) as error:
                self._rows.fail(error)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _run_the_next() -> None:
    """The environment's own `sitecustomize`, which ours hides."""
    from importlib.util import module_from_spec  # noqa: PLC0415 - beside what it is for

    others = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]  # noqa: PTH100
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


if os.environ.get(FILE_VARIABLE):
    sys.meta_path.insert(0, _Finder(_Rows(os.environ[FILE_VARIABLE])))
_run_the_next()
