"""
What an agent does on its machine: it starts, ends and watches the servers that the config puts there.

The head says which server and what of it, never by which command: that stands in the agent's own copy of the
config. So whoever has stolen the token can restart a server, and run nothing of their own.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from .. import clock, proc
from ..config import Config, ServerSettings
from ..core.events import Event, Proc, TreeSeen
from ..core.memory import FLAGS
from ..core.state import Server
from ..effects.outcome import Outcome, failed
from ..effects.processes import resume
from ..settings import core_server
from ..watching import WatchedServer
from .far import procs_of
from .wire import WireError

log = logging.getLogger("stepguardd")

LOOK_S: Final = 2.0
INTENT_CHARS_MAX: Final = 200


class Hands:
    """
    The servers of one machine.

    Args:
        config: the run's config; None where the agent was given none, and starts and ends nothing.
        node: this machine's name.
        run_dir: this machine's folder of the run; where servers' output goes that has no place of its own.
        tell: takes what is seen of them.

    """

    def __init__(
        self, config: Config | None, node: str, run_dir: Path, tell: Callable[[Event], None]
    ) -> None:
        self._given = config is not None
        self.config = Config() if config is None else _of_this_machine(config, node, run_dir)
        self._tell = tell
        self._seen: dict[str, frozenset[Proc]] = {}
        self._servers: dict[str, WatchedServer] = {}
        self._acts: dict[str, asyncio.Task[Outcome]] = {}

    def open(self) -> None:
        """Find what runs already."""
        for index, settings in enumerate(self.config.servers):
            self._servers[settings.name] = WatchedServer(self.config, index, self._told, lambda: None)
        for server in self._servers.values():
            server.processes.look()

    async def close(self) -> None:
        """Watch nothing any more. What runs goes on, and what is being done is cut short."""
        for task in self._acts.values():
            task.cancel()
        await asyncio.gather(*self._acts.values(), return_exceptions=True)
        for server in self._servers.values():
            server.processes.close()
            await server.http.close()

    def known(self) -> tuple[Server, ...]:
        """These servers as the core has them before anything is known."""
        return tuple(core_server(self.config, one, now=clock.monotonic()) for one in self.config.servers)

    def work(self) -> list[Coroutine[None, None, None]]:
        """What runs as long as the agent does."""
        return [self._watch(server) for server in self._servers.values()]

    def tell_all(self) -> None:
        """Say what runs, to a head that may have heard nothing of it."""
        for server in self._servers.values():
            if not server.changing.locked():
                server.processes.tell()

    async def do(self, message: Mapping[str, Any]) -> Outcome:
        """
        Do what the head asks for. Asked again under the same id while it is being done, it is done once.

        Raises:
            WireError: it asks for something that no head of this version does.

        """
        number = message.get("id")
        if not isinstance(number, str):
            raise WireError("the head asks for something without an id")
        if number not in self._acts:
            act = self._act(message)
            self._acts[number] = asyncio.create_task(act, name=f"{message.get('verb')} {number}")
            self._acts[number].add_done_callback(lambda _: self._acts.pop(number, None))
        return await asyncio.shield(self._acts[number])

    def _told(self, event: Event) -> None:
        if isinstance(event, TreeSeen):
            before = self._seen.get(event.server, frozenset())
            self._seen[event.server] = frozenset(filter(proc.alive, before)) | set(event.procs)
        self._tell(event)

    def _ours(self, server: str, procs: tuple[Proc, ...]) -> tuple[Proc, ...]:
        """Those that were seen here as this server's: no other process is signalled on the head's word."""
        seen = self._seen.get(server, frozenset())
        return tuple(known for known in procs if known in seen or not proc.alive(known))

    def _act(self, message: Mapping[str, Any]) -> Coroutine[None, None, Outcome]:
        name, verb, intent = str(message.get("server")), message.get("verb"), message.get("intent")
        arguments, procs = message.get("arguments"), self._ours(name, procs_of(message))
        if not isinstance(intent, str) or len(intent) > INTENT_CHARS_MAX or not isinstance(arguments, dict):
            raise WireError("the head asks for something that is none")
        if not arguments.keys() <= FLAGS or not all(_is_number(value) for value in arguments.values()):
            raise WireError("the head asks for flags that no head gives")
        server = self._servers.get(name)
        if server is None:
            return _cannot(self._why_not(name))
        match verb:
            case "start":
                return _start(server, intent, arguments)
            case "stop":
                return _stop(server, procs)
            case "continue":
                return resume(procs)
            case _:
                raise WireError("the head asks for what no head of this version asks for")

    def _why_not(self, name: str) -> str:
        if not self._given:
            return "its agent has no config, and starts and ends nothing; start it with --config FILE"
        return f"the config of its agent has no server {name[:64]} there; give it the head's config"

    async def _watch(self, server: WatchedServer) -> None:
        """Find its processes afresh and read how they do, each at its interval. Ends by cancellation."""
        sample_s, looked = self.config.probe.stopped_after_s, clock.monotonic()
        while True:
            server.processes.sample()
            await asyncio.sleep(sample_s)
            if clock.monotonic() - looked >= LOOK_S:
                await server.look()
                looked = clock.monotonic()


async def _start(server: WatchedServer, intent: str, arguments: Mapping[str, str]) -> Outcome:
    async with server.changing:
        outcome = await server.backend.start(intent, arguments)
        server.adopt(outcome.procs)
    return outcome


async def _stop(server: WatchedServer, procs: tuple[Proc, ...]) -> Outcome:
    async with server.changing:
        outcome = await server.backend.stop(procs)
        server.adopt(())
    return outcome


async def _cannot(why: str) -> Outcome:
    return failed(why)


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, str) and len(value) < 20 and float(value) >= 0
    except ValueError:
        return False


def _of_this_machine(config: Config, node: str, run_dir: Path) -> Config:
    servers = [_here(server, run_dir) for server in config.servers if server.node == node]
    return Config(run=config.run, servers=tuple(servers), probe=config.probe, memory=config.memory)


def _here(server: ServerSettings, run_dir: Path) -> ServerSettings:
    """The server as this machine sees it: at its own port, by whatever name the head calls it."""
    parts = urlsplit(server.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    log_path = server.log or run_dir / "servers" / f"{server.name}.log"
    url = f"{parts.scheme}://127.0.0.1:{port}"
    return server.model_copy(update={"node": None, "url": url, "log": log_path})
