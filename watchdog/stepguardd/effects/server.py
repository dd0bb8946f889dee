"""
Starting and ending a server: one back-end for each who may own it.

Each back-end finds its server on the machine by itself (a mark in the environment, a unit, a port), so what
a daemon that died had begun is found again, and not begun twice.
"""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from .. import proc
from ..config import ServerSettings
from ..core.events import Proc
from . import programs
from .outcome import Outcome, failed
from .processes import end, send

SERVER_MARK: Final = "STEPGUARD_SERVER"
INTENT_MARK: Final = "STEPGUARD_INTENT"
LOG_BYTES_MAX: Final = 64 << 20

# SGLang's dumps before a crash keep HTTP a black hole for a minute (research on 0.5.23).
_NO_DUMPS: Final = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}
_EARLY_DEATH_S: Final = 0.2
_PORT_FREE_S: Final = 10.0
_STOP_ROUNDS: Final = 3
_SYSTEMCTL_TIMEOUT_S: Final = 90.0


class Backend(Protocol):
    """Who owns a server, and how it is asked to start and to end."""

    managed: bool

    @property
    def quick(self) -> bool:
        """Whether `find` takes a millisecond now; else it looks at the whole machine, or asks systemd."""

    def find(self) -> tuple[Proc, ...]:
        """The server's live processes, the root first; empty when there is none."""

    async def start(self, intent: str) -> Outcome:
        """See that the server runs, started once for this intent. The outcome has its processes."""

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """See that the server's whole tree, these processes included, is gone and its port free."""


async def resume(procs: tuple[Proc, ...]) -> Outcome:
    """Send SIGCONT. Whether it helped, the next sample of /proc tells."""
    sent = send(procs, signal.SIGCONT)
    return Outcome(ok=sent > 0, detail=f"SIGCONT sent to {sent} of {len(procs)} processes")


