"""
What every command prints with, so that all of them fail, report and speak JSON alike.

stdout carries the answer; with `--json` it carries JSON and nothing else. Words about it go to stderr.
"""

import sys
from typing import TYPE_CHECKING, NoReturn

import typer

from stepguardd.jsontext import to_json
from stepguardd.oneline import one_line

if TYPE_CHECKING:
    from rich.console import Console


def fail(message: str) -> NoReturn:
    """Wrong use: one line on stderr that names the key or file at fault and the remedy, and exit code 2."""
    say(message)
    raise typer.Exit(2)


def bad_news(message: str) -> NoReturn:
    """The question was right and the answer is bad: one line on stderr and exit code 1."""
    say(message)
    raise typer.Exit(1)


def say(message: str) -> None:
    """One line on stderr."""
    print(f"stepguard: {one_line(message)}", file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """One JSON value as one line on stdout; what JSON has no word for (NaN, infinities) becomes null."""
    sys.stdout.write(to_json(value) + "\n")
    sys.stdout.flush()


def console(*, as_json: bool) -> "Console":
    """The terminal to draw on: stdout, or stderr where stdout belongs to JSON."""
    from rich.console import Console  # noqa: PLC0415 - 0.1 s that only a drawing command pays

    return Console(stderr=as_json, highlight=False)
