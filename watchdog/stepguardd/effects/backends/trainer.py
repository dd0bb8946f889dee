"""
A server that lives inside the trainer, as verl's does: only the trainer can make it anew.

It is asked to by the order RESYNC, which is the core's to give; nothing is started or ended from here.
"""

from types import MappingProxyType

from ...core.events import Proc
from ..outcome import Outcome
from .contract import Arguments
from .none import ObservedBackend


class TrainerBackend(ObservedBackend):
    """Found by its port where that is on this machine, and rebuilt by the trainer."""

    async def start(self, intent: str, arguments: Arguments = MappingProxyType({})) -> Outcome:
        """The trainer's to do, under the order RESYNC."""
        del intent, arguments
        return Outcome(ok=True, detail="the trainer is to make it anew")

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """Nothing: ending the process would end the trainer."""
        del procs
        return Outcome(ok=True, detail="left to the trainer")
