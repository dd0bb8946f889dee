"""
`stepguard agent`: one machine's hands and senses; the head's daemon decides.

It owns the machine's gate page, which has the layout that every guard knows, and the guard's socket. What the
page says is the head's word: an order is published when it comes and acknowledged once it is on the page, and
the lease is as old as the head's newest answer, measured by this machine's clock alone. So a machine that is
cut off, or whose head is gone, has a page whose lease runs out, and the guard does as `guard.on_daemon_lost`
says.
"""

import asyncio
import fcntl
import logging
import secrets
import signal
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Final

from pydantic import TypeAdapter

from stepguard.gate import GateError
from stepguard.settings import FILE_NAME as GUARD_SETTINGS_FILE

from .. import clock
from ..config import Config
from ..core.events import Event, LogSeen, TrainerExited, TrainerSeen, TreeSampled, TreeSeen
from ..core.reasons import Reason
from ..core.state import Gate, GateOrder, Mode, State, initial
from ..effects.gate import LEASE_S, GateWriter
from ..effects.outcome import failed
from ..settings import core_settings
from ..sources.trainer import ReportSocket, TrainerPage
from ..surroundings import Surroundings
from .far import message_of as message_of_outcome
from .hands import Hands
from .peers import PeerPage
from .told import OF_THE_MACHINE, message_of
from .wire import ALIVE_S, HANDSHAKE_S, LINE_BYTES_MAX, Wire, WireError, call

log = logging.getLogger("stepguardd")

SILENCE_S: Final = 4.0
"""A head that says nothing for so long is called anew; and what it says is not believed once it is as old."""
RETRY_S: Final = 0.5
UNTOLD_MAX: Final = 1024
PAGE_LOOK_S: Final = 1.0

_GATE: Final = TypeAdapter(Gate)


class AgentError(Exception):
    """The agent cannot start; the message is one line that names the file or option and the remedy."""


