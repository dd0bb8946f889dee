"""
A server that somebody else restarts when asked by HTTP: one URL, called for each stop and each start.

The hook gets `{"action", "server", "intent", "arguments"}` as JSON and answers 2xx once it is done (or, for a
start, begun). The same intent may come twice, after a crash of the daemon, and means the same act.
"""

from types import MappingProxyType

import httpx

from ...config import ServerSettings
from ...core.events import Proc
from ..outcome import Outcome, failed
from ..processes import gone
from .contract import PORT_FREE_S, Arguments, port_freed, taken
from .none import ObservedBackend


class HookBackend(ObservedBackend):
    """
    A hook.

    Args:
        settings: the server's table of the config.

    """

    def __init__(self, settings: ServerSettings) -> None:
        super().__init__(settings)
        assert settings.hook is not None
        self._hook = settings.hook.get_secret_value()
        self._name = settings.name
        self._timeout_s = settings.stop_timeout_s + PORT_FREE_S

    async def start(self, intent: str, arguments: Arguments = MappingProxyType({})) -> Outcome:
        """Ask for it; that it serves is for the probes to see."""
        return await self._ask("start", intent, arguments)

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """Ask for it, and see its processes and its port gone where they are on this machine."""
        outcome = await self._ask("stop", "", {})
        if not outcome.ok:
            return outcome
        left = await gone(procs, self._timeout_s)
        if left:
            return failed(
                f"its hook said yes, and pid {left[0].pid} still runs after {self._timeout_s:.0f} s"
            )
        if not await port_freed(self._port):
            return failed(taken(self._port or 0))
        self._known = ()
        return outcome

    async def _ask(self, action: str, intent: str, arguments: Arguments) -> Outcome:
        body = {"action": action, "server": self._name, "intent": intent, "arguments": dict(arguments)}
        try:
            async with httpx.AsyncClient(timeout=self._timeout_s, trust_env=False) as http:
                reply = await http.post(self._hook, json=body)
        except httpx.HTTPError as error:
            # The URL may carry a token: it is named by its key alone.
            return failed(f"servers.hook: {action} of {self._name}: {type(error).__name__}")
        if not reply.is_success:
            return failed(f"servers.hook: {action} of {self._name}: HTTP {reply.status_code}")
        return Outcome(ok=True, detail=f"the hook took {action}")
