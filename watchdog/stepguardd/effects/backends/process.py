"""The server as the daemon's child: captured output, found again by a mark in its environment."""

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ... import proc
from ...config import ServerSettings
from ...core.events import Proc
from ...failpoint import failpoint
from ..outcome import Outcome, failed
from ..processes import end
from .contract import NO_DUMPS, PORT_FREE_S, Arguments, overlaid, port_freed, port_of, rooted, taken

SERVER_MARK: Final = "STEPGUARD_SERVER"
INTENT_MARK: Final = "STEPGUARD_INTENT"
LOG_BYTES_MAX: Final = 64 << 20

_EARLY_DEATH_S: Final = 0.2
_STOP_ROUNDS: Final = 3


class ProcessBackend:
    """
    The server as the daemon's child, in a session of its own: it outlives the daemon and is found again.

    Args:
        run: what names the run on this machine.
        settings: the server's table of the config.
        log: where its output goes.

    """

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
        return rooted(self._known)

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

    async def start(self, intent: str, arguments: Arguments = MappingProxyType({})) -> Outcome:
        """Start it, unless this intent already has."""
        ours = proc.marked(INTENT_MARK, f"{self._mark}/{intent}")
        if ours:
            self._known = ours
            return Outcome(ok=True, detail="found running", procs=ours)
        if self._port is not None and proc.port_taken(self._port):
            return failed(taken(self._port))
        try:
            child = self._spawn(intent, arguments)
        except OSError as error:
            program = self._settings.command[0]
            return failed(f"cannot start {program}: {error.strerror or error}; check servers.command and cwd")
        failpoint("start_spawned")
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
            left = await end(tree, grace_s=grace_s, timeout_s=PORT_FREE_S)
            self._reap()
            if left:
                return failed("pids " + ", ".join(str(known.pid) for known in left) + " survive SIGKILL")
            ended += len(tree)
            failpoint("stop_ended_tree")
            grace_s, tree = 0.0, self._whole(tree)
            if not tree:
                break
        if not await port_freed(self._port):
            return failed(taken(self._port or 0))
        self._known = ()
        return Outcome(ok=True, detail=f"{ended} processes ended")

    def blocked(self) -> str | None:
        """Who else holds the server's port; None when it is free or the server's own."""
        if self._port is None or not proc.port_taken(self._port):
            return None
        ours = (known.pid for known in self.find())
        return None if proc.listening(self._port, ours) is not None else taken(self._port)

    def _whole(self, procs: tuple[Proc, ...]) -> tuple[Proc, ...]:
        """What lives of these processes, of their trees and sessions, and of all that carries our mark."""
        roots = (*procs, *proc.marked(SERVER_MARK, self._mark))
        return proc.trees({known.pid for known in roots if proc.unmistaken(known)})

    def _spawn(self, intent: str, arguments: Arguments) -> subprocess.Popen[bytes]:
        settings = self._settings
        environment = {**os.environ, **NO_DUMPS, **settings.environment()}
        environment[SERVER_MARK] = self._mark
        environment[INTENT_MARK] = f"{self._mark}/{intent}"
        self._rotate()
        with self._log.open("ab") as log:
            child = subprocess.Popen(
                overlaid(settings.command, arguments),
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


def _once(procs: tuple[Proc, ...]) -> tuple[Proc, ...]:
    """Each process once, whatever role it was seen in."""
    return tuple({(known.pid, known.start_ticks): known for known in procs}.values())


def program_missing(settings: ServerSettings) -> str | None:
    """Why a server's command could not run, found before anything is started; None when it can."""
    if settings.backend != "process" or settings.node is not None:
        return None
    program = settings.command[0]
    where = None if settings.cwd is None else str(settings.cwd)
    if where is not None and not Path(where).is_dir():
        return f"servers.cwd: {where} is no folder"
    candidate = program if where is None or "/" not in program else os.path.join(where, program)  # noqa: PTH118
    if shutil.which(candidate) is None:
        return f"servers.command: {program} is not found or cannot be executed"
    return None
