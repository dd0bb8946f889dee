"""`stepguard rollback`: take the trainer back to a good checkpoint from before the trouble, or undo that."""

from pathlib import Path
from typing import Annotated

import typer

from stepguardd.cli.output import fail, print_json, say
from stepguardd.cli.runs import AsJson, ConfigFile, RunDir, Why, Yes, by_whom, confirm
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
    undo: Annotated[
        Path | None,
        typer.Option(
            "--undo",
            metavar="DIR",
            help="Take the newest rollback of this checkpoint folder back; needs no daemon.",
        ),
    ] = None,
    run_dir: RunDir = None,
    config: ConfigFile = None,
    why: Why = "",
    yes: Yes = False,
    json: AsJson = False,
) -> None:
    """Take the trainer back to the newest good checkpoint from before the trouble."""
    if undo is not None:
        if before_step is not None:
            fail("give --before-step or --undo, not both")
        _undo(undo, why=why, yes=yes, as_json=json)
        return
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


def _undo(path: Path, *, why: str, yes: bool, as_json: bool) -> None:
    """The folder as it was before its newest rollback; a running trainer is not told."""
    from stepguardd.checkpoints import rollback as checkpoints  # noqa: PLC0415 - the other way needs none of it

    try:
        found = checkpoints.newest(path)
        steps = ", ".join(str(step) for step in found.from_steps) or "none"
        question = f"Take back {found.name}? Steps that come back: {steps}."
        confirm(question, yes=yes, because="this moves checkpoints")
        undone = checkpoints.undo(path, name=found.name, by=by_whom(why))
    except checkpoints.RollbackError as error:
        fail(str(error))
    if as_json:
        markers = [{"path": marker, "text": text} for marker, text in undone.markers]
        displaced = [{"was": was, "now": now} for was, now in undone.displaced]
        print_json({"undone": undone.name, "steps": undone.steps, "markers": markers, "displaced": displaced})
        return
    say(f"{undone.name} is taken back; steps that are there again: {steps}")
    for was, now in undone.displaced:
        say(f"{was} had been saved anew meanwhile; that one is now {now}")
