"""`stepguard tune`: settings for the reward tests out of runs that were healthy."""

from pathlib import Path
from typing import Annotated

import typer

from stepguardd.cli.output import fail, print_json, say
from stepguardd.cli.replay import settings
from stepguardd.history import HistoryError, read_history
from stepguardd.tune import Proposal, propose


def tune(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="Recorded runs that you call healthy.")
    ],
    *,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The configuration to start from.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="KEY", help="The reward's name. By default found.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, and nothing else.")] = False,
) -> None:
    """Propose thresholds, and say what false alarms to expect. Exit code 1 when a run is not healthy."""
    start, named = settings(config, metric)
    try:
        histories = [read_history(path, metric=named) for path in files]
    except HistoryError as wrong:
        fail(str(wrong))
    found = propose(start, histories)
    if json:
        print_json(_as_json(found, files))
    else:
        _show(found, len(files))
    for source, step, reason in found.still:
        say(f"{source}: held at step {step} ({reason.value}) under any budget: is this run healthy?")
    if found.still:
        raise typer.Exit(1)


def _keys(found: Proposal) -> dict[str, object]:
    config = found.config
    keys: dict[str, object] = {
        "rollouts_per_step": found.rollouts,
        "false_alarm_steps": round(config.false_alarm_steps),
        "warning_alarm_steps": round(config.warning_alarm_steps),
        "zero_streak_warn": config.zero_streak_warn,
        "zero_streak_hold": config.zero_streak_hold,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _as_json(found: Proposal, files: list[Path]) -> dict[str, object]:
    return {
        "sources": files,
        "steps": found.steps,
        "reward": _keys(found),
        "holds": found.holds,
        "warnings": found.warnings,
        "expected_false_holds_per_million_steps": found.holds_per_million,
        "expected_false_warnings_per_million_steps": found.warnings_per_million,
        "bound_95_holds_per_million_steps": found.holds_bound,
        "bound_95_warnings_per_million_steps": found.warnings_bound,
    }


def _show(found: Proposal, files: int) -> None:
    say(f"{files} run{'' if files == 1 else 's'}, {found.steps} steps called healthy")
    typer.echo("[reward]")
    for key, value in _keys(found).items():
        typer.echo(f"{key} = {value}")
    typer.echo(f"# On these runs: {found.holds} false holds, {found.warnings} warnings.")
    typer.echo("# Expected in a million healthy steps, and what these runs alone can prove:")
    typer.echo(f"#   false holds    {found.holds_per_million:.3g}, at most {found.holds_bound:.3g}")
    typer.echo(f"#   false warnings {found.warnings_per_million:.3g}, at most {found.warnings_bound:.3g}")
