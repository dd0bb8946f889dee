"""
The server as a container, by the command line of docker (or podman, whose words are the same).

With `command` the container is Stepguard's own: made by `docker run` for each start, so its arguments can be
changed. Without, it is somebody's container of that name, started and stopped as it is.
"""

import asyncio
import json
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

from ... import proc
from ...config import ServerSettings
from ...core.events import Proc
from ..outcome import Outcome, failed
from ..processes import gone
from ..programs import Answered, ask
from .contract import (
    COMMAND_TIMEOUT_S,
    NO_DUMPS,
    PORT_FREE_S,
    Arguments,
    overlaid,
    port_freed,
    port_of,
    rooted,
    taken,
)

INTENT_LABEL: Final = "stepguard.intent"
SERVER_LABEL: Final = "stepguard.server"
_SAME_START_S: Final = 5.0
_INSPECT_TIMEOUT_S: Final = 5.0


class DockerBackend:
    """
    A container.

    Args:
        run: what names the run on this machine.
        settings: the server's table of the config.
        docker: the program.

    """

    def __init__(self, run: str, settings: ServerSettings, docker: str = "docker") -> None:
        assert settings.container is not None
        self._settings = settings
        self._name = settings.container
        self._mark = f"{run}/{settings.name}"
        self._port = port_of(settings.url)
        self._docker = docker
        self._known: tuple[Proc, ...] = ()

    @property
    def quick(self) -> bool:
        """While its first process lives."""
        return rooted(self._known)

    def find(self) -> tuple[Proc, ...]:
        """
        The container's processes, seen from outside.

        None are seen where the daemon cannot see the machine's own: on another host, or inside a container.
        """
        self._known = proc.family(self._known) or self._inspected()
        return self._known

    def _inspected(self) -> tuple[Proc, ...]:
        command = [self._docker, "inspect", "--type", "container", self._name]
        try:
            shown = subprocess.run(
                command,
                capture_output=True,
                timeout=_INSPECT_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
                text=True,
            )
        except (OSError, subprocess.TimeoutExpired, ValueError):
            return ()
        return _processes(_state(shown.stdout))

    async def start(self, intent: str, arguments: Arguments = MappingProxyType({})) -> Outcome:
        """See it run: made anew where it is ours and this intent did not make it, else started as it is."""
        settings = self._settings
        if not settings.command:
            done = await self._ask("start", self._name)
            begun = await self._begun(done, f"docker start {self._name}")
            return replace(begun, kept_arguments="servers.command is empty") if arguments else begun
        shown = await self._ask("inspect", "--type", "container", self._name)
        if _label(shown.out) == f"{self._mark}/{intent}" and _state(shown.out).get("Running") is True:
            return await self._begun(shown, "found running")
        if shown.ok:
            removed = await self._ask("rm", "--force", self._name)
            if not removed.ok:
                return failed(removed.trouble)
        words = ["run", "--detach", "--name", self._name]
        words += [
            "--label",
            f"{INTENT_LABEL}={self._mark}/{intent}",
            "--label",
            f"{SERVER_LABEL}={self._mark}",
        ]
        for variable, value in {**NO_DUMPS, **settings.environment()}.items():
            words += ["--env", f"{variable}={value}"]
        done = await self._ask(*words, *overlaid(settings.command, arguments))
        return await self._begun(done, f"docker run {self._name}")

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """Stop the container; docker sends TERM, waits, and kills. One that is not there has stopped."""
        grace_s = self._settings.stop_timeout_s
        done = await self._ask(
            "stop", "--time", f"{grace_s:.0f}", self._name, timeout_s=grace_s + PORT_FREE_S
        )
        if not done.ok and "no such container" not in done.trouble.lower():
            return failed(done.trouble)
        left = await gone(procs, PORT_FREE_S)
        if left:
            return failed(f"the container has stopped, and pid {left[0].pid} of it still runs")
        if not await port_freed(self._port):
            return failed(taken(self._port or 0))
        self._known = ()
        return Outcome(ok=True, detail=f"docker stop {self._name}")

    async def _begun(self, done: Answered, detail: str) -> Outcome:
        if not done.ok:
            return failed(done.trouble)
        return Outcome(ok=True, detail=detail, procs=await asyncio.to_thread(self.find))

    async def _ask(self, *words: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Answered:
        shown = f"docker {words[0]} {self._name}"  # never the values of its environment
        return await ask(self._docker, *words, timeout_s=timeout_s, shown=shown)


def _inspection(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    first = found[0] if isinstance(found, list) and found else {}
    return first if isinstance(first, dict) else {}


def _state(text: str) -> Mapping[str, Any]:
    state = _inspection(text).get("State")
    return state if isinstance(state, dict) else {}


def _label(text: str) -> str | None:
    config = _inspection(text).get("Config")
    labels = config.get("Labels") if isinstance(config, dict) else None
    found = labels.get(INTENT_LABEL) if isinstance(labels, dict) else None
    return found if isinstance(found, str) else None


def _processes(state: Mapping[str, Any]) -> tuple[Proc, ...]:
    """The tree of the container's first process, if the pid that docker names is that very process here."""
    pid, started = state.get("Pid"), state.get("StartedAt")
    if not isinstance(pid, int) or pid <= 0 or not isinstance(started, str):
        return ()
    began = proc.started_at(pid)
    try:
        said = datetime.fromisoformat(started[:19] + "+00:00").timestamp()
    except ValueError:
        return ()
    if began is None or abs(began - said) > _SAME_START_S:
        return ()
    return proc.tree(pid)
