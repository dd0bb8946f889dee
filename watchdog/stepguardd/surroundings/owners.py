"""Whose a process is or was: what is known of a pid from before its death."""

from dataclasses import dataclass
from typing import Final

from .. import proc
from ..core.events import Proc, Role
from ..core.state import State
from .host import THIS_HOST

DEAD_KNOWN_FOR_S: Final = 60.0
"""So long after it was last in a tree a pid still tells whose it was; later it may be another process."""


@dataclass(slots=True)
class _Owned:
    """A process of the run, living or dead: whose it is, and when it was last in a tree."""

    proc: Proc
    role: Role
    server: str | None
    seen_at: float


class Owners:
    """Whose process a pid was, known from before its death; and which processes are the run's now."""

    def __init__(self, orphan_after_s: float = THIS_HOST.orphan_after_s) -> None:
        self._orphan_after_s = orphan_after_s
        self._owned: dict[int, _Owned] = {}
        self._current: frozenset[int] = frozenset()
        self.roots: tuple[tuple[Proc, Role, str | None], ...] = ()

    def look(self, state: State, now: float) -> None:
        """Take in the trees as they are now."""
        trees: list[tuple[tuple[Proc, ...], Role, str | None]] = [
            (server.procs, Role.SERVER, server.name) for server in state.servers
        ]
        trees.append((state.trainer.procs, Role.TRAINER, None))
        for procs, role, server in trees:
            for one in procs:
                self._owned[one.pid] = _Owned(one, role, server, now)
        current = {one.pid for procs, _, _ in trees for one in procs}
        page = state.trainer.pid
        if page is not None and page not in current and state.trainer.alive:
            self._page_pid(page, now)
            current.add(page)
        self._current = frozenset(current)
        self.roots = tuple((procs[0], role, server) for procs, role, server in trees if procs)
        if not state.trainer.procs and page in self._owned and page in current:
            self.roots = (*self.roots, (self._owned[page].proc, Role.TRAINER, None))
        for pid in [pid for pid, known in self._owned.items() if self._over(known, now)]:
            del self._owned[pid]

    def of(self, pid: int | None) -> tuple[Role, str | None]:
        """Whose it is or was, with the server's name; unknown for one that was never in a tree."""
        known = None if pid is None else self._owned.get(pid)
        return (Role.UNKNOWN, None) if known is None else (known.role, known.server)

    def orphan(self, pid: int, now: float) -> bool:
        """Whether a process of the run lives on though it belongs to no tree any more, and not only just."""
        known = self._owned.get(pid)
        return (
            known is not None
            and pid not in self._current
            and now - known.seen_at > self._orphan_after_s
            and proc.alive(known.proc)
        )

    @property
    def current(self) -> frozenset[int]:
        """The pids of the run's trees now."""
        return self._current

    def _page_pid(self, pid: int, now: float) -> None:
        """The trainer that only its page tells of; its start time is looked up once."""
        known = self._owned.get(pid)
        if known is not None and known.role is Role.TRAINER:
            known.seen_at = now
            return
        found = proc.stat(pid)
        if found is not None:
            one = Proc(pid=pid, start_ticks=found.start_ticks, role="trainer")
            self._owned[pid] = _Owned(one, Role.TRAINER, None, now)

    def _over(self, known: _Owned, now: float) -> bool:
        return (
            known.proc.pid not in self._current
            and now - known.seen_at > DEAD_KNOWN_FOR_S
            and not proc.alive(known.proc)
        )
