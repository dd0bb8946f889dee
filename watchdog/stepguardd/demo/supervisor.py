"""
Somebody else's supervisor, as small as they come: it starts a server and starts it again when it ends.

It stands for a container's restart policy. It knows nothing of weights: what comes back is the base model.
"""

import asyncio
import os
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from .. import proc
from ..core.events import Proc
from ..effects.processes import end

_RESTART_AFTER_S: Final = 0.5
_GRACE_S: Final = 2.0
_END_TIMEOUT_S: Final = 10.0
_ROUNDS: Final = 3


class Supervisor:
    """
    Runs one server.

    Args:
        command: the server's program and arguments.
        log: where its output goes.
        restart: whether to start it again when it ends.
        environment: variables beside the caller's own.

    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        restart: bool,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = {**os.environ, **(environment or {})}
        self._command = list(command)
        self._log = log
        self._restart = restart
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._roots: list[Proc] = []
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """The server's parent process; None before the start and after the end."""
        child = self._child
        return None if child is None or child.poll() is not None else child.pid

    def start(self) -> None:
        """Start the server, and a thread that starts it again."""
        self._spawn()
        if self._restart:
            threading.Thread(target=self._look_after, name="supervisor", daemon=True).start()

    def stop(self) -> None:
        """End the server for good, and what an earlier one left behind. Idempotent."""
        self._ending.set()
        with self._lock:
            roots, child = list(self._roots), self._child
        end_trees(roots)
        if child is not None:
            child.wait(_END_TIMEOUT_S)

    def _look_after(self) -> None:
        while not self._ending.is_set():
            child = self._child
            if child is not None and child.poll() is not None and not self._ending.wait(_RESTART_AFTER_S):
                self._spawn()
            self._ending.wait(0.1)

    def _spawn(self) -> None:
        with self._lock, self._log.open("ab") as log:
            if self._ending.is_set():
                return
            self._child = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.starts += 1
            self._roots.append(rooted_at(self._child))


def rooted_at(child: subprocess.Popen[bytes]) -> Proc:
    """A child that nobody has waited for yet, by pid and start time: the root of a tree."""
    started = proc.stat(child.pid)
    assert started is not None, "a child is there until its parent has waited for it"
    return Proc(pid=started.pid, start_ticks=started.start_ticks, role="child")


def end_trees(roots: Iterable[Proc]) -> None:
    """
    End processes and all that belongs to them, whoever has adopted it by now. Blocks until they have ended.

    A server that is interrupted while it starts leaves children: multiprocessing's resource tracker is deaf
    to SIGTERM, and a scheduler that is still importing does not look for its parent yet.
    In rounds: a tree that is told to end may still start a process.
    """
    known, grace_s = tuple(roots), _GRACE_S
    for _ in range(_ROUNDS):
        tree = proc.trees({root.pid for root in known if proc.unmistaken(root)})
        if not tree:
            return
        # In a thread of its own: the caller may have a loop that runs.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, end(tree, grace_s=grace_s, timeout_s=_END_TIMEOUT_S)).result()
        grace_s = 0.0
