"""`stepguard completion`: the script with which a shell completes commands and options."""

import os
from pathlib import Path
from typing import Annotated

import typer
from typer.completion import get_completion_script  # type: ignore[attr-defined]
from typer.completion import install as install_script  # type: ignore[attr-defined]

from stepguardd.cli import COMPLETE
from stepguardd.cli.output import fail, print_json
from stepguardd.cli.runs import AsJson

SHELLS = ("bash", "zsh", "fish")


def completion(
    shell: Annotated[
        str | None, typer.Argument(metavar="SHELL", help=f"{', '.join(SHELLS)}. By default yours.")
    ] = None,
    *,
    install: Annotated[bool, typer.Option("--install", help="Put it where your shell finds it.")] = False,
    json: AsJson = False,
) -> None:
    """
    Print the completion script of a shell, or put it where the shell finds it.

    For this session alone: eval "$(stepguard completion bash)".
    """
    name = shell if shell is not None else Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        said = name or "none"
        fail(f"the shell {said} is not known: use one of {', '.join(SHELLS)}")
    wanted = {"prog_name": "stepguard", "complete_var": COMPLETE, "shell": name}
    if not install:
        script = get_completion_script(**wanted)
        if json:
            print_json({"shell": name, "script": script})
        else:
            typer.echo(script)
        return
    try:
        _, path = install_script(**wanted)
    except OSError as error:
        fail(f"{error.filename}: cannot be written: {error.strerror}")
    if json:
        print_json({"shell": name, "path": str(path)})
    else:
        typer.echo(f"wrote {path}: open a new terminal to use it")
