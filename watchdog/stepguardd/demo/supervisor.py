"""
Somebody else's supervisor, as small as they come: it starts a server and starts it again when it ends.

It stands for a container's restart policy. It knows nothing of weights: what comes back is the base model.
"""

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

_RESTART_AFTER_S: Final = 0.5
_END_TIMEOUT_S: Final = 10.0


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
        """End the server for good. Idempotent."""
        self._ending.set()
        with self._lock:
            child = self._child
        if child is None or child.poll() is not None:
            return
        child.terminate()
        try:
            child.wait(2.0)
        except subprocess.TimeoutExpired:
            child.kill()
            with suppress(subprocess.TimeoutExpired):
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
