"""A server that somebody else starts and ends: found by its port, and only watched."""

from types import MappingProxyType

from ... import proc
from ...config import ServerSettings
from ...core.events import Proc
from ..outcome import Outcome, failed
from .contract import Arguments, port_of, rooted


class ObservedBackend:
    """
    Only watched.

    Args:
        settings: the server's table of the config.

    """

    def __init__(self, settings: ServerSettings) -> None:
        self._port = port_of(settings.url)
        self._known: tuple[Proc, ...] = ()

    @property
    def quick(self) -> bool:
        """While it lives."""
        return rooted(self._known)

    def find(self) -> tuple[Proc, ...]:
        """The tree of whoever listens on the port; on another machine there is none to see."""
        self._known = proc.family(self._known) or self._listening()
        return self._known

    def _listening(self) -> tuple[Proc, ...]:
        owner = None if self._port is None else proc.port_owner(self._port)
        return () if owner is None else proc.tree(owner)

    async def start(self, intent: str, arguments: Arguments = MappingProxyType({})) -> Outcome:
        """Not ours to start."""
        del intent, arguments
        return failed("this server is only observed")

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """Not ours to end."""
        del procs
        return failed("this server is only observed")
