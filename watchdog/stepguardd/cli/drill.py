"""`stepguard drill`: a real fault in a staging run, and a scorecard of what Stepguard made of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepguardd.cli.output import bad_news, fail, print_json, say
from stepguardd.cli.runs import AsJson
from stepguardd.drill import STORIES, Drill, DrillError, DrillFault, Scorecard, rehearse

if TYPE_CHECKING:
    from stepguardd.config import Config


def drill(
    *,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The staging run's configuration.")
    ] = None,
    fault: Annotated[DrillFault, typer.Option(help="What is done to the server.")] = DrillFault.KILL,
    server: Annotated[
        str | None, typer.Option("--server", metavar="NAME", help="Which; by default the first.")
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", min=1, help="How long it may take until all is over.")
    ] = 1800,
    list_faults: Annotated[bool, typer.Option("--list", help="Name the faults, and do nothing.")] = False,
    json: AsJson = False,
) -> None:
    """
    Strike a server of a staging run, and measure what Stepguard makes of it.

    Refuses unless the run's configuration says run.drills = true. Exit code 0: detected, held and recovered
    without a step on garbage; 1: not.
    """
    if list_faults:
        if json:
            print_json({"faults": [{"name": one.value, "what": STORIES[one]} for one in DrillFault]})
        else:
            for one in DrillFault:
                typer.echo(f"{one.value:12} {STORIES[one]}")
        return
    settings = _settings(config)
    if not settings.run.drills:
        fail("this run is not for drills; a staging run says so in its configuration: run.drills = true")
    if settings.run.mode == "shadow":
        fail("run.mode is shadow: nothing would hold the run; a drill needs hold or act")
    plan = Drill(
        run_dir=settings.run.run_dir,
        state_dir=settings.run.state_dir,
        fault=fault,
        server=server,
        timeout_s=timeout_s,
    )
    try:
        card = rehearse(plan, say)
    except DrillError as error:
        bad_news(str(error))
    if json:
        print_json(card.plain())
    else:
        typer.echo(_scorecard(card))
    if not card.passed:
        raise typer.Exit(1)


def _scorecard(card: Scorecard) -> str:
    lines = [
        f"Drill         {card.fault.value} of {card.server} ({card.role}, pid {card.pid})",
        f"Incident      {'none' if card.incident is None else f'{card.incident}: {card.cause}'}",
        f"Detected in   {_seconds(card.detect_s)}",
        f"Held for      {_seconds(card.hold_s)}",
        f"Recovered in  {_seconds(card.recover_s)}",
        f"Restarts      {_count(card.restarts)}",
        f"Garbage steps {_count(card.garbage_steps)}",
        f"Result        {'passed' if card.passed else f'not passed: {card.why}'}",
    ]
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f} s"


def _count(value: int | None) -> str:
    return "not known" if value is None else str(value)


def _settings(config: Path | None) -> "Config":
    from stepguardd.config import ConfigError, load_config  # noqa: PLC0415 - --list needs no pydantic

    try:
        return load_config(config)
    except ConfigError as error:
        fail(str(error))
