"""`stepguard wait`: block until servers and GPUs are ready."""

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from stepguardd.cli.output import bad_news, fail, print_json, say
from stepguardd.config import Config, ConfigError, load_config
from stepguardd.config.loading import parse_assignments
from stepguardd.readiness import GpusWanted, Look, wait_until_ready


def wait(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The run's configuration.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting, over file and environment; repeatable."),
    ] = None,
    urls: Annotated[
        list[str] | None,
        typer.Option("--url", metavar="URL", help="A server, in place of the config's; repeatable."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=0, help="At least so many GPUs answer, and none is lost.")
    ] = None,
    gpu_free: Annotated[
        float | None,
        typer.Option("--gpu-free", min=0, max=1, metavar="SHARE", help="And this share of each is free."),
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=1, help="Then give up.")] = 1800,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """
    Block until the servers generate and the GPUs are there.

    Servers come from the config or from --url. With --gpus or --gpu-free and no --config, GPUs alone are
    waited for. Exit code 0: all is ready; 1: it is not, after --timeout-s.
    """
    wanted = None
    if gpus is not None or gpu_free is not None:
        wanted = GpusWanted(count=gpus or 0, free_share=gpu_free or 0.0)
    servers = {url: url.rstrip("/") for url in urls or []}
    if not servers and (config is not None or wanted is None):
        settings = _settings(config, assignments or [])
        servers = {server.name: server.url for server in settings.servers}
        if not servers and wanted is None:
            fail("nothing to wait for: no server is configured; give --config, --url or --gpus")

    def tell(look: Look) -> None:
        say(f"{look.name}: {look.detail}")

    with _clock_on_a_terminal():
        outcome = asyncio.run(wait_until_ready(servers, wanted, timeout_s=timeout_s, tell=tell))
    if as_json:
        print_json(
            {
                "ready": outcome.ready,
                "waited_s": round(outcome.waited_s, 3),
                "looks": [
                    {"name": look.name, "ready": look.ready, "detail": look.detail} for look in outcome.looks
                ],
            }
        )
    if not outcome.ready:
        missing = "; ".join(f"{look.name}: {look.detail}" for look in outcome.looks if not look.ready)
        bad_news(f"not ready after {outcome.waited_s:.0f} s: {missing}")
    say(f"ready after {outcome.waited_s:.1f} s")


@contextlib.contextmanager
def _clock_on_a_terminal() -> Iterator[None]:
    """A line that counts the seconds, below whatever is said meanwhile."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415 - 0.1 s that only a person's terminal pays
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task("waiting", total=None)
        yield


def _settings(config: Path | None, assignments: list[str]) -> Config:
    try:
        return load_config(config, parse_assignments(assignments))
    except ConfigError as error:
        fail(str(error))
