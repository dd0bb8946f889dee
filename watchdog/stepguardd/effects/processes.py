"""Signals to processes, through pidfds: what is signalled is what was meant, whatever became of its pid."""

import asyncio
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from .. import proc
from ..core.events import Proc
from .outcome import Outcome

_POLL_S: Final = 0.02


def send(procs: Iterable[Proc], what: signal.Signals) -> int:
    """Signal each process that still lives; returns how many there were."""
    sent = 0
    for known in procs:
        with suppress(OSError):
            fd = os.pidfd_open(known.pid)
            try:
                if proc.alive(known):
                    signal.pidfd_send_signal(fd, what)
                    sent += 1
            finally:
                os.close(fd)
    return sent


async def gone(procs: Iterable[Proc], timeout_s: float) -> tuple[Proc, ...]:
    """Wait until these processes have ended; returns those that have not in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    left = tuple(procs)
    while True:
        left = tuple(known for known in left if proc.alive(known))
        if not left or loop.time() >= deadline:
            return left
        await asyncio.sleep(_POLL_S)


async def end(procs: tuple[Proc, ...], *, grace_s: float, timeout_s: float) -> tuple[Proc, ...]:
    """
    End processes: TERM and a grace where all of them still can act on it, then KILL.

    A tree with a dead or stopped member cannot drain: SGLang's parent would wait for the rest of it, and a
    TERM only gives that wait a name.

    Returns:
        Those that would not end.

    """
    stats = [proc.stat(known.pid) for known in procs]
    whole = all(found is not None and not found.dead and not found.stopped for found in stats)
    if whole and grace_s > 0:
        send(procs, signal.SIGTERM)
        await gone(procs, grace_s)
    send(procs, signal.SIGKILL)
    return await gone(procs, timeout_s)


async def resume(procs: tuple[Proc, ...]) -> Outcome:
    """Send SIGCONT. Whether it helped, the next sample of /proc tells."""
    sent = send(procs, signal.SIGCONT)
    return Outcome(ok=sent > 0, detail=f"SIGCONT sent to {sent} of {len(procs)} processes")
