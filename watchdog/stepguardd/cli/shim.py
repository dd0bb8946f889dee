"""`stepguard shim`: what brings W&B's rows to the daemon at once, without a change to the code."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

import stepguard

from .output import fail, print_json, say
from .runs import AsJson

FILE_VARIABLE = "STEPGUARD_SHIM_FILE"


def shim(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Where the rows go, one JSON object a line; a local disk.")
    ],
    *,
    json: AsJson = False,
) -> None:
    """
    Print what the trainer's environment needs for W&B's rows to be read at once.

    Up to W&B 0.30 the local log is written 32 KiB at a time, and on every version a row logged with step= is
    kept back until the next one.
    For this shell: eval "$(stepguard shim rows.jsonl)".
    """
    folder = Path(stepguard.__file__).parent / "shim"
    path = file.absolute()
    if not path.parent.is_dir():
        fail(f"FILE: the folder {path.parent} is not there; make it first")
    if json:
        print_json({"python_path": str(folder), "variables": {FILE_VARIABLE: str(path)}})
        return
    typer.echo(f'export PYTHONPATH={shlex.quote(str(folder))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    typer.echo(f"export {FILE_VARIABLE}={shlex.quote(str(path))}")
    say(f'in config.toml: [stream] jsonl = "{path}"')
