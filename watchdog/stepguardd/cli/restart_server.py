"""`stepguard restart-server`: hold the run, restart an inference server, and give it the current weights."""

from typing import Annotated

import typer

from stepguardd.cli.runs import AsJson, ConfigFile, RunDir, Why, Yes, confirm
from stepguardd.cli.wishes import tell


def restart_server(
    name: Annotated[
        str | None, typer.Argument(help="The server; may be left out where there is one.")
    ] = None,
    *,
    run_dir: RunDir = None,
    config: ConfigFile = None,
    why: Why = "",
    yes: Yes = False,
    json: AsJson = False,
) -> None:
    """Restart an inference server, with the run held meanwhile, and give it the current weights."""
    server = f"server {name!r}" if name else "the server"
    confirm(f"Stop and start {server}? Its running requests are lost; the run is held meanwhile.", yes=yes)
    done = f"Restarting {server}. Watch: stepguard status --watch"
    tell(
        "restart-server",
        config=config,
        run_dir=run_dir,
        why=why,
        as_json=json,
        done=done,
        args={"server": name},
    )