class ProcessBackend:
    """
    The server as the daemon's child, in a session of its own: it outlives the daemon and is found again.

    Args:
        run: what names the run on this machine.
        settings: the server's table of the config.
        log: where its output goes.

    """

    managed = True

    def __init__(self, run: str, settings: ServerSettings, log: Path) -> None:
        self._settings = settings
        self._log = log
        self._mark = f"{run}/{settings.name}"
        self._port = port_of(settings.url)
        self._children: list[subprocess.Popen[bytes]] = []
        self._known: tuple[Proc, ...] = ()

    @property
    def quick(self) -> bool:
        """While its root lives."""
        return _rooted(self._known)

    def find(self) -> tuple[Proc, ...]:
        """By the sessions of what was known, and at a daemon's start by the mark in the environment."""
        self._reap()
        found = proc.family(self._known) or ()
        if self._known and not found:
            found = proc.tree(self._known[0].pid) if proc.unmistaken(self._known[0]) else ()
        if not found:
            found = proc.marked(SERVER_MARK, self._mark)
        if found:
            self._known = found
        return found

    async def start(self, intent: str) -> Outcome:
        """Start it, unless this intent already has."""
        ours = proc.marked(INTENT_MARK, f"{self._mark}/{intent}")
        if ours:
            self._known = ours
            return Outcome(ok=True, detail="found running", procs=ours)
        if self._port is not None and proc.port_taken(self._port):
            return failed(_taken(self._port))
        try:
            child = self._spawn(intent)
        except OSError as error:
            program = self._settings.command[0]
            return failed(f"cannot start {program}: {error.strerror or error}; check servers.command and cwd")
        await asyncio.sleep(_EARLY_DEATH_S)
        if child.poll() is not None:
            return failed(f"it exited at once with code {child.returncode}; its log is {self._log}")
        self._known = proc.tree(child.pid)
        return Outcome(ok=True, detail=f"pid {child.pid}", procs=self._known)

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """
        End the tree, orphans of its session included, and wait for the port.

        In rounds: a tree that is told to end may still start a process.
        """
        ended, grace_s = 0, self._settings.stop_timeout_s
        tree = _once((*procs, *self._whole(procs)))  # the dead of `procs` too: their tree cannot drain
        for _ in range(_STOP_ROUNDS):
            left = await end(tree, grace_s=grace_s, timeout_s=_PORT_FREE_S)
            self._reap()
            if left:
                return failed("pids " + ", ".join(str(known.pid) for known in left) + " survive SIGKILL")
            ended += len(tree)
            grace_s, tree = 0.0, self._whole(tree)
            if not tree:
                break
        if not await self._port_free():
            return failed(_taken(self._port or 0))
        self._known = ()
        return Outcome(ok=True, detail=f"{ended} processes ended")

    def blocked(self) -> str | None:
        """Who else holds the server's port; None when it is free or the server's own."""
        if self._port is None or not proc.port_taken(self._port):
            return None
        ours = (known.pid for known in self.find())
        return None if proc.listening(self._port, ours) is not None else _taken(self._port)

    def _whole(self, procs: tuple[Proc, ...]) -> tuple[Proc, ...]:
        """What lives of these processes, of their trees and sessions, and of all that carries our mark."""
        roots = (*procs, *proc.marked(SERVER_MARK, self._mark))
        return proc.trees({known.pid for known in roots if proc.unmistaken(known)})

    def _spawn(self, intent: str) -> subprocess.Popen[bytes]:
        settings = self._settings
        environment = {**os.environ, **_NO_DUMPS, **settings.environment()}
        environment[SERVER_MARK] = self._mark
        environment[INTENT_MARK] = f"{self._mark}/{intent}"
        self._rotate()
        with self._log.open("ab") as log:
            child = subprocess.Popen(
                settings.command,
                cwd=settings.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def _rotate(self) -> None:
        """One older log is kept; a start is the one moment at which nobody writes to it."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > LOG_BYTES_MAX:
            self._log.replace(self._log.with_suffix(self._log.suffix + ".1"))

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]

    async def _port_free(self) -> bool:
        deadline = asyncio.get_running_loop().time() + _PORT_FREE_S
        while self._port is not None and proc.port_taken(self._port):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.05)
        return True


class SystemdBackend:
    """
    The server as a systemd unit of its own; the daemon needs leave to start and stop it.

    Args:
        settings: the server's table of the config.
        systemctl: the command; by default to the manager that runs the daemon.

    """

    managed = True

    def __init__(self, settings: ServerSettings, systemctl: Sequence[str] = ()) -> None:
        assert settings.unit is not None
        self._unit = settings.unit
        self._systemctl = tuple(systemctl) or programs.systemctl()
        self._known: tuple[Proc, ...] = ()

    @property
    def quick(self) -> bool:
        """While its main process lives."""
        return _rooted(self._known)

    def find(self) -> tuple[Proc, ...]:
        """The processes of the unit's main process; systemd is asked for it only once it is gone."""
        self._known = proc.family(self._known) or self._shown()
        return self._known

    def _shown(self) -> tuple[Proc, ...]:
        command = [*self._systemctl, "show", "--property=MainPID", "--value", self._unit]
        try:
            shown = subprocess.run(
                command, capture_output=True, timeout=5.0, check=False, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired):
            return ()
        text = shown.stdout.strip()
        return proc.tree(int(text)) if text.isdigit() and int(text) > 0 else ()

    async def start(self, intent: str) -> Outcome:
        """`systemctl start` is an ensure by itself: a unit that runs is left running."""
        del intent
        outcome = await self._ask("start")
        return Outcome(ok=True, detail=outcome.detail, procs=self.find()) if outcome.ok else outcome

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """Stop the unit, then see that no process of the old tree is left."""
        outcome = await self._ask("stop")
        if not outcome.ok:
            return outcome
        left = await end(procs, grace_s=0.0, timeout_s=_PORT_FREE_S)
        return failed(f"{len(left)} processes survive SIGKILL") if left else outcome

    async def _ask(self, verb: str) -> Outcome:
        try:
            child = await asyncio.create_subprocess_exec(
                *self._systemctl,
                "--no-ask-password",
                verb,
                self._unit,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            return failed(f"cannot run systemctl: {error.strerror}")
        try:
            async with asyncio.timeout(_SYSTEMCTL_TIMEOUT_S):
                _, stderr = await child.communicate()
        except TimeoutError:
            child.kill()
            await child.wait()
            return failed(f"systemctl {verb} {self._unit} took more than {_SYSTEMCTL_TIMEOUT_S:.0f} s")
        if child.returncode != 0:
            return failed(f"systemctl {verb} {self._unit}: {stderr.decode('utf-8', 'replace').strip()}")
        return Outcome(ok=True, detail=f"systemctl {verb} {self._unit}")


class ObservedBackend:
    """
    A server that somebody else starts and ends: it is found by its port, and only watched.

    Args:
        settings: the server's table of the config.

    """

    managed = False

    def __init__(self, settings: ServerSettings) -> None:
        self._port = port_of(settings.url)
        self._known: tuple[Proc, ...] = ()

    @property
    def quick(self) -> bool:
        """While it lives."""
        return _rooted(self._known)

    def find(self) -> tuple[Proc, ...]:
        """The tree of whoever listens on the port; on another machine there is none to see."""
        self._known = proc.family(self._known) or self._listening()
        return self._known

    def _listening(self) -> tuple[Proc, ...]:
        owner = None if self._port is None else proc.port_owner(self._port)
        return () if owner is None else proc.tree(owner)

    async def start(self, intent: str) -> Outcome:
        """Not ours to start."""
        del intent
        return failed("this server is only observed")

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """Not ours to end."""
        del procs
        return failed("this server is only observed")


def _rooted(known: tuple[Proc, ...]) -> bool:
    return bool(known) and proc.alive(known[0])


def _once(procs: tuple[Proc, ...]) -> tuple[Proc, ...]:
    """Each process once, whatever role it was seen in."""
    return tuple({(known.pid, known.start_ticks): known for known in procs}.values())


def backend(run: str, settings: ServerSettings, log: Path) -> Backend:
    """The back-end that the config names."""
    match settings.backend:
        case "process":
            return ProcessBackend(run, settings, log)
        case "systemd":
            return SystemdBackend(settings)
        case "none":
            return ObservedBackend(settings)


def program_missing(settings: ServerSettings) -> str | None:
    """Why a server's command could not run, found before anything is started; None when it can."""
    if settings.backend != "process":
        return None
    program = settings.command[0]
    where = None if settings.cwd is None else str(settings.cwd)
    if where is not None and not Path(where).is_dir():
        return f"servers.cwd: {where} is no folder"
    candidate = program if where is None or "/" not in program else os.path.join(where, program)  # noqa: PTH118
    if shutil.which(candidate) is None:
        return f"servers.command: {program} is not found or cannot be executed"
    return None


def _taken(port: int) -> str:
    owner = proc.port_owner(port)
    who = "a process that cannot be read" if owner is None else f"pid {owner}"
    return f"port {port} is held by {who}; end it, or choose another in servers.url and servers.command"


def port_of(url: str) -> int | None:
    """The port of a server on this machine; None for one that is elsewhere."""
    parts = urlsplit(url)
    if parts.hostname not in {"127.0.0.1", "localhost", "::1"}:
        return None
    return parts.port or (443 if parts.scheme == "https" else 80)
