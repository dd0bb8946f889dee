"""`stepguard cluster up | status | down`: the agents of a run on a Ray cluster."""

import contextlib
import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepguardd.cli.output import bad_news, console, fail, print_json, say
from stepguardd.cli.runs import AsJson
from stepguardd.cluster.placement import Kept, Placement, PlacementError, Wanted
from stepguardd.cluster.wire import TokenError, kept_token
from stepguardd.config import ConfigError, load_config
from stepguardd.config.settings import split_listen
from stepguardd.control.contract import SOCKET_NAME, Refused

if TYPE_CHECKING:
    from stepguardd.config import Config

app = typer.Typer(rich_markup_mode=None)

ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", metavar="FILE", help="The head's config, with [cluster].")
]
Ray = Annotated[
    str, typer.Option("--ray", metavar="ADDRESS", help='The Ray cluster. "auto" is this machine\'s.')
]
NODE = "{node}"


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def up(
    *,
    config: ConfigFile,
    ray: Ray = "auto",
    run_dir: Annotated[
        str | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="STEPGUARD_RUN_DIR on each machine; {node} stands for its name. By default as on the head.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--head", metavar="HOST:PORT", help="Where agents find the head. By default cluster.listen."
        ),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(
            "--python", metavar="FILE", help="A Python there with stepguard[daemon]. By default Ray's."
        ),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", min=1, help="Then an agent that is not there has failed.")
    ] = 60,
    json: AsJson = False,
) -> None:
    """
    Have one agent on every machine of cluster.nodes.

    What is there already stays. An agent that dies is started again by its keeper, an actor of Ray's on the
    same machine. Start the daemon first. Exit code 1: an agent is missing.
    """
    settings = _settings(config)
    folder = run_dir or str(settings.run.run_dir)
    if not folder.startswith("/"):
        fail(f"--run-dir {folder}: must be a whole path, for the same one is used on every machine")
    try:
        token = kept_token(settings.cluster.token_file or settings.run.state_dir / "cluster.token")
    except TokenError as error:
        fail(f"cluster.token_file {error}")
    with _placement(settings, ray) as placement:
        where = head or _head(settings, placement)
        wanted = [
            Wanted(
                node=node,
                head=where,
                run_dir=folder.replace(NODE, node),
                python=python,
                config=str(config.absolute()),
            )
            for node in settings.cluster.nodes
        ]
        kept = placement.place(wanted, token, timeout_s=timeout_s, tell=_tell)
    if json:
        print_json({"agents": [_as_json(one) for one in kept]})
    missing = [one.node for one in kept if not one.well]
    if missing:
        bad_news(f"{len(missing)} of {len(kept)} agents are missing: {', '.join(missing)}")
    say(f"{len(kept)} agents are with the head; guards there need STEPGUARD_RUN_DIR={folder}")


@app.command()
def status(*, config: ConfigFile, ray: Ray = "auto", json: AsJson = False) -> None:
    """Each machine's agent, and what the head says of it. Exit code 1: one is missing."""
    settings = _settings(config)
    with _placement(settings, ray) as placement:
        kept = placement.look(settings.cluster.nodes)
    heard = _heads_word(settings)
    if json:
        print_json({"agents": [{**_as_json(one), "head_says": (heard or {}).get(one.node)} for one in kept]})
    else:
        _show(kept, heard)
    if heard is None:
        bad_news("no daemon of this run answers on this machine; start it: stepguard run --config FILE")
    if any(one.pid is None or heard.get(one.node) != "present" for one in kept):
        raise typer.Exit(1)


@app.command()
def down(*, config: ConfigFile, ray: Ray = "auto", json: AsJson = False) -> None:
    """
    End the agents that `up` placed.

    A daemon that still has them in its config holds the run until they are back.
    """
    settings = _settings(config, needs_nodes=False)
    with _placement(settings, ray) as placement:
        ended = placement.end_all()
    if json:
        print_json({"ended": sorted(ended), "unheard": {node: why for node, why in ended.items() if why}})
    for node, why in ended.items():
        if why:
            say(f"{node}: {why}; its keeper is ended, and the agent with it as soon as the machine turns")
    say(f"{len(ended)} agents ended" if ended else "there was no agent of this run")


def _settings(config: Path, *, needs_nodes: bool = True) -> "Config":
    try:
        settings = load_config(config)
    except ConfigError as error:
        fail(str(error))
    if needs_nodes and not settings.cluster.nodes:
        fail(f"{config}: cluster.nodes is empty; name the machines there, and set cluster.listen")
    return settings


@contextlib.contextmanager
def _placement(settings: "Config", ray: str) -> Iterator[Placement]:
    try:
        with contextlib.closing(Placement(settings.run.name, ray)) as placement:
            yield placement
    except PlacementError as error:
        bad_news(str(error))


def _head(settings: "Config", placement: Placement) -> str:
    """Where agents find the head: as the config says, and on this machine where that says "anywhere"."""
    assert settings.cluster.listen is not None
    host, port = split_listen(settings.cluster.listen)
    if not host.is_unspecified:
        return settings.cluster.listen
    here = ipaddress.ip_address(placement.here)
    return f"[{here}]:{port}" if here.version == 6 else f"{here}:{port}"


def _tell(kept: Kept) -> None:
    where = f" ({kept.address})" if kept.address else ""
    say(f"{kept.node}{where}: {'with the head' if kept.well else kept.why or 'its agent does not come up'}")


def _as_json(kept: Kept) -> dict[str, Any]:
    return {
        "node": kept.node,
        "address": kept.address,
        "run_dir": kept.run_dir,
        "pid": kept.pid,
        "joined": kept.joined,
        "starts": kept.starts,
        "why": kept.why,
    }


def _heads_word(settings: "Config") -> dict[str, str] | None:
    """What the daemon on this machine says of each node; None without one."""
    from stepguardd.control.client import ControlClient, ControlError, NoDaemonError  # noqa: PLC0415 - httpx

    try:
        with ControlClient(settings.run.run_dir / SOCKET_NAME) as daemon:
            return {node["name"]: node["state"] for node in daemon.status().get("nodes", ())}
    except (NoDaemonError, ControlError, Refused):
        return None


def _show(kept: Sequence[Kept], heard: dict[str, str] | None) -> None:
    from rich.table import Table  # noqa: PLC0415 - only a drawing command pays for it

    screen = console(as_json=False)
    table = Table(box=None, pad_edge=False, width=min(80, screen.width))
    for title in ("Node", "Address", "Agent", "Starts", "Head says"):
        table.add_column(title, no_wrap=True)
    table.add_column("", overflow="fold", ratio=1)
    for one in kept:
        agent = "[red]none[/]" if one.pid is None else f"pid {one.pid}"
        says = "?" if heard is None else heard.get(one.node, "unknown")
        style = "green" if says == "present" else "yellow"
        table.add_row(
            one.node, one.address or "?", agent, str(one.starts), f"[{style}]{says}[/]", one.why or ""
        )
    screen.print(table)
