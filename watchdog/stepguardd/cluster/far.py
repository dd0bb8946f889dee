"""
A server on another machine, as the head has it: the agent there starts it, ends it and tells of it.

The intent is in the head's journal before anything is asked, and the act is the agent's back-end's: an ensure
that finds by the mark in a process's environment what was begun under the same intent. So a head or an agent
that is killed on the way costs a second asking and never a second server.
"""

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from ..config import ServerSettings
from ..core.events import Proc
from ..effects.backends.contract import Arguments
from ..effects.outcome import Outcome, failed
from .wire import WireError

PROCS: Final = TypeAdapter(tuple[Proc, ...])

Ask = Callable[[str, Mapping[str, object], float], Awaitable[Mapping[str, Any]]]
"""Has a node's agent do something: node, message, seconds that it may take while it is connected."""


class NotDoneError(Exception):
    """An agent did not say that it is done; the message says why."""


class FarBackend:
    """
    The agent of another machine.

    Args:
        settings: the server's table of the config, with a `node`.
        ask: has the agent do it; raises NotDoneError.

    """

    quick = True

    def __init__(self, settings: ServerSettings, ask: Ask) -> None:
        assert settings.node is not None
        self._node, self._name, self._ask = settings.node, settings.name, ask
        # As long as the core waits for either.
        self._stop_s, self._start_s = 4 * settings.stop_timeout_s, settings.start_timeout_s

    def find(self) -> tuple[Proc, ...]:
        """None that can be seen from here: a pid of another machine means nothing on this one."""
        return ()

    async def start(self, intent: str, arguments: Arguments = MappingProxyType({})) -> Outcome:
        """Have it started; while its machine is away, the asking waits."""
        return await self._do("start", self._start_s, intent=intent, arguments=dict(arguments))

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """Have it ended; while its machine is away, the asking waits."""
        return await self._do("stop", self._stop_s, procs=procs)

    async def resume(self, procs: tuple[Proc, ...]) -> Outcome:
        """Have SIGCONT sent."""
        return await self._do("continue", self._stop_s, procs=procs)

    async def _do(
        self,
        verb: str,
        timeout_s: float,
        *,
        procs: tuple[Proc, ...] = (),
        intent: str = "",
        arguments: Mapping[str, str] = MappingProxyType({}),
    ) -> Outcome:
        asked: dict[str, object] = {"kind": "do", "verb": verb, "server": self._name, "intent": intent}
        asked |= {"arguments": dict(arguments), "procs": PROCS.dump_python(procs, mode="json")}
        try:
            return outcome_of(await self._ask(self._node, asked, timeout_s))
        except (NotDoneError, WireError) as error:
            return failed(f"node {self._node}: {error}")


class FarProcesses:
    """The processes of such a server, which its agent watches: nothing is to be done about them here."""

    def look(self) -> None:
        """Nothing to look at."""

    def adopt(self, procs: tuple[Proc, ...], *, tell: bool = False) -> None:
        """Nothing to watch."""

    def sample(self) -> None:
        """Nothing to read."""

    def tell(self) -> None:
        """Nothing to tell: its agent does."""

    def close(self) -> None:
        """Nothing is open."""


def message_of(outcome: Outcome) -> dict[str, object]:
    """How an act ended, as a message."""
    return {
        "kind": "done",
        "ok": outcome.ok,
        "detail": outcome.detail,
        "procs": PROCS.dump_python(outcome.procs, mode="json"),
        "kept_arguments": outcome.kept_arguments,
    }


def outcome_of(message: Mapping[str, Any]) -> Outcome:
    """How an act ended; raises WireError for a message that does not say."""
    ok, detail, kept = message.get("ok"), message.get("detail"), message.get("kept_arguments")
    if type(ok) is not bool or not isinstance(detail, str) or not (kept is None or isinstance(kept, str)):
        raise WireError("its agent tells of no outcome")
    return Outcome(ok=ok, detail=detail[:2000], procs=procs_of(message), kept_arguments=kept and kept[:2000])


def procs_of(message: Mapping[str, Any]) -> tuple[Proc, ...]:
    """The processes in a message; raises WireError."""
    try:
        return PROCS.validate_python(message.get("procs"))
    except ValidationError:
        raise WireError("a process that is none") from None
