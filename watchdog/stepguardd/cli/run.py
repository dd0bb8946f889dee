"""`stepguard run`: the daemon itself, in the foreground."""

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer

from stepguardd.cli.output import fail, print_json, say
from stepguardd.config import ConfigError, load_config
from stepguardd.config.loading import parse_assignments
from stepguardd.control.server import ControlSocketError
from stepguardd.daemon import Daemon, DaemonError
from stepguardd.urgency import urgent


def run(
    config: Annotated[
        Path | None, typer.Option("--config", help="The config file; without one, defaults and environment.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting, over file and environment; repeatable."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also log what is only of interest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object once it is ready.")] = False,
) -> None:
    """
    Watch a training run, and protect it.

    It runs until SIGTERM or Ctrl-C. Servers with backend "process" outlive it unless run.servers_on_stop
    says "stop".
    """
    # Others' words from a warning on: what a library says below that may be an address with its secret.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("stepguardd").setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        settings = load_config(config, parse_assignments(assignments or []))
    except ConfigError as error:
        fail(str(error))
    daemon = Daemon(settings)

    def ready() -> None:
        where = settings.run.run_dir
        say(f"watching run {settings.run.name} (mode {settings.run.mode}); STEPGUARD_RUN_DIR={where}")
        if as_json:
            print_json({"ready": True, "run": settings.run.name, "run_dir": str(where)})

    if not urgent():
        logging.getLogger("stepguardd").debug("no leave for a real-time priority: a busy core delays a hold")
    try:
        asyncio.run(daemon.run(ready=ready))
    except (DaemonError, ControlSocketError) as error:
        fail(str(error))
    except ExceptionGroup as group:
        refused = group.subgroup((DaemonError, ControlSocketError))
        if refused is None:
            raise
        fail(str(refused.exceptions[0]))
