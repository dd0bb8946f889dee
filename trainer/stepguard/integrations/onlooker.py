"""
A second process of a trainer that has its guard elsewhere: it obeys the gate and shows nothing.

Where rollouts and optimizer steps live in different processes (slime's RolloutManager and Megatron ranks),
the guard is in the first, and each rank of the second looks at the same page before its step. Promise: HOLD
waits, STOP and ROLLBACK raise; RESYNC and SAVE pass, because the guard's process carries them out, and it
may be waiting for this very step. Without a page, or with the daemon gone on GO, it does as the guard does.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from stepguard.gate import Order
from stepguard.guard import RUN_DIR_VARIABLE
from stepguard.link import Link, OnceLog
from stepguard.orders import Go, Hold, RollbackRequested, Stop, StopRequested, next_act
from stepguard.ranks import Broadcast, Ranks
from stepguard.settings import GuardSettings

_POLL_S: Final = 0.05
_SHARED_POLL_S: Final = 1.0
_EVERY_ORDER: Final = 1 << 62

log = logging.getLogger("stepguard")
Word = tuple[str, str, int | None, str | None]
"""go, hold, stop or rollback; the reason; the target's step and path."""


class Onlooker:
    """
    Waits at the gate in a process that is not the guard's.

    Args:
        run_dir: where the page is; None: there is no gate.
        rank: of this process; rank 0 alone looks.
        world: how many ranks.
        broadcast: as for `Guard`; without it every process with a page looks for itself.
        clock_ns: CLOCK_MONOTONIC.
        sleep: how to wait.
        boot_id: 16 bytes, for tests.

    """

    def __init__(
        self,
        run_dir: Path | str | None,
        *,
        rank: int = 0,
        world: int = 1,
        broadcast: Broadcast | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
        boot_id: bytes | None = None,
    ) -> None:
        place = None if run_dir is None else Path(run_dir)
        self._ranks = Ranks(rank=rank, world=world, broadcast=broadcast)
        looks = rank == 0 or not self._ranks.together
        self._link = Link(place if looks else None, log=OnceLog(log), boot_id=boot_id, writable=False)
        self._settings = GuardSettings() if place is None else GuardSettings.read(place)[0]
        self._clock_ns = clock_ns
        self._sleep = sleep

    @classmethod
    def from_env(cls, *, rank: int = 0, world: int = 1, broadcast: Broadcast | None = None) -> Onlooker:
        """The onlooker that STEPGUARD_RUN_DIR asks for."""
        return cls(os.environ.get(RUN_DIR_VARIABLE) or None, rank=rank, world=world, broadcast=broadcast)

    def before_step(self, step: int) -> None:
        """
        Return on GO, wait while HOLD; collective where ranks decide together.

        Raises:
            StopRequested: ordered, or held for longer than `orphan_hold_s` with nobody to lift it.
            RollbackRequested: ordered; this process cannot reload, the run ends and is resumed.

        """
        since_ns: int | None = None
        while True:
            kind, reason, target_step, target_path = self._ranks.share(self._look(since_ns))
            if kind == "go":
                if since_ns is not None:
                    log.warning("going on after %.1f s on hold", (self._clock_ns() - since_ns) / 1e9)
                return
            if kind == "stop":
                raise StopRequested(reason)
            if kind == "rollback":
                raise RollbackRequested(target_step, target_path, reloaded=False)
            if since_ns is None:
                since_ns = self._clock_ns()
                log.warning("holding at step %s: %s", step, reason or "no reason given")
            self._sleep(_SHARED_POLL_S if self._ranks.together else _POLL_S)

    def close(self) -> None:
        """Let go of the page."""
        self._link.close()

    def _look(self, since_ns: int | None) -> Word:
        """What the page says now."""
        self._link.refresh()
        seen = self._link.daemon()
        if seen is not None and seen.order is Order.ROLLBACK:
            return "rollback", seen.reason, seen.target_step, seen.target_path
        if seen is not None and seen.order in (Order.RESYNC, Order.SAVE):
            return "go", "", None, None
        act = next_act(
            seen=seen,
            now_ns=self._clock_ns(),
            acked_generation=_EVERY_ORDER,
            held_since_ns=since_ns,
            self_held=None,
            settings=self._settings,
        )
        match act:
            case Stop(reason=reason):
                return "stop", reason, None, None
            case Hold(reason=reason):
                return "hold", reason, None, None
            case _:
                assert isinstance(act, Go)
                return "go", "", None, None
