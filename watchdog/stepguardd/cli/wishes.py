"""What pause, resume, rollback and restart-server have in common: tell the daemon, and tell the person."""

from collections.abc import Mapping
from pathlib import Path

import typer

from stepguardd.cli.output import print_json
from stepguardd.cli.runs import daemon_of
from stepguardd.control.contract import Verb
from stepguardd.oneline import one_line


def tell(
    verb: Verb,
    *,
    config: Path | None,
    run_dir: Path | None,
    why: str,
    as_json: bool,
    done: str,
    args: Mapping[str, object] | None = None,
) -> None:
    """Ask the daemon for this; print its answer, or `done` where it has no words of its own."""
    with daemon_of(config, run_dir) as daemon:
        answer = daemon.ask(verb, why, args)
    if as_json:
        print_json(answer)
    else:
        typer.echo(one_line(str(answer.get("message", done))))
