"""`stepguard install-service`: the systemd units, on this machine."""

import grp
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from stepguardd.cli.output import bad_news, fail, print_json
from stepguardd.service import USER, Installation, ServiceError, for_system, for_user

_COMMAND_TIMEOUT_S = 60.0


def install_service(
    *,
    user: Annotated[bool, typer.Option("--user", help="For your own systemd manager, without root.")] = False,
    run_as: Annotated[
        str, typer.Option("--run-as", metavar="NAME", help="The user that trains; the daemon runs as it.")
    ] = USER,
    writes: Annotated[
        list[Path] | None,
        typer.Option(
            "--writes", metavar="DIR", help="A checkpoints folder that a rollback may change; repeatable."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """
    Install the systemd units: the daemon's, examples for servers and trainers, pause and rollback.

    Nothing is started. Run it again after an upgrade or for another --run-as.
    """
    if user and (run_as != USER or writes):
        fail("--user takes neither --run-as nor --writes: it is your own manager, without that sandbox")
    folders = [Path(os.path.abspath(folder)) for folder in writes or []]  # noqa: PTH100 - links stay links
    try:
        plan = _plan(user=user, run_as=run_as, writes=folders)
    except ServiceError as error:
        fail(str(error))
    if not dry_run:
        _carry_out(plan, user=user)
    if json:
        print_json(
            {
                "installed": not dry_run,
                "folders": [str(folder) for folder in plan.folders],
                "files": {str(file.path): file.text for file in plan.files},
                "commands": [list(command) for command in plan.commands],
            }
        )
        return
    for folder in plan.folders:
        typer.echo(f"folder  {folder}")
    for file in plan.files:
        typer.echo(f"file    {file.path}")
    for command in plan.commands:
        typer.echo(f"run     {' '.join(command)}")
    if dry_run:
        typer.echo("Nothing was changed. The files' text: add --json")
    else:
        scope = " --user" if user else ""
        config = "~/.config/stepguard" if user else "/etc/stepguard"
        typer.echo(f"Next: write {config}/RUN.toml, then systemctl{scope} enable --now stepguardd@RUN")


def _plan(*, user: bool, run_as: str, writes: list[Path]) -> Installation:
    program = _program()
    if user:
        home = os.environ.get("XDG_CONFIG_HOME")
        return for_user(program, config_home=Path(home) if home else Path("~/.config").expanduser())
    return for_system(program, user=run_as, group=_group_of(run_as), writes=writes)


def _program() -> str:
    """The command that runs now, for the units to run."""
    script = Path(sys.executable).with_name("stepguard")
    if not script.exists():
        fail(f"{script} is missing; install stepguard into the environment of {sys.executable}")
    return str(script)


def _group_of(run_as: str) -> str:
    try:
        return grp.getgrgid(pwd.getpwnam(run_as).pw_gid).gr_name
    except KeyError:
        if run_as == USER:
            return USER  # systemd-sysusers is about to make it
        fail(f"--run-as: there is no user {run_as!r} on this machine")


def _carry_out(plan: Installation, *, user: bool) -> None:
    if not user and os.geteuid() != 0:
        fail("the system's units need root: use sudo, or install your own with --user")
    if not Path("/run/systemd/system").is_dir():
        fail("systemd does not run this machine; start the daemon with: stepguard run --config FILE")
    try:
        for folder in plan.folders:
            folder.mkdir(parents=True, exist_ok=True)
        for file in plan.files:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.path.with_name(f".{file.path.name}.new")
            fresh.write_text(file.text, encoding="utf-8")
            fresh.chmod(0o644)
            fresh.replace(file.path)
    except OSError as error:
        bad_news(f"{error.filename}: {error.strerror}; installed only in part")
    for command in plan.commands:
        _run(command)


def _run(command: tuple[str, ...]) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except OSError as error:
        bad_news(f"{command[0]}: {error.strerror}; the files are written, run it by hand")
    except subprocess.TimeoutExpired:
        bad_news(f"{' '.join(command)} took more than {_COMMAND_TIMEOUT_S:.0f} s; the files are written")
    if done.returncode != 0:
        bad_news(f"{' '.join(command)}: {done.stderr.strip()}; the files are written")
