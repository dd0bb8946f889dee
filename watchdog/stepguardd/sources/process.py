"""
The processes of a server or a trainer, watched by the kernel's own word.

A pidfd becomes readable in the moment its process ends: no polling, and no mistaken identity, since it is
opened for a pid *and* start time.
What a pidfd cannot tell (stopped, new children, CPU time) is read from /proc at an interval.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress

from .. import proc
from ..core.events import Event, Proc, ProcessExited, TreeSampled, TreeSeen

Emit = Callable[[Event], None]


class ExitWatch:
    """
    Calls back when one of a set of processes ends. Belongs to the running event loop.

    Args:
        on_exit: called once for each process that ended, with its exit code where it was our child.

    """

    def __init__(self, on_exit: Callable[[Proc, int | None], None]) -> None:
        self._on_exit = on_exit
        self._fds: dict[Proc, int] = {}

    @property
    def watched(self) -> frozenset[Proc]:
        """The processes watched now."""
        return frozenset(self._fds)

    def watch(self, wanted: frozenset[Proc]) -> None:
        """Watch exactly these; one that is gone already is reported before this returns."""
        for gone in [known for known in self._fds if known not in wanted]:
            self._forget(gone)
        for new in wanted - self._fds.keys():
            self._add(new)

    def close(self) -> None:
        """Watch nothing any more."""
        self.watch(frozenset())

    def _add(self, new: Proc) -> None:
        try:
            fd = os.pidfd_open(new.pid)
        except OSError:
            self._on_exit(new, None)
            return
        # Only now is the pid pinned: what it names has to be looked at after the open.
        if not proc.alive(new):
            os.close(fd)
            self._on_exit(new, None)
            return
        self._fds[new] = fd
        asyncio.get_running_loop().add_reader(fd, self._ended, new)

    def _ended(self, ended: Proc) -> None:
        fd = self._fds.get(ended)
        if fd is None:
            return
        # The news first, the tidying after: somebody is about to take an optimizer step.
        self._on_exit(ended, _code(fd))
        self._forget(ended)

    def _forget(self, known: Proc) -> None:
        fd = self._fds.pop(known, None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)


def _code(fd: int) -> int | None:
    """The exit code of our own child, reaping it; None for anybody else's."""
    with suppress(ChildProcessError, OSError):
        ended = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
        if ended is not None:
            killed = ended.si_code in {os.CLD_KILLED, os.CLD_DUMPED}
            return -ended.si_status if killed else ended.si_status
    return None


class ServerProcesses:
    """
    One server's tree: found by its root, watched by pidfd, sampled from /proc.

    Args:
        server: the server's name.
        find: looks for the server's live processes on the machine, the root first.
        emit: where the events go.

    """

    def __init__(self, server: str, find: Callable[[], tuple[Proc, ...]], emit: Emit) -> None:
        self.server = server
        self._find = find
        self._emit = emit
        self._procs: tuple[Proc, ...] = ()
        self._exits = ExitWatch(self._exited)

    def look(self) -> None:
        """Find the tree afresh: new children, or a server that somebody else started."""
        self.adopt(self._find(), tell=True)

    def adopt(self, procs: tuple[Proc, ...], *, tell: bool = False) -> None:
        """Watch these processes from now on."""
        changed = procs != self._procs
        self._procs = procs
        if tell and (changed or not procs):
            self._emit(TreeSeen(server=self.server, procs=procs))
        self._exits.watch(frozenset(procs))

    def tell(self) -> None:
        """Say once more what is watched, to one who has not heard it."""
        self._emit(TreeSeen(server=self.server, procs=self._procs))

    def sample(self) -> None:
        """Read each process's state and CPU time."""
        stats = [found for known in self._procs if (found := proc.stat(known.pid)) is not None]
        if stats:
            self._emit(
                TreeSampled(
                    server=self.server,
                    stopped=tuple(found.pid for found in stats if found.stopped),
                    cpu_s=sum(found.cpu_s for found in stats),
                    uninterruptible=tuple(found.pid for found in stats if found.uninterruptible),
                )
            )

    def close(self) -> None:
        """Stop watching; the processes are left as they are."""
        self._exits.close()

    def _exited(self, ended: Proc, code: int | None) -> None:
        self._emit(ProcessExited(server=self.server, proc=ended, code=code))
