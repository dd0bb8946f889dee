"""`stepguard status`: how the run is, and what a person should do about it."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from stepguardd.cli.output import console, fail, print_json, say
from stepguardd.cli.runs import AsJson, ConfigFile, RunDir, daemon_of
from stepguardd.cli.status_view import is_well, view

if TYPE_CHECKING:
    from stepguardd.control.client import ControlClient


def status(
    *,
    run_dir: RunDir = None,
    config: ConfigFile = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep looking, until Ctrl-C.")] = False,
    every_s: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, max=3600, help="How often, with --watch.")
    ] = 1.0,
    json: AsJson = False,
) -> None:
    """How the run is, and what to do. Exit code 1 when it is held, or something in it is dead."""
    with daemon_of(config, run_dir) as daemon:
        if watch:
            _watch(daemon, every_s, as_json=json)
            return
        now = daemon.status()
    if json:
        print_json(now)
    else:
        console(as_json=False).print(view(now))
    if not is_well(now):
        raise typer.Exit(1)


def _watch(daemon: "ControlClient", every_s: float, *, as_json: bool) -> None:
    """Show the status again and again; a daemon that is away for a while is waited for."""
    if as_json:
        _watch_json(daemon, every_s)
        return
    from rich.live import Live  # noqa: PLC0415 - only this view needs it
    from rich.text import Text  # noqa: PLC0415

    screen = console(as_json=False)
    if not screen.is_terminal:
        fail("--watch draws on a terminal; for a program there is --watch --json")
    with Live(console=screen, auto_refresh=False, screen=False, transient=False) as live:
        while True:
            error = None
            try:
                shown = view(daemon.status())
            except _away() as away:
                error = away
            live.update(
                Text(f"no daemon: {error}; waiting for it", style="red") if error else shown, refresh=True
            )
            time.sleep(every_s)


def _watch_json(daemon: "ControlClient", every_s: float) -> None:
    while True:
        try:
            print_json(daemon.status())
        except _away() as error:
            say(f"no daemon: {error}; waiting for it")
        time.sleep(every_s)


def _away() -> tuple[type[Exception], ...]:
    from stepguardd.control.client import ControlError, NoDaemonError  # noqa: PLC0415 - with httpx, late

    return NoDaemonError, ControlError
