"""
The daemon: wiring only. Sources feed events, `decide` decides, effects act, the journal remembers.

One event loop owns the state. An event is decided the moment it arrives, and the gate is written before
anything else happens, the journal included: a hold must not wait for a disk.
"""

import asyncio
import fcntl
import functools
import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Final

from stepguard.gate import GateError
from stepguard.prompts import QUARANTINE_FILE, names_in
from stepguard.settings import FILE_NAME as GUARD_SETTINGS_FILE

from . import clock, status
from .acting import Acting
from .alerts.alerting import Alerting
from .chronicle.chronicle import Chronicle
from .cluster.head import NodeLinks
from .cluster.wire import TokenError as ClusterTokenError
from .config import Config
from .control.contract import SOCKET_NAME, Verb
from .control.requests import incident_number, refuse_nonsense
from .control.server import allowed_uids, serve_control
from .core import ledger
from .core.commands import (
    Command,
    Effect,
    MarkPrompts,
    Notify,
    PublishGate,
)
from .core.decide import decide
from .core.events import (
    BatchReported,
    DaemonStarted,
    EffectEnded,
    Event,
    OperatorAsked,
    ProcessExited,
    Tick,
)
from .core.state import GateOrder, Mode, Node, Server, State, initial
from .effects import generation, prompts
from .effects import trainer as trainers
from .effects.backends.process import ProcessBackend, program_missing
from .effects.gate import GateWriter
from .effects.keeper import Keeper
from .effects.programs import systemctl
from .failpoint import failpoint
from .incidents import folders
from .incidents.recorder import IncidentRecorder
from .journal import Journal, JournalError, Restored
from .notify import Notifier
from .older_state import OlderStateError, read_older
from .settings import core_server, core_settings, refitted
from .sources.pausefile import PauseFile
from .sources.stream import RewardStream
from .sources.trainer import ReportSocket, TrainerPage
from .sources.trainer_tree import TrainerProcesses
from .surroundings import THIS_HOST, HostFiles, Surroundings
from .watching import WatchedServer, identity
from .web.reading import CheckpointDict
from .web.server import PageServer

log = logging.getLogger("stepguardd")

TICK_S: Final = 0.25
LEASE_RENEWAL_S: Final = 1.0
PAUSE_FILE_S: Final = 0.5
# What code without I/O raises where it is wrong.
_BUGS: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class DaemonError(Exception):
    """The daemon cannot start; the message is one line that names the file or key and the remedy."""


