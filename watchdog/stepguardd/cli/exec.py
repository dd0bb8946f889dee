"""`stepguard exec`: a command with the daemon beside it, where there is no systemd."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from stepguardd.cli.output import fail, print_json, say
from stepguardd.config import Config, ConfigError, load_config
from stepguardd.config.loading import parse_assignments
from stepguardd.supervision import Supervised, SupervisionError, daemon_command, supervise

# Options end at the first word of the command, whose own options are its own.
CONTEXT = {"allow_interspersed_args": False}


def exec(  # noqa: A001 - a command's function is named like the command
    command: Annotated[list[str], typer.Argument(metavar="CMD", help="The trainer's command.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The run's configuration.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting, over file and environment; repeatable."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Begin once every server generates.")] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", min=1, help="How long --wait waits before it gives up.")
    ] = 1800,
    daemon_log: Annotated[
        Path | None,
        typer.Option("--daemon-log", metavar="FILE", help="What the daemon says goes here, not to stderr."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the outcome as JSON; CMD's stdout goes to stderr.")
    ] = False,
) -> None:
    """
    Run a command with the daemon beside it, where there is no systemd.

    For containers and batch jobs: stepguard exec --config run.toml --wait -- python train.py

    The command finds the run by STEPGUARD_RUN_DIR. Signals go on to it, and its exit code is this command's
    (128 + n when signal n ended it). The daemon is started again whenever it dies, and finds its servers
    again; when the command has ended, so does everything that was started beside it.
    """
    settings = _settings(config, assignments or [])
    if shutil.which(command[0]) is None:
        fail(f"{command[0]}: not found, or not executable")
    if daemon_log is not None and not daemon_log.absolute().parent.is_dir():
        fail(f"--daemon-log: {daemon_log.parent} is no folder")
    which = [] if config is None else ["--config", str(config.absolute())]
    for assignment in assignments or []:
        which += ["--set", assignment]
    # A daemon that is told to end alone, for a newer version say, leaves its servers to the next one.
    daemon = ["run", *which, "--set", "run.servers_on_stop=keep"]
    before = ["wait", *which, "--timeout-s", str(timeout_s)] if wait else []
    plan = Supervised(
        command=tuple(command),
        daemon=daemon_command(daemon),
        before=daemon_command(before) if before else (),
        environment={"STEPGUARD_RUN_DIR": str(settings.run.run_dir)},
        daemon_log=None if daemon_log is None else str(daemon_log.absolute()),
        quiet_stdout=as_json,
        end_timeout_s=max((server.stop_timeout_s for server in settings.servers), default=10.0),
    )
    try:
        ended = supervise(plan, say)
    except SupervisionError as error:
        say(str(error))
        raise typer.Exit(error.code) from None
    if as_json:
        print_json({"exit_code": ended.code, "daemon_restarts": ended.daemon_restarts})
    raise typer.Exit(ended.code)


def _settings(config: Path | None, assignments: list[str]) -> Config:
    try:
        return load_config(config, parse_assignments(assignments))
    except ConfigError as error:
        fail(str(error))
