"""
Which run a command is about, and the call to its daemon.

Said by `--run-dir`, by `--config`, by STEPGUARD_RUN_DIR, or not at all where this machine has only one.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepguardd.cli.output import bad_news, fail
from stepguardd.control.contract import SOCKET_NAME, Refused
from stepguardd.places import run_roots

if TYPE_CHECKING:
    from stepguardd.config import Config
    from stepguardd.control.client import ControlClient

RunDir = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="The run's folder, with its control.sock.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="The run's configuration.")
]
Why = Annotated[
    str, typer.Option("--why", metavar="TEXT", help="The reason, for the journal and the next person.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask back.")]


@contextlib.contextmanager
def daemon_of(config: Path | None, run_dir: Path | None) -> Iterator["ControlClient"]:
    """
    A client for the daemon of the run that is meant.

    Whatever goes wrong ends the command: exit 1 without a daemon or with a refusal, exit 2 where no run was
    named well.
    """
    # httpx takes a quarter of a second, and only a command that gets here needs it.
    from stepguardd.control.client import ControlClient, ControlError, NoDaemonError  # noqa: PLC0415

    path = find_socket(config, run_dir)
    try:
        with ControlClient(path) as client:
            yield client
    except NoDaemonError as error:
        bad_news(f"no daemon at {error}; start one with: stepguard run --config FILE")
    except Refused as error:
        bad_news(f"the daemon will not: {error}")
    except ControlError as error:
        bad_news(str(error))


def find_socket(config: Path | None, run_dir: Path | None) -> Path:
    """The control socket of the run that is meant; ends the command where that is not clear."""
    if config and run_dir:
        fail("give --config or --run-dir, not both: each names a run")
    named = run_dir or (_config_of(config).run.run_dir if config else None)
    if named is None and (from_env := os.environ.get("STEPGUARD_RUN_DIR")):
        named = Path(from_env)
    if named is not None:
        return named / SOCKET_NAME
    found = sorted(path for root in run_roots() for path in root.glob(f"*/{SOCKET_NAME}"))
    serving = [path for path in found if _answers(path)]
    candidates = serving or found
    if not candidates:
        roots = " and ".join(str(root) for root in run_roots())
        bad_news(f"no run under {roots}; start one (stepguard run --config FILE), or name it with --run-dir")
    if len(candidates) > 1:
        fail(f"several runs, choose one with --run-dir: {', '.join(str(path.parent) for path in candidates)}")
    return candidates[0]


def state_dir_of(config: Path | None, run_dir: Path | None) -> Path:
    """Where the run that is meant keeps its journal: as its config says, else as its daemon does."""
    if config is not None and run_dir is None:
        return _config_of(config).run.state_dir
    with daemon_of(config, run_dir) as daemon:
        told = daemon.status().get("state_dir")
    if not told:
        bad_news("this daemon does not say where its state is; give --state-dir or --config")
    return Path(told)


def confirm(question: str, *, yes: bool, because: str = "this interrupts the run") -> None:
    """Ask a person before something is torn down; a script has to say --yes."""
    if yes:
        return
    if not os.isatty(0):
        fail(f"{because}: add --yes")
    typer.confirm(question, abort=True, err=True)


def by_whom(why: str) -> str:
    """Who runs this command, by the kernel's word on the user, and why, where that was said."""
    import pwd  # noqa: PLC0415 - commands that ask the daemon are told apart by the socket

    try:
        who = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        who = f"uid {os.getuid()}"
    return f"{who}: {why}" if why else who


def _config_of(config: Path) -> "Config":
    from stepguardd.config import ConfigError, load_config  # noqa: PLC0415 - only --config needs pydantic

    try:
        return load_config(config)
    except ConfigError as error:
        fail(str(error))


def _answers(path: Path) -> bool:
    """Whether somebody listens there: a killed daemon leaves its socket behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