class Daemon:
    """
    One run's daemon.

    Args:
        config: the whole configuration.
        files: where this machine keeps what is read of it.

    Raises:
        DaemonError: on `start`, before anything of the run was touched.

    """

    def __init__(self, config: Config, files: HostFiles = THIS_HOST) -> None:
        self.config = config
        self.started_at = clock.monotonic()
        self._locks: list[IO[str]] = []
        self._events: deque[Event] = deque()
        self._deciding = False
        self._failure: BaseException | None = None
        self._mode_changed = False
        self._hold_for_a_person = False
        self._other_version: str | None = None
        self._taken_up = False
        self._stop = asyncio.Event()
        self.chronicle = Chronicle()
        self._manager = Notifier.from_env()
        self.gate: GateWriter
        self.journal: Journal
        self.state: State
        self._reports: ReportSocket
        self._page: TrainerPage
        self._stream: RewardStream | None = None
        self._servers: dict[str, WatchedServer] = {}
        self._recorder = IncidentRecorder(config, self._servers)
        self._decided_at = self.started_at
        self._web: PageServer
        self._trainer: TrainerProcesses | None = None
        self._nodes = NodeLinks(config, lambda: self.state, self.feed)
        self._surroundings = Surroundings(
            config, lambda: self._nodes.here(self.state), self.feed, files=files
        )
        self._acting = Acting(
            config,
            self._servers,
            self.feed,
            lambda: self.state,
            trainer=lambda: self._trainer,
            skip=self._write_guard_settings,
            look=self._surroundings.look,
            gpus=self._surroundings.gpus_now,
        )
        self._keeper = Keeper(
            config.checkpoints, lambda: self.state, self.feed, self._acting.changing_checkpoints
        )
        self._alerting = Alerting(config, lambda: self.state)

    # ---- life ---------------------------------------------------------------------------------------

    async def run(self, *, ready: Callable[[], None] = lambda: None) -> None:
        """Watch the run until asked to stop. `ready` is called once everything is in place."""
        try:
            restored = self._open()
        except DaemonError:
            await self._close()
            raise
        loop = asyncio.get_running_loop()
        for what in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(what, self._stop.set)
        try:
            self._take_up(restored.unfinished, restored.unreadable_intents)
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(work) for work in self._work()]
                await asyncio.sleep(0)  # a first turn for each: the control socket listens
                if not any(task.done() for task in running):
                    ready()
                    self._manager.ready()
                await self._stop.wait()
                self._manager.stopping()
                for task in running:
                    task.cancel()
        finally:
            await self._close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ask it to end."""
        self._stop.set()

    def _open(self) -> Restored:
        """Take the run's lock, journal, gate page and sockets, in this order; all or nothing."""
        run = self.config.run
        for settings in self.config.servers:
            trouble = program_missing(settings)
            if trouble is not None:
                raise DaemonError(trouble)
        for folder, key in ((run.run_dir, "run.run_dir"), (run.state_dir, "run.state_dir")):
            try:
                folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            except OSError as error:
                raise DaemonError(
                    f"{key}: cannot make {folder} ({error.strerror}); choose another"
                ) from error
        for folder in (run.state_dir, run.run_dir):
            self._take_lock(folder / "daemon.lock")
        try:
            self.journal = Journal(run.state_dir / "journal.db", boot_id=clock.boot_id())
            restored = self.journal.restore()
            self.journal.restore_chronicle(self.chronicle)
            self.state = self._fitted(restored)
            if restored.state is None and restored.older is None:
                self._refuse_strangers()
            self.gate = GateWriter(run.run_dir / "gate")
            self._write_guard_settings(self.state.trainer.skip_steps)
            self._reports = ReportSocket(
                run.run_dir / "reports.sock", self._reported, self._surroundings.guard_counts
            )
            self._nodes.open()
        except (JournalError, GateError, ClusterTokenError) as error:
            raise DaemonError(str(error)) from error
        except OSError as error:
            raise DaemonError(
                f"{error.filename or run.run_dir}: {error.strerror or error}; is run.run_dir ours, and short?"
            ) from error
        self.journal.start()
        self._web = PageServer(self.config.web, run.state_dir)
        self._page = TrainerPage(self.gate.page, self._seen_here, self._reports.drain)
        self._stream = RewardStream.of(self.config, self.state.stream_position, self.feed)
        for index, settings in enumerate(self.config.servers):
            self._servers[settings.name] = WatchedServer(
                self.config,
                index,
                self._of_server,
                functools.partial(self._known, settings.name),
                self._nodes.have_done,
            )
        backend = trainers.trainer_backend(
            identity(self.config),
            self.config.trainer,
            run_dir=run.run_dir,
            log=self.config.trainer_log(),
            systemctl=systemctl(),
        )
        if backend is not None:
            self._trainer = TrainerProcesses(backend, self.feed, self._reports.drain)
        return restored

    def _write_guard_settings(self, skip_steps: tuple[int, ...]) -> None:
        """What the trainer's guard goes by; in shadow nothing is refused or held, by the guard either."""
        settings = replace(self.config.guard.for_trainer(), skip_steps=skip_steps)
        if self.config.run.mode == Mode.SHADOW.value:
            settings = replace(
                settings,
                max_failed_fraction=1.0,
                max_refused_batches=1_000_000_000,
                on_daemon_lost="continue",
            )
        (self.config.run.run_dir / GUARD_SETTINGS_FILE).write_text(settings.to_json())
        self._nodes.guard_settings(settings.to_json())

    def _take_lock(self, path: Path) -> None:
        try:
            lock = path.open("a+")
            self._locks.append(lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DaemonError(
                f"{path}: another daemon watches this run already; see `stepguard status`, or give this one "
                "another run.name"
            ) from None
        except OSError as error:
            raise DaemonError(f"{path}: {error.strerror}; its folder must be writable") from error

    def _refuse_strangers(self) -> None:
        """Nothing is known of this run yet, and somebody else sits on a server's port: a wrong config."""
        for settings in self.config.servers:
            if settings.backend != "process" or settings.node is not None:
                continue
            blocked = ProcessBackend(identity(self.config), settings, Path(os.devnull)).blocked()
            if blocked is not None:
                raise DaemonError(f"servers.url: {blocked}")

    def _fitted(self, restored: Restored) -> State:
        """
        What the journal decides, under the config of today.

        A server that the config no longer has is dropped; a mode that a person set stays until the config's
        own changes.
        """
        settings, mode = core_settings(self.config), Mode(self.config.run.mode)
        now = clock.monotonic()
        fresh = tuple(core_server(self.config, one, now=now) for one in self.config.servers)
        nodes = tuple(Node(name=name, since=now) for name in self.config.cluster.nodes)
        state = restored.state
        if state is None:
            told = max(restored.incidents, *folders.kept(self.config.run.state_dir), 0)
            unknown = replace(
                initial(settings, mode, fresh),
                nodes=nodes,
                intents=restored.intents,
                incidents=told,
                checkpoints=restored.checkpoints,
            )
            if restored.older is None:
                return unknown
            state = self._taken_over(restored, restored.older, unknown)
        elif restored.unreadable or restored.unreadable_intents:
            self._warn_of_other_version(restored, "the rest is as it was")
        for recorded in restored.after:
            state, _ = decide(state, recorded.event, recorded.at)
        self._mode_changed = state.settings.mode is not mode
        known = {server.name: server for server in state.servers}
        kept = tuple(
            refitted(known[server.name], server) if server.name in known else server for server in fresh
        )
        met = {node.name: node for node in state.nodes}
        nodes = tuple(met.get(node.name, node) for node in nodes)
        halts = tuple(halt for halt in state.halts if halt.server in {server.name for server in kept})
        return replace(state, settings=settings, servers=kept, nodes=nodes, halts=halts)

    def _taken_over(self, restored: Restored, text: str, unknown: State) -> State:
        """What another version of Stepguard left, as far as it can be read; said in one warning."""
        try:
            older = read_older(text, unknown, without=restored.without)
        except OlderStateError as error:
            raise JournalError(
                f"{self.journal.path}: its newest state is damaged ({error}); move the file aside"
            ) from error
        self._hold_for_a_person = older.held and self.config.run.mode != Mode.SHADOW.value
        self._warn_of_other_version(restored, f"begun anew: {', '.join(older.lost) or 'nothing'}")
        return replace(
            older.state,
            intents=max(older.state.intents, unknown.intents),
            incidents=max(older.state.incidents, unknown.incidents),
        )

    def _warn_of_other_version(self, restored: Restored, what: str) -> None:
        self._other_version = (
            f"the journal was written by another version of Stepguard; {what}; "
            f"{restored.unreadable + len(restored.unreadable_intents)} rows could not be read"
        )
        log.warning("%s: %s", self.journal.path, self._other_version)

    def _take_up(self, unfinished: tuple[Effect, ...], unreadable: tuple[str, ...]) -> None:
        """Bring the page in line, look at every server, and settle what an earlier daemon had begun."""
        found = self.gate.found()
        self.feed(
            DaemonStarted(
                gate_order=GateOrder.GO.value if found is None else found.order.name,
                gate_generation=0 if found is None else found.generation,
                judged_batch=0 if found is None or not self._nodes.trainer_here else found.judged_batch,
                target_step=None if found is None else found.target_step,
                target_path=None if found is None else found.target_path,
            )
        )
        if self._mode_changed:
            asked = OperatorAsked(verb="mode", who="the config", why="run.mode", mode=self.config.run.mode)
            self.feed(asked)
        if self._hold_for_a_person:
            why = "the journal holds this run for something that this version cannot read"
            self.feed(OperatorAsked(verb="pause", who="the journal of another version", why=why))
        self._taken_up = True
        self._recorder.take_up(self.state)
        wanted = {server.repair.intent for server in self.state.servers if server.repair is not None}
        wanted |= {one.intent for one in (self.state.rollback, self.state.relaunch) if one is not None}
        wanted |= {halt.intent for halt in self.state.halts}
        for server in self._servers.values():
            server.processes.look()
        for effect in unfinished:
            if effect.intent in wanted:
                self._acting.begin(effect, None)
            else:
                self.feed(EffectEnded(intent=effect.intent, ok=False, detail="overtaken by events"))
        for intent in unreadable:
            self.feed(EffectEnded(intent=intent, ok=False, detail="begun by another version"))

    async def _close(self) -> None:
        """Stop the effects, tell the trainer that nobody is there, and leave the servers as configured."""
        await self._acting.close()
        await self._let_go()
        await self._alerting.close()
        await self._recorder.close()
        self._nodes.close()
        stop_servers = self._taken_up and self.config.run.servers_on_stop == "stop"
        for server in self._servers.values():
            server.processes.close()
            if stop_servers and server.settings.backend == "process" and server.settings.node is None:
                await server.backend.stop(server.backend.find())
            await server.http.close()
        if self._trainer is not None:
            self._trainer.close()
            if self._taken_up and self.config.trainer.on_stop == "stop":
                await self._trainer.backend.stop(self.state.trainer.procs)
        if hasattr(self, "_page"):
            self._page.close()
        if hasattr(self, "_reports"):
            self._reports.close()
        if hasattr(self, "gate"):
            self.gate.close()
        if hasattr(self, "journal"):
            self.journal.close()
        for lock in self._locks:
            lock.close()

    async def _let_go(self) -> None:
        """A daemon that ends leaves no server paused; the next one pauses it again where that is due."""
        halted = [halt.server for halt in self.state.halts] if self._taken_up else []
        https = [self._servers[name].http for name in halted if name in self._servers]
        await asyncio.gather(*(generation.go_on(http) for http in https))

    # ---- deciding ------------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """Decide one event now; an event that arrives while another is decided comes next."""
        self._events.append(event)
        if self._deciding:
            return
        self._deciding = True
        try:
            while self._events:
                self._decide(self._events.popleft())
        except BaseException as error:
            # Raised into a callback of the loop it would be a line in a log, and the daemon half blind.
            self._failure = error
            self._stop.set()
            raise
        finally:
            self._deciding = False

    def _of_server(self, event: Event) -> None:
        """What is told of a server; whether the kernel killed it is known for a few milliseconds only."""
        self.feed(event)
        if isinstance(event, ProcessExited):
            self._surroundings.count_kills()

    def _decide(self, event: Event) -> None:
        now = clock.monotonic()
        before, self._decided_at = self.state, now
        self.state, commands = decide(before, event, now)
        for command in commands:
            if isinstance(command, PublishGate):
                self.gate.publish(self._nodes.shown_here(command.gate))
                self._nodes.publish(command.gate)
                failpoint(f"gate_{command.gate.order.value}")
            elif isinstance(command, MarkPrompts):
                prompts.mark(self.config.run.run_dir, command)
        if self.state is before and not commands and not isinstance(event, EffectEnded):
            return  # nothing came of it; but that an effect has ended is always worth a row
        wall = clock.wall()
        try:
            entry = self.chronicle.take_in(event, before, self.state, commands, now=now, wall=wall)
        except _BUGS:
            log.exception("this decision is missing on the page")  # it stands, and is carried out
            entry = None
        durable = self.journal.record(
            at=now, wall=wall, event=event, commands=commands, state=self.state, entry=entry
        )
        for command in commands:
            self._carry_out(command, durable)
            if isinstance(command, Notify):
                self._alerting.tell(command, at=now, wall=wall)
        self._recorder.saw(self._nodes.here(before), self._nodes.here(self.state))

    def _carry_out(self, command: Command, durable: "asyncio.Future[None] | None") -> None:
        match command:
            case PublishGate() | MarkPrompts():
                pass
            case Notify():
                log.info("%s: %s", command.what, command.text, extra={"reason": command.reason})
            case _:
                failpoint(f"decided_{type(command).__name__}")
                self._acting.begin(command, durable)

    # ---- sources -------------------------------------------------------------------------------------

    def _work(self) -> list[Coroutine[None, None, None]]:
        """Everything that runs at an interval, each with its own timeout."""
        work: list[Coroutine[None, None, None]] = [
            _every(TICK_S, lambda: self.feed(Tick())),
            _every(LEASE_RENEWAL_S, self._vouch),
            _every(LEASE_RENEWAL_S, self._page.look),
        ]
        for server in self._servers.values():
            work.append(server.probe())
            work.append(server.ask())
            work.append(server.keep_looking())
            work.append(_every(self.config.probe.stopped_after_s, server.processes.sample))
        if self._stream is not None:
            work.append(self._stream.watch())
        if self._trainer is not None:
            work.append(self._trainer.keep_looking())
        pause = PauseFile(self.config.run.run_dir, lambda: self.state, self.feed)
        work += [_every(PAUSE_FILE_S, pause.look), self._keeper.run(), self._control()]
        work += [*self._alerting.work(), self._surroundings.watch(), *self._nodes.work()]
        if self.config.cluster.nodes:
            work.append(_every(TICK_S, self._nodes.look))
        return work

    def _vouch(self) -> None:
        """Say that this loop turns: to the trainer by the lease, to systemd by its watchdog."""
        self.gate.renew()
        self._alerting.vouch()
        self._manager.alive(status.line(self.state))

    def _reported(self, event: Event) -> None:
        """A report, with the page behind it: what the page says about the trainer must not be older."""
        self._page.look()
        if self._nodes.trainer_here:
            self.feed(event)
        elif isinstance(event, BatchReported):
            self._nodes.judge_here(event)
            self.gate.publish(self._nodes.shown_here(self.state.gate))

    def _seen_here(self, event: Event) -> None:
        """What this machine's page says of a trainer, where the trainer is on this machine."""
        if self._nodes.trainer_here:
            self.feed(event)

    def _known(self, name: str) -> Server | None:
        return next((one for one in self.state.servers if one.name == name), None)

    # ---- people --------------------------------------------------------------------------------------

    async def _control(self) -> None:
        self.chronicle.restore_curve(await asyncio.to_thread(self.journal.read_curve))
        uids = allowed_uids(self.config.control.allowed_uids)
        path = self.config.run.run_dir / SOCKET_NAME
        await serve_control(self, path, uids=uids, page=self._web.serve, keys=self._web.keys)

    def checkpoints(self) -> Sequence[CheckpointDict]:
        """The ledger: what the trainer reported as saved, and what is known of it."""
        proven_after = self.state.settings.proven_after_steps
        return [
            {
                "step": row.step,
                "attempt": row.attempt,
                "path": row.path,
                "verdict": row.verdict.value,
                "reason": row.reason,
                "proven": ledger.proven(row, proven_after),
                "healthy_steps": row.healthy_steps,
                "quarantined": row.set_aside,
                "pinned": row.pinned_path is not None,
                "gone": row.gone,
            }
            for row in self.state.checkpoints
        ]

    def quiet_s(self) -> float:
        """Since the last decision; a tick is one."""
        return clock.monotonic() - self._decided_at

    def status(self) -> Mapping[str, object]:
        """What `stepguard status` shows."""
        found = status.of(
            self.state,
            run=self.config.run.name,
            state_dir=str(self.config.run.state_dir),
            urls={server.name: server.url for server in self.config.servers},
            now=clock.monotonic(),
            started_at=self.started_at,
            stream=None if self._stream is None else self._stream.status(clock.monotonic()),
            notes=(
                *(() if self._other_version is None else (self._other_version,)),
                *(() if self._stream is None else self._stream.notes),
                *self._alerting.warnings(),
            ),
            lost_rows=self.journal.lost_rows,
            journal_failure=self.journal.failure,
        )
        unseen = {**status.unseen(self.state), **self._surroundings.unseen}
        withheld = names_in(self.config.run.run_dir / QUARANTINE_FILE)
        found = {**found, **self._nodes.status(), "prompts": status.prompts(self.state, withheld)}
        return {**found, **self._surroundings.status(), "unseen": unseen, "page": self._web.facts()}

    async def ask(self, verb: Verb, who: str, why: str, args: Mapping[str, object]) -> Mapping[str, object]:
        """
        A person's request.

        Raises:
            Refused: it makes no sense now; the message says why and what would.

        """
        request = OperatorAsked(
            verb=verb,
            who=who,
            why=why,
            server=_text(args.get("server")),
            before_step=_whole(args.get("before_step")),
            mode=_text(args.get("mode")),
            incident=incident_number(args.get("incident")),
            for_s=_number(args.get("for_s")),
        )
        refuse_nonsense(self.state, request)
        self.feed(request)
        return {"verb": verb, "gate": status.gate(self.state)}


async def _every(interval_s: float, work: Callable[[], None]) -> None:
    """Do it now and at an interval; a slow turn is skipped, never caught up on."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        work()
        due = max(due + interval_s, loop.time())
        await asyncio.sleep(due - loop.time())


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
