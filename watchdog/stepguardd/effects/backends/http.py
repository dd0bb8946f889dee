"""
A server that somebody else restarts when asked by HTTP: one URL, called for each stop and each start.

The hook gets `{"action", "server", "intent", "arguments"}` as JSON and answers 2xx once it is done (or, for a
start, begun). The same intent may come twice, after a crash of the daemon, and means the same act.
"""

from types import MappingProxyType

import aiohttp

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
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._timeout_s)) as http,
                http.post(self._hook, json=body, allow_redirects=False) as reply,
            ):
                status = reply.status
        except (aiohttp.ClientError, TimeoutError) as error:
            # The URL may carry a token: it is named by its key alone.
            return failed(f"servers.hook: {action} of {self._name}: {type(error).__name__}")
        if not 200 <= status < 300:
            return failed(f"servers.hook: {action} of {self._name}: HTTP {status}")
        return Outcome(ok=True, detail=f"the hook took {action}")
