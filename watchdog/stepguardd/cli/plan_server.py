"""`stepguard plan-server`: a server will be silent for a while, on purpose."""

from typing import Annotated

import typer

from stepguardd.cli.runs import AsJson, ConfigFile, RunDir, Why
from stepguardd.cli.wishes import tell


def plan_server(
    name: Annotated[
        str | None, typer.Argument(help="The server. By default all of them.", show_default=False)
    ] = None,
    *,
    for_s: Annotated[
        float,
        typer.Option(
            "--for", metavar="SECONDS", min=0, max=86_400, help="How long at most; 0 takes it back."
        ),
    ] = 600.0,
    run_dir: RunDir = None,
    config: ConfigFile = None,
    why: Why = "",
    json: AsJson = False,
) -> None:
    """
    Announce that a server will be silent for a while, on purpose: its silence holds nothing until then.

    A process that ends is still a death. To keep the trainer from its next step, use `stepguard pause`.
    """
    server = name or "every server"
    done = f"For {for_s:g} s the silence of {server} is on purpose. End it: stepguard plan-server --for 0"
    tell(
        "plan-server",
        config=config,
        run_dir=run_dir,
        why=why,
        as_json=json,
        done=done if for_s > 0 else f"{server} is expected to serve again.",
        args={"server": name, "for_s": for_s},
    )
