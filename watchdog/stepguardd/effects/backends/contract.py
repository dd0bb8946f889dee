"""
What every back-end promises, and the few things that all of them share.

Each back-end finds its server on the machine by itself (a mark in the environment, a unit, a container, a
port), so what a daemon that died had begun is found again, and not begun twice.
"""

import asyncio
from collections.abc import Mapping
from typing import Final, Protocol
from urllib.parse import urlsplit

from ... import proc
from ...core.events import Proc
from ..outcome import Outcome

Arguments = Mapping[str, str]
"""SGLang's flags that are to have another value than the server's own command gives them."""

# SGLang's dumps before a crash keep HTTP a black hole for a minute (research on 0.5.23).
NO_DUMPS: Final = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}
PORT_FREE_S: Final = 10.0
COMMAND_TIMEOUT_S: Final = 90.0


class Backend(Protocol):
    """Who owns a server, and how it is asked to start and to end."""

    @property
    def quick(self) -> bool:
        """Whether `find` takes a millisecond now; else it looks at the whole machine, or runs a command."""

    def find(self) -> tuple[Proc, ...]:
        """The server's live processes, the root first; empty when there is none, or none that can be seen."""

    async def start(self, intent: str, arguments: Arguments) -> Outcome:
        """
        See that the server runs, started once for this intent.

        Args:
            intent: what the start is found again by.
            arguments: flags that are to have another value than usual.

        Returns:
            The outcome, with the server's processes where they can be seen. Where the arguments could not be
            changed it says so and the server runs with its own.

        """

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """See that the server's whole tree, these processes included, is gone and its port free."""


def overlaid(command: tuple[str, ...], arguments: Arguments) -> tuple[str, ...]:
    """
    A command line with some flags given another value: in place where it has them, else at its end.

    Both spellings are known, `--flag value` and `--flag=value`.
    """
    line = list(command)
    for flag, value in arguments.items():
        at = [i for i, word in enumerate(line) if word == flag or word.startswith(f"{flag}=")]
        for index in at:
            if line[index] != flag:
                line[index] = f"{flag}={value}"
            elif index + 1 < len(line):
                line[index + 1] = value
        if not at:
            line += [flag, value]
    return tuple(line)


def value_of(command: tuple[str, ...], flag: str) -> str | None:
    """What a command line gives a flag, the last time that it does; None where it does not."""
    found = None
    for index, word in enumerate(command):
        if word == flag and index + 1 < len(command):
            found = command[index + 1]
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def rooted(known: tuple[Proc, ...]) -> bool:
    """Whether the root of what was found still lives."""
    return bool(known) and proc.alive(known[0])


async def port_freed(port: int | None, timeout_s: float = PORT_FREE_S) -> bool:
    """Wait until nobody listens on a port any more; at once for a server on another machine."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while port is not None and proc.port_taken(port):
        if loop.time() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


def taken(port: int) -> str:
    """Who holds a port, in words with the remedy."""
    owner = proc.port_owner(port)
    who = "a process that cannot be read" if owner is None else f"pid {owner}"
    return f"port {port} is held by {who}; end it, or choose another in servers.url and servers.command"


def port_of(url: str) -> int | None:
    """The port of a server on this machine; None for one that is elsewhere."""
    parts = urlsplit(url)
    if parts.hostname not in {"127.0.0.1", "localhost", "::1"}:
        return None
    return parts.port or (443 if parts.scheme == "https" else 80)
