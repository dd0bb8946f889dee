"""
An actor that holds a server as a child of its worker, as slime's engines do, and who made it.

In a module of its own: Ray's workers import it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Any


class Holder:
    """Starts the server and keeps it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._server = subprocess.Popen(command)

    def worker(self) -> int:
        """The pid of this worker."""
        return os.getpid()


class Engine:
    """
    One actor, as whoever made it sees it.

    Args:
        name: the actor's.
        command: the server's.
        options: Ray's, beside the name.

    """

    def __init__(self, name: str, command: Sequence[str], **options: Any) -> None:
        import ray  # only where a cluster runs

        given = {"num_cpus": 0, "name": name, "namespace": "runs"} | options
        self._ray = ray
        self._handle = ray.remote(Holder).options(**given).remote(list(command))
        self.worker: int = ray.get(self._handle.worker.remote(), timeout=120)

    def lives(self) -> bool:
        """Whether it answers; False once Ray says that it is dead."""
        try:
            self._ray.get(self._handle.worker.remote(), timeout=60)
        except self._ray.exceptions.RayActorError:
            return False
        return True

    def end(self) -> None:
        """For good."""
        self._ray.kill(self._handle, no_restart=True)
