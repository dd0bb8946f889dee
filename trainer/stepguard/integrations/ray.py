"""
Ray actors that hang: what `Guard.call(ref, timeout_s=…, or_kill=actor)` does once the time is over.

Promise: the call is cancelled first, which ends a coroutine of an asynchronous actor and spares the actor.
Where the call runs on all the same, Ray kills the actor; its own restarts, where it has any, are welcome.
Ray's kill leaves a stopped process behind, so on this machine the worker's process is looked for and ended,
held by a pidfd from before the kill so that no other process can have its number.

Not promised: the hunt on another machine; there Ray's own kill is all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnschedulableError, RayActorError, RayError

from stepguard.calls import Fate, take_note

_KILL_S: Final = 10.0
_GONE_S: Final = 2.0

log = logging.getLogger("stepguard")


class RayActorEnd:
    """
    The end of one actor; an `ActorEnd`.

    Args:
        actor: its handle.

    """

    def __init__(self, actor: Any) -> None:
        if not isinstance(actor, ActorHandle):
            raise TypeError(f"or_kill takes the handle of a Ray actor, not a {type(actor).__name__}")
        self._actor = actor

    def gone(self, error: BaseException) -> bool:
        """Whether the actor is dead or out of reach."""
        return isinstance(error, RayActorError | ActorUnschedulableError)

    async def ends_when_cancelled(self, call: object, wait_s: float = 1.0) -> bool:
        """Cancel an object reference, and see whether it ends; anything else is only waited out."""
        if not isinstance(call, ray.ObjectRef):
            await asyncio.sleep(wait_s)
            return False
        try:
            await asyncio.wait_for(asyncio.to_thread(ray.cancel, call), wait_s)
        except (TimeoutError, RayError, TypeError, ValueError, RuntimeError) as error:
            log.debug("the call could not be cancelled: %s", error)
        answer = asyncio.wrap_future(call.future())
        answer.add_done_callback(take_note)
        ended, _ = await asyncio.wait({answer}, timeout=wait_s)
        return bool(ended)

    async def kill(self) -> Fate:
        """Kill it, and see its process gone where it is on this machine; takes some seconds at most."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(_kill, self._actor), _KILL_S)
        except TimeoutError:
            log.error("Ray did not answer to the kill of %r within %g s", self._actor, _KILL_S)
            return Fate.LEFT


def _kill(actor: Any) -> Fate:
    with _worker_of(actor) as worker:
        try:
            ray.kill(actor, no_restart=False)
        except (RayError, ValueError, RuntimeError) as error:
            log.error("%r could not be killed: %s", actor, error)
            if worker is None:
                return Fate.LEFT
        if worker is None:
            return Fate.KILLED
        if not _gone(worker):
            log.warning("Ray killed %r and its process stayed: SIGKILL", actor)
            signal.pidfd_send_signal(worker, signal.SIGKILL)
        return Fate.KILLED if _gone(worker) else Fate.LEFT


@contextmanager
def _worker_of(actor: Any) -> Iterator[int | None]:
    """A pidfd of the actor's process; None where it is on another machine, or Ray does not say."""
    pidfd = _opened(actor)
    try:
        yield pidfd
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _opened(actor: Any) -> int | None:
    try:
        # Ray's public state API needs its dashboard; the table below it is there in every cluster.
        from ray._private.state import actors  # noqa: PLC0415 - it may be gone in the next release

        row = actors(actor._actor_id.hex())
        pid, node = int(row["Pid"]), row["Address"]["NodeID"]
        if node != ray.get_runtime_context().get_node_id() or pid <= 0:
            return None
        pidfd = os.pidfd_open(pid)
    except (ImportError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, OSError) as error:
        log.debug("the process of the actor %r was not found: %s: %s", actor, type(error).__name__, error)
        return None
    try:
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            return pidfd
    except OSError:
        pass
    os.close(pidfd)
    return None


def _gone(pidfd: int) -> bool:
    """Whether the process ends within a while."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(_GONE_S * 1000))