class Agent:
    """
    One machine's agent.

    Args:
        head: host and port of the head's `cluster.listen`.
        node: this machine's name in `cluster.nodes`.
        run_dir: where this machine's page and socket are; the guard's STEPGUARD_RUN_DIR here.
        token: what the head and all agents hold.
        config: the run's config, for the servers of this machine; without it none is started or watched.

    Raises:
        AgentError: on `run`, before anything of the run was touched.

    """

    def __init__(
        self, *, head: tuple[str, int], node: str, run_dir: Path, token: str, config: Config | None = None
    ) -> None:
        self._head, self._node, self._run_dir, self._token = head, node, run_dir, token
        self._life = secrets.token_hex(8)
        self._stop = asyncio.Event()
        self._for_good = True
        self._joined = asyncio.Event()
        self._wire: Wire | None = None
        self._lock: IO[str] | None = None
        self._gate: GateWriter
        self._reports: ReportSocket
        self._page: TrainerPage
        self._peer = PeerPage()
        self._of_trainer = False
        self._head_gate: Gate | None = None
        self._generation = 0
        self._vouched_ns = 0
        self._untold: deque[tuple[int, Event]] = deque(maxlen=UNTOLD_MAX)
        self._told = 0
        self._said = ""
        self._hands = Hands(config, node, run_dir, self._of_server)
        self._state: State = initial(core_settings(self._hands.config), Mode.HOLD, self._hands.known())
        self._surroundings = Surroundings(self._hands.config, lambda: self._state, self._sensed)
        self._asked: set[asyncio.Task[None]] = set()

    async def run(self, *, ready: Callable[[], None] = lambda: None, alive: IO[bytes] | None = None) -> None:
        """
        Serve this machine until SIGTERM or Ctrl-C.

        Args:
            ready: called once the head has taken this machine in.
            alive: a pipe that whoever started the agent holds open as long as it lives. The agent goes when
                it closes, and the head is not told of a farewell: another one may be on its way.

        """
        self._open()
        loop = asyncio.get_running_loop()
        for what in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(what, self._stop.set)
        try:
            async with asyncio.TaskGroup() as group:
                work = (
                    self._keep_talking(),
                    self._keep_saying(),
                    self._keep_looking(),
                    self._surroundings.watch(),
                    self._once_joined(ready),
                    self._as_long_as(alive),
                    *self._hands.work(),
                )
                running = [group.create_task(one) for one in work]
                await self._stop.wait()
                if self._for_good:
                    self._send({"kind": "bye"})
                for task in running:
                    task.cancel()
        finally:
            await self._hands.close()
            self._close()

    def stop(self) -> None:
        """Ask it to end."""
        self._stop.set()

    def _open(self) -> None:
        try:
            self._run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._lock = (self._run_dir / "daemon.lock").open("a+")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AgentError(
                f"{self._run_dir}: a daemon or an agent serves this folder already; give --run-dir another"
            ) from None
        except OSError as error:
            raise AgentError(f"{self._run_dir}: {error.strerror}; give --run-dir a folder of ours") from error
        try:
            self._gate = GateWriter(self._run_dir / "gate")
            self._reports = ReportSocket(self._run_dir / "reports.sock", self._reported)
        except GateError as error:
            raise AgentError(str(error)) from error
        except OSError as error:
            raise AgentError(
                f"{self._run_dir}: {error.strerror or error}; is --run-dir ours, and short?"
            ) from error
        self._page = TrainerPage(self._gate.page, self._seen, self._reports.drain)
        self._hands.open()
        found = self._gate.found()
        if found is None:
            # Nobody goes on here before the head has spoken.
            self._gate.publish(Gate(order=GateOrder.HOLD, reason=Reason.NODES_JOINING.value))
        else:
            self._generation = found.generation
            self._peer = PeerPage(found.judged_batch)

    def _close(self) -> None:
        if self._wire is not None:
            self._wire.close()
        if hasattr(self, "_page"):
            self._page.close()
        if hasattr(self, "_reports"):
            self._reports.close()
        if hasattr(self, "_gate"):
            self._gate.close()
        if self._lock is not None:
            self._lock.close()

    # ---- what this machine has to tell ---------------------------------------------------------------

    def _reported(self, event: Event) -> None:
        """A report of the guard, with the page behind it: what the page says must not be older."""
        self._page.look()
        self._tell(event)

    def _seen(self, event: Event) -> None:
        """What the page says of the trainer. Only the newest is worth telling, and only to somebody."""
        if isinstance(event, TrainerSeen):
            trainer = replace(self._state.trainer, pid=event.pid, alive=True)
            self._state = replace(self._state, trainer=trainer)
            if self._wire is None:
                return
        elif isinstance(event, TrainerExited):
            self._state = replace(self._state, trainer=replace(self._state.trainer, alive=False))
        self._tell(event)

    def _sensed(self, event: Event) -> None:
        if isinstance(event, OF_THE_MACHINE):
            self._tell(event)
        elif isinstance(event, LogSeen):
            self._tell(replace(event, position=None))  # ours to keep, and the head reads no log of ours

    def _of_server(self, event: Event) -> None:
        """What is seen of a server here; of how it does, only the newest is worth telling."""
        if isinstance(event, TreeSeen):
            servers = (
                replace(one, procs=event.procs) if one.name == event.server else one
                for one in self._state.servers
            )
            self._state = replace(self._state, servers=tuple(servers))
        if not isinstance(event, TreeSampled) or self._wire is not None:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        """Keep it until the head has it, and send it where there is one; the oldest give way."""
        self._told += 1
        self._untold.append((self._told, event))
        self._send_event(self._told, event)

    def _send_event(self, number: int, event: Event) -> None:
        self._send({"kind": "event", "seq": number, **message_of(event, clock.monotonic())})

    def _send(self, message: Mapping[str, object]) -> None:
        if self._wire is None:
            return
        try:
            self._wire.send({**message, "at": clock.monotonic_ns()})
        except WireError as over:
            self._wire = None  # the reading side ends with it, and calls anew
            self._say(str(over))

    async def _keep_saying(self) -> None:
        while True:
            self._send({"kind": "alive"})
            await asyncio.sleep(ALIVE_S)

    async def _keep_looking(self) -> None:
        while True:
            self._page.look()
            await asyncio.sleep(PAGE_LOOK_S)

    async def _once_joined(self, ready: Callable[[], None]) -> None:
        await self._joined.wait()
        ready()

    async def _as_long_as(self, alive: IO[bytes] | None) -> None:
        if alive is None:
            return
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), alive)
        while await reader.read(4096):
            pass
        log.warning("whoever started this agent is gone, and it goes too")
        self._for_good = False
        self._stop.set()

    # ---- what the head says --------------------------------------------------------------------------

    async def _keep_talking(self) -> None:
        """Be connected with the head, again and again. Ends by cancellation."""
        while True:
            try:
                await self._talk()
            except TimeoutError:
                self._say(f"the head at {self._head[0]}:{self._head[1]} is silent")
            except WireError as over:
                self._say(str(over))
            except OSError as error:
                self._say(f"no head at {self._head[0]}:{self._head[1]}: {error.strerror or error}")
            finally:
                self._wire = None
            await asyncio.sleep(RETRY_S)

    async def _talk(self) -> None:
        async with asyncio.timeout(HANDSHAKE_S):
            reader, writer = await asyncio.open_connection(*self._head, limit=LINE_BYTES_MAX)
        try:
            wire = await call(reader, writer, self._token, self._node)
            page = self._gate.found()
            order = GateOrder.HOLD.value if page is None else page.order.name
            self._wire = wire
            self._send({"kind": "page", "life": self._life, "order": order, "generation": self._generation})
            for number, event in self._untold:
                self._send_event(number, event)
            self._hands.tell_all()
            while True:
                async with asyncio.timeout(SILENCE_S):
                    message = await wire.receive()
                self._take(message)
        finally:
            writer.close()

    def _take(self, message: Mapping[str, Any]) -> None:
        """
        Do what the head says.

        The head repeats the newest of our times with everything it says. After a machine slept, what waits in
        its sockets is from before: an old GO must not be shown, nor a lease be renewed by an old word.
        """
        at = message.get("at")
        if type(at) is not int or clock.monotonic_ns() - at > SILENCE_S * 1e9:
            raise WireError("what the head says here is old: this machine was asleep, or the network is slow")
        self._vouched_ns = at + int(LEASE_S * 1e9)
        match message.get("kind"):
            case "vouch":
                self._got(message.get("got"))
                if self._head_gate is not None:
                    self._gate.renew(self._vouched_ns)
            case "gate":
                self._publish(message)
            case "verdict":
                self._judged(message)
            case "settings":
                self._settings(message.get("text"))
            case "do":
                task = asyncio.create_task(self._do(message))
                self._asked.add(task)
                task.add_done_callback(self._asked.discard)
            case _:
                raise WireError("the head says what no head of this version says")

    def _publish(self, message: Mapping[str, Any]) -> None:
        try:
            gate = _GATE.validate_python({key: message[key] for key in Gate.__dataclass_fields__})
        except (KeyError, ValueError):
            raise WireError("the head sends an order that is none") from None
        if gate.generation < self._generation:
            return  # from before the head heard of our page; it will go beyond
        self._of_trainer = message.get("trainer") is True
        self._head_gate, self._generation = gate, gate.generation
        self._show()
        self._send({"kind": "ack", "generation": gate.generation})
        if not self._joined.is_set():
            log.info("node %s: the head has taken this machine in", self._node)
            self._joined.set()
        if self._said:
            log.info("the head is there again")
            self._said = ""

    async def _do(self, message: Mapping[str, Any]) -> None:
        """Do it, and say so to whoever is the head by then."""
        try:
            outcome = await self._hands.do(message)
        except WireError as wrong:
            outcome = failed(str(wrong))
        except OSError as error:
            outcome = failed(f"{error.filename or message.get('server')}: {error.strerror or error}")
        self._send({**message_of_outcome(outcome), "id": message.get("id")})

    def _show(self) -> None:
        if self._head_gate is not None:
            gate = self._head_gate if self._of_trainer else self._peer.of(self._head_gate)
            self._gate.publish(gate, self._vouched_ns)

    def _judged(self, message: Mapping[str, Any]) -> None:
        batch, step, refused = (message.get(key) for key in ("batch", "step", "refused"))
        if type(batch) is int and type(step) is int and (refused is None or isinstance(refused, str)):
            self._peer.judge(batch, step, refused)
            self._show()

    def _settings(self, text: object) -> None:
        """What the guard here goes by; written aside and moved, since it may be read at any instant."""
        if isinstance(text, str):
            path = self._run_dir / GUARD_SETTINGS_FILE
            fresh = path.with_name(f".{path.name}")
            try:
                fresh.write_text(text)
                fresh.replace(path)
            except OSError as error:
                log.warning("%s: %s; the guard goes by its defaults", path, error.strerror)

    def _got(self, number: object) -> None:
        if type(number) is int:
            while self._untold and self._untold[0][0] <= number:
                self._untold.popleft()

    def _say(self, why: str) -> None:
        """A cause is said when it begins."""
        if why != self._said:
            self._said = why
            log.warning("%s; trying again", why)
