"""`stepguard open`: a link that opens the run's page, once."""

import typer

from stepguardd.cli.output import print_json
from stepguardd.cli.runs import AsJson, ConfigFile, RunDir, daemon_of


def open(*, run_dir: RunDir = None, config: ConfigFile = None, json: AsJson = False) -> None:  # noqa: A001
    """Print a link that opens the run's page with the right to act; good once, for five minutes."""
    with daemon_of(config, run_dir) as daemon:
        link = daemon.link()
    if json:
        print_json(link)
    else:
        typer.echo(str(link.get("url", "")))
