"""`stepguard rollback`: take the trainer back to a good checkpoint from before the trouble."""

from typing import Annotated

import typer

from stepguardd.cli.runs import AsJson, ConfigFile, RunDir, Why, Yes, confirm
from stepguardd.cli.wishes import tell


def rollback(
    *,
    before_step: Annotated[
        int | None,
        typer.Option(
            metavar="STEP",
            min=0,
            help="Go back to before this step. Without it: before the incident's onset.",
        ),
    ] = None,
    run_dir: RunDir = None,
    config: ConfigFile = None,
    why: Why = "",
    yes: Yes = False,
    json: AsJson = False,
) -> None:
    """Take the trainer back to the newest good checkpoint from before the trouble."""
    target = "the incident's onset" if before_step is None else f"step {before_step}"
    confirm(f"Roll the trainer back to before {target}? Later steps are set aside.", yes=yes)
    done = f"Rolling back to before {target}. Watch: stepguard status --watch"
    tell(
        "rollback",
        config=config,
        run_dir=run_dir,
        why=why,
        as_json=json,
        done=done,
        args={"before_step": before_step},
    )
