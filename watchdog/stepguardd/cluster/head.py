"""
The head's end: the agents of the other machines, as events of the core, and the gate on its way to them.

An agent that is gone is not lost at once: it may come again before `lost_after_s` is over, and holds nobody
meanwhile. What an agent says of its machine is believed only in its place: events of the trainer from the
trainer's machine alone, a verdict on a batch for any other.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from .. import clock
from ..config import Config
from ..config.settings import split_listen
from ..core import cluster
from ..core.events import (
    BatchReported,
    Event,
    GpuTroubled,
    NodeAcknowledged,
    NodeJoined,
    NodeLost,
    OomSeen,
)
from ..core.state import Gate, NodeState, State
from .far import NotDoneError
from .peers import PeerPage
from .told import OfItsServers, event_of
from .wire import ALIVE_S, LINE_BYTES_MAX, Wire, WireError, answer, kept_token

log = logging.getLogger("stepguardd")

READOPTION_S: Final = 10.0
"""How long a daemon that came back waits for the agents of the one before it."""
SLEPT_S: Final = 1.0
"""A daemon that did not look for so long was itself asleep, and judges nobody by it."""
CONNECTIONS_MAX: Final = 1024
LINK_LOOK_S: Final = 0.1


class _Link:
    """One agent that is connected. `echo` is the newest of its own times that it sent."""

    def __init__(self, wire: Wire, echo: int, life: str) -> None:
        self.wire = wire
        self.echo = echo
        self.life = life
        self.over = asyncio.Event()

    def send(self, message: Mapping[str, object]) -> None:
        """Hand it over; an agent that does not read loses its connection, and is lost by its silence."""
        with contextlib.suppress(WireError):
            self.wire.send({**message, "at": self.echo})


class NodeLinks:
    """
    The other machines, as far as the head is connected with them.

    Args:
        config: the whole configuration; without `cluster.nodes` everything in here does nothing.
        state: the state as it is now.
        feed: takes the events.

    """

    def __init__(self, config: Config, state: Callable[[], State], feed: Callable[[Event], None]) -> None:
        self._config = config.cluster
        self._default_token = config.run.state_dir / "cluster.token"
        self._state = state
        self._feed = feed
        self._links: dict[str, _Link] = {}
        self._heard: dict[str, float] = {}
        self._taken: dict[str, tuple[str, int]] = {}
        self._refused: set[str] = set()
        self._came = clock.monotonic()
        self._looked = self._came
        self._guard_settings = ""
        self._socket: socket.socket | None = None
        self._token = ""
        self._talks: set[asyncio.Task[None]] = set()
        self._asked: dict[str, asyncio.Future[Mapping[str, Any]]] = {}
        self._servers_of = {server.name: server.node for server in config.servers}
        self.trainer_here = self._config.trainer is None
        self._own = PeerPage()

    @property
    def token_file(self) -> Path:
        """Where the token lies that agents have to hold."""
        return self._config.token_file or self._default_token

    def open(self) -> None:
        """
        Take the address, so that a wrong one ends the start.

        Raises:
            OSError: it cannot be had.
            TokenError: the token file cannot be used.

        """
        if not self._config.nodes or self._config.listen is None:
            return
        self._token = kept_token(self.token_file)
        host, port = split_listen(self._config.listen)
        try:
            self._socket = socket.create_server(
                (str(host), port), family=socket.AF_INET if host.version == 4 else socket.AF_INET6
            )
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"cluster.listen {self._config.listen}") from error
        self._socket.setblocking(False)

    def close(self) -> None:
        """Let the agents go: their pages' leases end by themselves."""
        for task in self._talks:
            task.cancel()
        for link in self._links.values():
            link.wire.close()
        if self._socket is not None:
            self._socket.close()

    def work(self) -> list[Coroutine[None, None, None]]:
        """What runs as long as the daemon does."""
        return [] if self._socket is None else [self._serve(self._socket), self._vouch()]

    # ---- to the machines -----------------------------------------------------------------------------

    def shown_here(self, gate: Gate) -> Gate:
        """What this machine's own page says."""
        return gate if self.trainer_here else self._own.of(cluster.shown(gate, to_trainer=False))

    def here(self, state: State) -> State:
        """The state as far as it is of this machine: a pid of another one means nothing here."""
        if any(server.node is not None and server.procs for server in state.servers):
            servers = (one if one.node is None else replace(one, procs=()) for one in state.servers)
            state = replace(state, servers=tuple(servers))
        return state if self.trainer_here else replace(state, trainer=replace(state.trainer, pid=None))

    def status(self) -> dict[str, object]:
        """The key of `status` that is this module's: `nodes`."""
        now, nodes = clock.monotonic(), self._state().nodes
        return {
            "nodes": [
                {
                    "name": node.name,
                    "state": node.state.value,
                    "since_s": round(max(0.0, now - node.since), 3),
                    "acked_generation": None if node.acked_generation < 0 else node.acked_generation,
                    "trainer": node.name == self._config.trainer,
                    "why": node.why,
                }
                for node in nodes
            ]
        }

    def publish(self, gate: Gate) -> None:
        """Send an order to every machine's page."""
        for name, link in self._links.items():
            link.send(self._gate(name, gate))

    def guard_settings(self, text: str) -> None:
        """What the guards of the other machines go by from now on."""
        self._guard_settings = text
        for link in self._links.values():
            link.send({"kind": "settings", "text": text})

    async def have_done(
        self, node: str, message: Mapping[str, object], timeout_s: float
    ) -> Mapping[str, Any]:
        """
        Have a machine's agent do something, and wait for its word that it is done.

        As long as the machine is lost it is not asked: the run is held for it, and people know. After a break
        it is asked again under the same id, which the agent does once.

        Raises:
            NotDoneError: it was connected for `timeout_s`, and has not said so.

        """
        number, left_s = secrets.token_hex(8), timeout_s
        done: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[number] = done
        try:
            while left_s > 0:
                link = self._links.get(node)
                if link is None:
                    await asyncio.sleep(LINK_LOOK_S)
                    continue
                began = clock.monotonic()
                link.send({**message, "id": number})
                over = asyncio.ensure_future(link.over.wait())
                await asyncio.wait((done, over), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                over.cancel()
                if done.done():
                    return done.result()
                left_s -= max(LINK_LOOK_S, clock.monotonic() - began)
        finally:
            del self._asked[number]
        raise NotDoneError(f"its agent has not done it within {timeout_s:.0f} s")

    def look(self) -> None:
        """See who is silent for too long."""
        now = clock.monotonic()
        slept, self._looked = now - self._looked > SLEPT_S, now
        if slept:
            self._heard.update(dict.fromkeys(self._heard, now))
            return
        for node in self._state().nodes:
            heard = self._heard.get(node.name)
            if node.state is NodeState.PRESENT:
                silent = now > self._came + READOPTION_S if heard is None else now > heard + self._lost_after
                if silent:
                    here = node.name in self._links
                    why = "silent, though connected: frozen or cut off" if here else "its agent is gone"
                    self._lose(node.name, why)
            elif node.state is NodeState.JOINING and now > self._came + self._config.join_timeout_s:
                self._feed(NodeLost(node=node.name, why="its agent never came"))

    @property
    def _lost_after(self) -> float:
        return self._config.lost_after_s

    def _lose(self, name: str, why: str) -> None:
        link = self._links.pop(name, None)
        if link is not None:
            link.wire.close()
        self._feed(NodeLost(node=name, why=why))

    async def _vouch(self) -> None:
        """Say that this loop turns, and how far an agent's events were taken in. Ends by cancellation."""
        while True:
            for name, link in self._links.items():
                link.send({"kind": "vouch", "got": self._taken.get(name, ("", 0))[1]})
            await asyncio.sleep(ALIVE_S)

    def _gate(self, name: str, gate: Gate) -> dict[str, object]:
        of_trainer = name == self._config.trainer
        page = cluster.shown(gate, to_trainer=of_trainer)
        return {
            "kind": "gate",
            "trainer": of_trainer,
            "order": page.order.value,
            "generation": page.generation,
            "reason": page.reason,
            "target_step": page.target_step,
            "target_path": page.target_path,
            "judged_batch": page.judged_batch,
            "judged_step": page.judged_step,
            "judged_ok": page.judged_ok,
        }

    # ---- from the machines ---------------------------------------------------------------------------

    async def _serve(self, listening: socket.socket) -> None:
        server = await asyncio.start_server(self._called, sock=listening, limit=LINE_BYTES_MAX)
        async with server:
            await server.serve_forever()

    async def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._talks) >= CONNECTIONS_MAX:
            writer.close()
            return
        self._talks.add(task)
        try:
            wire, name = await answer(reader, writer, self._token, self._refusal)
            await self._talk(wire, name)
        except TimeoutError:
            self._say_refused("somebody connected and said nothing in time")
        except (WireError, OSError) as over:
            self._say_refused(str(over))
        except asyncio.CancelledError:
            pass  # by `close`, and asyncio's streams would log it as an error (Python 3.11)
        finally:
            self._talks.discard(task)
            writer.close()

    def _refusal(self, name: str) -> str | None:
        known = ", ".join(self._config.nodes)
        return None if name in self._config.nodes else f"cluster.nodes has no such node; it has {known}"

    def _say_refused(self, why: str) -> None:
        if why not in self._refused and len(self._refused) < CONNECTIONS_MAX:
            self._refused.add(why)
            log.warning("cluster: %s", why)

    async def _talk(self, wire: Wire, name: str) -> None:
        """One agent's connection, from its page's word to its end; a newer one takes its place."""
        async with asyncio.timeout(self._lost_after):
            page = await wire.receive()
        if page.get("kind") != "page":
            raise WireError(f"{name} does not begin with its page")
        link = _Link(wire, _whole(page, "at"), str(page.get("life"))[:64])
        older = self._links.pop(name, None)
        if older is not None:
            older.wire.close()
        if self._taken.get(name, ("", 0))[0] != link.life:
            self._taken[name] = (link.life, 0)
        self._heard[name] = clock.monotonic()
        link.send({"kind": "settings", "text": self._guard_settings})
        self._links[name] = link
        log.info("cluster: node %s is connected", name)
        self._feed(
            NodeJoined(
                node=name, gate_order=str(page.get("order")), gate_generation=_whole(page, "generation")
            )
        )
        link.send(self._gate(name, self._state().gate))
        try:
            while True:
                message = await wire.receive()
                if self._links.get(name) is not link:
                    return
                self._heard[name] = clock.monotonic()
                link.echo = max(link.echo, _whole(message, "at"))
                self._take(name, link, message)
        finally:
            link.over.set()
            if self._links.get(name) is link:
                del self._links[name]
                log.info("cluster: node %s is not connected any more", name)

    def _take(self, name: str, link: _Link, message: Mapping[str, Any]) -> None:
        match message.get("kind"):
            case "alive":
                pass
            case "ack":
                self._feed(NodeAcknowledged(node=name, generation=_whole(message, "generation")))
            case "event":
                number = _whole(message, "seq")
                if number > self._taken[name][1]:  # sent again after a break, and known already
                    self._taken[name] = (link.life, number)
                    event = event_of(message, clock.monotonic())
                    if event is not None:
                        self._event(name, link, event)
                    else:
                        self._say_refused(f"{name} tells of {message.get('name')!r:.60}, not known here")
            case "done":
                waiting = self._asked.get(str(message.get("id")))
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            case "bye":
                self._lose(name, "its agent was stopped")
            case _:
                raise WireError(f"{name} says what no agent of this version says")

    def _event(self, name: str, link: _Link, event: Event) -> None:
        if isinstance(event, GpuTroubled):
            self._feed(replace(event, text=f"{name}: {event.text}"))
        elif isinstance(event, OomSeen):
            server = event.server if self._servers_of.get(event.server or "") == name else None
            self._feed(replace(event, server=server, facts={**event.facts, "node": name}))
        elif isinstance(event, OfItsServers):
            if self._servers_of.get(event.server or "") == name:
                self._feed(event)
        elif name == self._config.trainer:
            self._feed(event)
        elif isinstance(event, BatchReported):
            refused = cluster.peer_refusal(self._state(), event)
            link.send({"kind": "verdict", "batch": event.batch, "step": event.step, "refused": refused})

    def judge_here(self, event: BatchReported) -> None:
        """The verdict on a batch of a guard on this machine, where the trainer is on another."""
        self._own.judge(event.batch, event.step, cluster.peer_refusal(self._state(), event))


def _whole(message: Mapping[str, Any], key: str) -> int:
    value = message.get(key)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise WireError(f"a message without {key}: that is no stepguard")
    return value
