"""
The frameworks' own source text, parsed; or run, in a Python of its own.

Each framework needs GPUs or a hundred packages to be imported. `tools/frameworks/get.sh` puts releases of
them (from PyPI), or a checkout where there is no release, into `.frameworks/`; what is missing there is
skipped with its reason, or fails where STEPGUARD_REQUIRE names it.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from requirements import require

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".frameworks"


class Source:
    """One file of a framework."""

    def __init__(self, framework: str, path: str) -> None:
        self.where = f"{framework} {version(framework)}: {path}"
        self.text = (HOME / framework / path).read_text()
        self.tree = ast.parse(self.text)

    def function(self, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
        """A function by its name, a method as `Class.method`."""
        scope: ast.AST = self.tree
        *classes, last = name.split(".")
        for owner in classes:
            scope = next(
                (node for node in ast.walk(scope) if isinstance(node, ast.ClassDef) and node.name == owner),
                ast.Module([], []),
            )
        for node in ast.walk(scope):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == last:
                return node
        raise AssertionError(f"{self.where} has no {name}")

    def parameters(self, name: str) -> list[str]:
        """The names of its parameters."""
        arguments = self.function(name).args
        return [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]

    def calls(self, within: str | None = None) -> list[str]:
        """What is called, in the order of the text, as dotted names with the names of the arguments."""
        scope = self.tree if within is None else self.function(within)
        return [ast.unparse(node) for node in _in_order(scope) if isinstance(node, ast.Call)]


def source(framework: str, path: str) -> Source:
    """A file of a framework, or a skip."""
    _required(framework)
    assert (HOME / framework / path).is_file(), f"{framework} {version(framework)} has no {path}"
    return Source(framework, path)


def run_with(framework: str, *arguments: str, timeout_s: float, **environment: str) -> Any:
    """What a Python with the framework importable beside ours prints last, as JSON; or a skip."""
    _required(framework)
    ours = [ROOT / part for part in ("trainer", "watchdog", "tests")]
    path = os.pathsep.join(map(str, [*ours, HOME / framework, HOME / "needs"]))
    ended = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def _required(framework: str) -> None:
    if not (HOME / framework).is_dir():
        require(
            f"frameworks-{framework}", f"no source of {framework} in .frameworks: tools/frameworks/get.sh"
        )


@cache
def version(framework: str) -> str:
    """The version or commit that lies there."""
    return (HOME / framework / "VERSION").read_text().strip()


def _in_order(scope: ast.AST) -> Iterator[ast.AST]:
    nodes = [node for node in ast.walk(scope) if hasattr(node, "lineno")]
    yield from sorted(nodes, key=lambda node: (node.lineno, node.col_offset))
