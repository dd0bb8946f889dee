"""One inference server's parts on this side: who owns it, its HTTP client, its processes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from . import clock, proc
from .cluster.far import Ask, FarBackend, FarProcesses
from .config import Config
from .core.events import Event, Proc
from .core.state import Server, ServerState, Stage
from .effects.backends import backend
from .effects.backends.contract import Backend, port_of, value_of
from .effects.outcome import Outcome
from .effects.processes import resume
from .incidents.collected import SCRAPE_BYTES_MAX, SCRAPE_EVERY_S, SERVERS_SCRAPED_MAX, Scrape
from .sources import sglang
from .sources.process import ServerProcesses

TREE_INTERVAL_S: Final = 5.0
REPAIR_INTERVAL_S: Final = 0.2


class WatchedServer:
    """
    One server's parts: who owns it, its HTTP client, its processes.

    Args:
        config: the whole configuration.
        index: which of its servers.
        emit: where the events go.
        now: the server as the core has it now.
        ask: has the agent of another machine do something, for a server that is there.

    """

    def __init__(
        self,
        config: Config,
        index: int,
        emit: Callable[[Event], None],
        now: Callable[[], Server | None],
        ask: Ask | None = None,
    ) -> None:
        self.settings = config.servers[index]
        default_log = config.run.state_dir / "servers" / f"{self.settings.name}.log"
        self.log = self.settings.log or default_log
        self._far: FarBackend | None = None
        if self.settings.node is not None and ask is not None:
            self._far = FarBackend(self.settings, ask)
        self.backend: Backend = self._far or backend(identity(config), self.settings, self.log)
        self._names = sglang.Names()
        self.http = sglang.client(self.settings.url)
        here = ServerProcesses(self.settings.name, self.backend.find, emit)
        self.processes: ServerProcesses | FarProcesses = here if self._far is None else FarProcesses()
        self.base_model = base_model(self.settings.command)
        self.changing = asyncio.Lock()
        self._changes = 0
        self._emit = emit
        self._now = now
        self._probe_settings = config.probe
        self.scrape: Scrape | None = None
        self._scrapes = index < SERVERS_SCRAPED_MAX

    def adopt(self, procs: tuple[Proc, ...]) -> None:
        """These are the server's processes from now on, whatever a look that is under way will find."""
        self._changes += 1
        self.processes.adopt(procs)

    async def resume(self, procs: tuple[Proc, ...]) -> Outcome:
        """Send SIGCONT to processes of its tree, where they are."""
        return await (resume(procs) if self._far is None else self._far.resume(procs))

    async def look(self) -> None:
        """
        Find the tree afresh.

        In a thread where that is slow: a large machine has thousands of processes, and systemd may stall.
        What a stop or a start has overtaken is not told.
        """
        before, find = self._changes, self.backend.find
        procs = find() if self.backend.quick else await asyncio.to_thread(find)
        if before == self._changes and not self.changing.locked():
            self.processes.adopt(procs, tell=True)

    def answers_itself(self) -> bool | None:
        """Whether the server's own tree holds its port; None where that cannot be seen."""
        port = port_of(self.settings.url)
        procs = self.backend.find()
        if port is None or not procs:
            return None
        return proc.listening(port, (known.pid for known in procs)) is not None

    async def probe(self) -> None:
        """Ask the cheap endpoints, at an interval that a repair shortens. Ends by cancellation."""
        name, settings = self.settings.name, self._probe_settings
        while True:
            self._emit(
                await sglang.probe(
                    self.http,
                    name,
                    timeout_s=settings.timeout_s,
                    names=self._names,
                    scraped=self._keep_scrape,
                )
            )
            await asyncio.sleep(REPAIR_INTERVAL_S if self._repairing() else settings.interval_s)

    async def ask(self) -> None:
        """Ask what the core wants asked: the scheduler, or for a token; one of each. Ends by cancellation."""
        name, settings = self.settings.name, self._probe_settings
        token: asyncio.Task[None] | None = None
        try:
            while True:
                await asyncio.sleep(settings.interval_s)
                server = self._now()
                wanted = server is not None and server.health_due
                if token is not None and (token.done() or not wanted):
                    token.cancel()
                    token = None
                if wanted and token is None:
                    token = asyncio.create_task(self._ask_token())
                if server is not None and server.doubted:
                    self._emit(
                        await sglang.ask_scheduler(
                            self.http, name, timeout_s=settings.timeout_s, names=self._names
                        )
                    )
        finally:
            if token is not None:
                token.cancel()

    async def _ask_token(self) -> None:
        self._emit(
            await sglang.ask_token(
                self.http,
                self.settings.name,
                timeout_s=self._probe_settings.health_timeout_s,
                names=self._names,
            )
        )

    def _keep_scrape(self, body: bytes) -> None:
        """The newest `/metrics` is kept for an incident's report, now and then, of a small fleet."""
        now = clock.wall()
        if self._scrapes and (self.scrape is None or abs(now - self.scrape.wall) >= SCRAPE_EVERY_S):
            self.scrape = Scrape(wall=now, body=body[:SCRAPE_BYTES_MAX])

    async def keep_looking(self) -> None:
        """Find the tree afresh at an interval, but not while it is being changed. Ends by cancellation."""
        while True:
            await asyncio.sleep(1.0 if self._repairing() else TREE_INTERVAL_S)
            if self._stage() not in {Stage.STOP, Stage.START, Stage.BACKOFF}:
                await self.look()

    def _stage(self) -> Stage | None:
        server = self._now()
        return None if server is None or server.repair is None else server.repair.stage

    def _repairing(self) -> bool:
        server = self._now()
        return server is not None and (server.repair is not None or server.state is ServerState.DEAD)


def base_model(command: tuple[str, ...]) -> Path | None:
    """The folder that a server's own command names as its model; None for a name of a hub, or none."""
    path = value_of(command, "--model-path") or value_of(command, "--model")
    return Path(path) if path is not None and path.startswith("/") else None


def identity(config: Config) -> str:
    """What names a run on this machine: two runs of one name must not take up each other's servers."""
    return f"{config.run.name}@{config.run.state_dir}"
