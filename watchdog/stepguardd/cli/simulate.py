"""`stepguard simulate`: days of a run in minutes, with faults drawn from a seed, decided by the real core."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from stepguardd.cli.output import console, fail, print_json
from stepguardd.cli.runs import AsJson
from stepguardd.core.state import Settings
from stepguardd.testing.simulation import Day, Struck
from stepguardd.testing.simulation import simulate as play
from stepguardd.testing.strikes import STORIES, SimFault

if TYPE_CHECKING:
    from rich.table import Table

ENOUGH = 30
"""Seeds from which a word on their rate is worth saying."""


def simulate(
    *,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Decide with this run's figures."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The first seed: the same one gives the same day.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs, each with a seed of its own.")] = 5,
    hours: Annotated[float, typer.Option(min=0.01, help="How long each run is, on its own clock.")] = 12.0,
    fault: Annotated[
        list[SimFault] | None, typer.Option(metavar="FAULT", help="Only these (--list); may be repeated.")
    ] = None,
    healthy: Annotated[bool, typer.Option("--healthy", help="No fault at all: is anything held?")] = False,
    list_faults: Annotated[bool, typer.Option("--list", help="Name the faults, and do nothing.")] = False,
    json: AsJson = False,
) -> None:
    """
    Play whole days of a run against the decisions: servers, a trainer and faults are simulated.

    The seed draws the run and its faults. Exit code 1 if anything came out that never may: a healthy run
    held, a step on garbage that could be known, a run that stays stuck, a broken promise.
    """
    if list_faults:
        if json:
            print_json({"faults": [{"name": one.value, "what": STORIES[one]} for one in SimFault]})
        else:
            for one in SimFault:
                typer.echo(f"{one.value:10} {STORIES[one]}")
        return
    if healthy and fault:
        fail("--healthy and --fault exclude each other")
    settings = _settings(config)
    faults = () if healthy else tuple(fault or SimFault)
    days = []
    with console(as_json=True).status("") as status:
        for number in range(seeds):
            status.update(f"seed {seed + number}, {number} of {seeds} played")
            day = play(seed + number, hours, settings=settings, faults=faults)
            days.append(day)
            if json:
                print_json(asdict(day))
    if not json:
        _show(days)
    if any(day.wrong for day in days):
        raise typer.Exit(1)


def _settings(config: Path | None) -> Settings:
    if config is None:
        return Settings()
    from stepguardd.config import ConfigError, load_config  # noqa: PLC0415 - without a config no pydantic
    from stepguardd.settings import core_settings  # noqa: PLC0415

    try:
        return core_settings(load_config(config))
    except ConfigError as error:
        fail(str(error))


def _show(days: list[Day]) -> None:
    struck = [one for day in days for one in day.struck]
    screen = console(as_json=False)
    if struck:
        screen.print(_table(struck))
        screen.print()
    hours = sum(day.hours for day in days)
    steps, refused = sum(day.steps for day in days), sum(day.refused for day in days)
    wrong = [what for day in days for what in day.wrong]
    lines = [
        f"{hours:,.0f} hours of {len(days)} runs: {steps:,} steps, {refused:,} batches refused, "
        f"{len(struck):,} faults"
    ]
    if wrong:
        lines.append(f"{len(wrong)} times something came out that never may:")
        lines += [f"  {what}" for what in wrong[:10]]
    else:
        lines.append("No healthy run was held, none stayed stuck, no step was taken on known garbage.")
        if len(days) >= ENOUGH:
            # The rule of three.
            share = 3.0 / len(days)
            lines.append(
                f"{len(days)} seeds without one: of such runs fewer than {share:.1%} have one (95 % sure)"
            )
    for line in lines:
        screen.print(line, markup=False)


def _table(struck: list[Struck]) -> "Table":
    from rich.table import Table  # noqa: PLC0415 - only a drawing command pays for it

    table = Table(box=None, pad_edge=False)
    for head in ("seconds: median / worst", "times", "held", "going on", "called", "garbage"):
        table.add_column(head, justify="left" if not table.columns else "right", no_wrap=True)
    for fault in SimFault:
        _row(table, STORIES[fault], [one for one in struck if one.alone and one.fault is fault])
    _row(table, "several at once", [one for one in struck if not one.alone])
    return table


def _row(table: "Table", name: str, struck: list[Struck]) -> None:
    if not struck:
        return
    table.add_row(
        name,
        str(len(struck)),
        _times(one.held_s for one in struck),
        _times(one.going_s for one in struck),
        str(sum(one.called for one in struck) or "–"),
        str(sum(one.garbage_steps for one in struck) or "–"),
    )


def _times(values: Iterable[float | None]) -> str:
    """The median and the worst, in seconds."""
    known = [value for value in values if value is not None]
    return f"{median(known):.0f} / {max(known):.0f}" if known else "–"
