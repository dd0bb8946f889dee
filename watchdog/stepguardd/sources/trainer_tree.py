"""
The processes of a trainer that Stepguard starts: its tree, its ranks, and how it ended.

A rank is known by the variable RANK in its environment, as torchrun and its kin set it: that one of several
ended, while the others wait in a collective, shows in no exit code.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from .. import proc
from ..core.events import Event, Proc, TrainerExited, TrainerTree
from ..effects.trainer import TrainerBackend
from .process import ExitWatch

LOOK_INTERVAL_S: Final = 5.0


class TrainerProcesses:
    """
    Watches the trainer of a back-end.

    Args:
        backend: who owns it.
        emit: where the events go.
        before_exit: called before an exit is told: reports of the dead may still wait.

    """

    def __init__(
        self, backend: TrainerBackend, emit: Callable[[Event], None], before_exit: Callable[[], None]
    ) -> None:
        self.backend = backend
        self.changing = asyncio.Lock()
        self._emit = emit
        self._before_exit = before_exit
        self._exits = ExitWatch(self._exited)
        self._procs: tuple[Proc, ...] = ()
        self._ranks: dict[Proc, int] = {}
        self._changes = 0
        self._ran = False

    def adopt(self, procs: tuple[Proc, ...]) -> None:
        """These are its processes from now on."""
        self._changes += 1
        self._ran = self._ran or bool(procs)
        self._watch(procs)

    async def look(self) -> None:
        """Find the tree afresh; without one to see, ask its owner whether it runs."""
        before = self._changes
        procs = await asyncio.to_thread(self.backend.find)
        standing = None if procs else await self.backend.standing()
        if before != self._changes or self.changing.locked():
            return
        if standing is None:
            self._ran = True
            self._watch(procs)
            self._emit(TrainerTree(procs=procs))
        elif standing.running:
            self._ran = True
        elif standing.running is False and self._ran:
            self._ran = False
            self._watch(())
            self._before_exit()
            self._emit(TrainerExited(code=standing.code))
        elif standing.running is False:
            self._emit(TrainerTree(procs=()))

    async def keep_looking(self) -> None:
        """Look at an interval. Ends by cancellation."""
        while True:
            if not self.changing.locked():
                await self.look()
            await asyncio.sleep(LOOK_INTERVAL_S)

    def close(self) -> None:
        """Stop watching; the trainer is left as it is."""
        self._exits.close()

    def _watch(self, procs: tuple[Proc, ...]) -> None:
        if procs != self._procs:
            self._ranks = proc.ranks(procs)
        self._procs = procs
        wanted = {*self._ranks, *procs[:1]}
        self._exits.watch(frozenset(wanted))

    def _exited(self, ended: Proc, code: int | None) -> None:
        root = bool(self._procs) and ended == self._procs[0]
        if root:
            self._ran = False
        self._before_exit()
        self._emit(TrainerExited(pid=ended.pid, code=code, rank=None if root else self._ranks.get(ended)))
