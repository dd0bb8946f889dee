"""
A server inside a Ray actor that the trainer makes again when it is gone, as slime and NeMo-RL do.

The actor is killed by name; whoever made it makes it anew, or Ray does where the actor has restarts left. Ray
itself is imported by a process of its own (`ray_actor`), which may hang or fail as it likes.
"""

import asyncio
import sys
from types import MappingProxyType
from typing import Final

from ...config import ServerSettings
from ...core.events import Proc
from ..outcome import Outcome, failed
from ..processes import end, gone
from ..programs import ask
from .contract import PORT_FREE_S, Arguments, port_freed, taken
from .none import ObservedBackend

_TIMEOUT_S: Final = 60.0
_BY_RAY_S: Final = 2.0


class RayBackend(ObservedBackend):
    """
    An actor.

    Args:
        settings: the server's table of the config.

    """

    def __init__(self, settings: ServerSettings) -> None:
        super().__init__(settings)
        assert settings.actor is not None
        self._actor = settings.actor
        self._address = settings.ray_address
        self._namespace = settings.ray_namespace

    async def start(self, intent: str, arguments: Arguments = MappingProxyType({})) -> Outcome:
        """The trainer's to do; that it serves again is for the probes to see."""
        del intent
        return Outcome(
            ok=True,
            detail=f"the trainer is to make the actor {self._actor} again",
            kept_arguments="they are the trainer's" if arguments else None,
        )

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """
        Kill the actor, and end its processes where they are on this machine.

        Ray's kill leaves a stopped process, and a server whose actor died before it, where they are.
        """
        procs = procs or await asyncio.to_thread(self.find)
        command = [sys.executable, "-m", "stepguardd.effects.backends.ray_actor"]
        command += [self._address, self._namespace, self._actor]
        done = await ask(*command, timeout_s=_TIMEOUT_S, shown=f"ray kill {self._actor}")
        if not done.ok:
            return failed(done.trouble)
        await gone(procs, _BY_RAY_S)
        left = await end(procs, grace_s=0.0, timeout_s=PORT_FREE_S)
        if left:
            return failed(f"the actor {self._actor} was killed, and pid {left[0].pid} of it still runs")
        # Whoever listens now and was not there before is the next one, made already.
        if not procs and not await port_freed(self._port):
            return failed(taken(self._port or 0))
        self._known = ()
        return Outcome(ok=True, detail=done.out.splitlines()[-1] if done.out else "killed")
