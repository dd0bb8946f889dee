"""`stepguard ack`: a person knows of an incident, and what they mean to do."""

from typing import Annotated

import typer

from stepguardd.cli.output import fail
from stepguardd.cli.runs import AsJson, ConfigFile, RunDir
from stepguardd.cli.wishes import tell


def ack(
    incident: Annotated[
        int | None,
        typer.Argument(
            metavar="INCIDENT", min=1, help="Its number. By default the open one.", show_default=False
        ),
    ] = None,
    *,
    why: Annotated[
        str, typer.Option("--why", metavar="TEXT", help="What you know or mean to do; people will read it.")
    ] = "",
    run_dir: RunDir = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """
    Say that you have an incident in hand: it is not repeated to people any more.

    Your name is the one that the kernel vouches for. Nothing else changes: what is held stays held.
    """
    if not why.strip():
        fail("--why is missing: say what you know or mean to do, for whoever looks next")
    tell(
        "ack",
        config=config,
        run_dir=run_dir,
        why=why,
        as_json=json,
        done="Noted: this incident is yours, and is not repeated to others.",
        args={"incident": None if incident is None else str(incident)},
    )
