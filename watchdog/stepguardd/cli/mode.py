"""`stepguard mode`: how far the daemon may go by itself, read or set while it runs."""

from enum import StrEnum
from typing import Annotated

import typer

from stepguardd.cli.output import print_json
from stepguardd.cli.runs import AsJson, ConfigFile, RunDir, Why, daemon_of
from stepguardd.cli.wishes import tell


class Mode(StrEnum):
    """The modes, as people type them."""

    SHADOW = "shadow"
    HOLD = "hold"
    ACT = "act"


MEANS = {
    Mode.SHADOW: "it judges and tells, and holds nothing",
    Mode.HOLD: "it holds the run and tells people; it restarts and rolls back nothing",
    Mode.ACT: "it holds, restarts servers and rolls back by itself",
}


def mode(
    to: Annotated[
        Mode | None,
        typer.Argument(metavar="[shadow|hold|act]", help="The new mode. Without it: say which is in force."),
    ] = None,
    *,
    run_dir: RunDir = None,
    config: ConfigFile = None,
    why: Why = "",
    json: AsJson = False,
) -> None:
    """
    Set how far the daemon may go by itself, at once and without restarting it.

    It stays, over restarts of the daemon too, until somebody sets another or the config's own mode changes.
    """
    if to is not None:
        done = f"Mode {to}: {MEANS[to]}."
        tell(
            "mode", config=config, run_dir=run_dir, why=why, as_json=json, done=done, args={"mode": to.value}
        )
        return
    with daemon_of(config, run_dir) as daemon:
        now = str(daemon.status().get("mode"))
    if json:
        print_json({"mode": now})
    else:
        typer.echo(f"Mode {now}: {MEANS[Mode(now)]}." if now in MEANS else f"Mode {now}.")
