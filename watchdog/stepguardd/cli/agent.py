"""`stepguard agent`: one machine of a run that has several."""

import asyncio
import logging
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from stepguardd.cli.output import fail, print_json, say
from stepguardd.cluster.agent import Agent, AgentError
from stepguardd.cluster.wire import NODE_NAME, TokenError, read_token
from stepguardd.config import ConfigError, load_config
from stepguardd.urgency import urgent


def agent(
    head: Annotated[str, typer.Option("--head", metavar="HOST:PORT", help="The head's cluster.listen.")],
    run_dir: Annotated[
        Path, typer.Option("--run-dir", help="Where this machine's gate page is; local, and its alone.")
    ],
    token_file: Annotated[
        Path, typer.Option("--token-file", help="A copy of the head's cluster.token, mode 600.")
    ],
    node: Annotated[
        str | None, typer.Option("--node", help="Its name in cluster.nodes. By default the host's.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="A copy of the head's config: then servers with this node are started and watched here.",
        ),
    ] = None,
    while_stdin: Annotated[
        bool, typer.Option("--while-stdin", help="Serve only as long as stdin, a pipe, is open.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object once it is ready.")] = False,
) -> None:
    """
    Serve another machine of a run; its head decides.

    It runs until SIGTERM or Ctrl-C, and calls the head again whenever it is gone. The guard on this machine
    finds the page by STEPGUARD_RUN_DIR.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    name = socket.gethostname() if node is None else node
    if not NODE_NAME.match(name):
        fail(f"--node {name!r:.80}: must be letters, digits, dots and dashes, 64 at most")
    try:
        one = Agent(
            head=_address(head),
            node=name,
            run_dir=run_dir.absolute(),
            token=read_token(token_file),
            config=None if config is None else load_config(config),
        )
    except ConfigError as error:
        fail(f"--config {error}")
    except TokenError as error:
        fail(f"--token-file {error}")

    def ready() -> None:
        say(f"node {name} is with its head; STEPGUARD_RUN_DIR={run_dir.absolute()}")
        if as_json:
            print_json({"ready": True, "node": name, "run_dir": str(run_dir.absolute())})

    urgent()
    try:
        asyncio.run(one.run(ready=ready, alive=sys.stdin.buffer if while_stdin else None))
    except AgentError as error:
        fail(str(error))


def _address(head: str) -> tuple[str, int]:
    host, _, port = head.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        fail(f"--head {head!r:.80}: must look like HOST:PORT, as cluster.listen of the head")
    return host.strip("[]"), int(port)
