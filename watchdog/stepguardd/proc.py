"""
Processes as /proc tells of them: who lives, whose child it is, whether it is stopped, what it has used.

A process is named by its pid *and* its start time, because pids are used again; a zombie is dead.
What cannot be read (gone, or another user's) is absent, never guessed.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .core.events import Proc

_PROC: Final = Path("/proc")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_DEAD: Final = frozenset("ZXx")
_STOPPED: Final = frozenset("Tt")
_ROLES: Final = ("scheduler", "detokenizer", "data_parallel", "resource_tracker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """The fields of /proc/PID/stat that Stepguard looks at (proc(5))."""

    pid: int
    comm: str
    state: str
    ppid: int
    session: int
    cpu_s: float
    start_ticks: int

    @property
    def dead(self) -> bool:
        """A zombie has exited; only its parent's look at it is missing."""
        return self.state in _DEAD

    @property
    def uninterruptible(self) -> bool:
        """Waiting in the kernel: no signal reaches it, not even SIGKILL in most cases, until that ends."""
        return self.state == "D"

    @property
    def stopped(self) -> bool:
        """Stopped by a signal or held by a debugger."""
        return self.state in _STOPPED


def stat(pid: int) -> Stat | None:
    """One process, or None when there is none that can be read."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    return parse_stat(text)


def parse_stat(text: bytes) -> Stat | None:
    """
    Read one line of /proc/PID/stat; None for anything else.

    The name stands in brackets and may hold brackets and blanks itself, so the fields are counted from the
    last closing one.
    """
    opening, closing = text.find(b"("), text.rfind(b")")
    fields = text[closing + 1 :].split()
    if opening < 0 or closing < opening or len(fields) < 20:
        return None
    try:
        return Stat(
            pid=int(text[:opening]),
            comm=text[opening + 1 : closing].decode("utf-8", "replace"),
            state=fields[0].decode("ascii", "replace"),
            ppid=int(fields[1]),
            session=int(fields[3]),
            cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
            start_ticks=int(fields[19]),
        )
    except ValueError:
        return None


def every() -> Iterator[Stat]:
    """Every process that can be read now."""
    for entry in os.listdir(_PROC):  # noqa: PTH208 - names alone, thousands of times a day
        if entry.isdecimal() and (found := stat(int(entry))) is not None:
            yield found


def alive(proc: Proc) -> bool:
    """Whether this very process lives: the same start time, and no zombie."""
    found = stat(proc.pid)
    return found is not None and found.start_ticks == proc.start_ticks and not found.dead


def exists(pid: int) -> bool:
    """Whether there is such a process, whoever's it is, also where /proc hides those of others."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0


def unmistaken(proc: Proc) -> bool:
    """
    Whether this pid is still this process's own, living or dead.

    The kernel gives no pid away that still names a session, so the orphans of a dead root can be found by it.
    """
    found = stat(proc.pid)
    return found is None or found.start_ticks == proc.start_ticks


def started_at(pid: int) -> float | None:
    """When a process began, in seconds of the wall clock; None where there is none that can be read."""
    found = stat(pid)
    if found is None or found.dead:
        return None
    for line in (_PROC / "stat").read_text().splitlines():
        if line.startswith("btime "):
            return int(line.split()[1]) + found.start_ticks / _TICKS_PER_S
    return None


def maps(pid: int, name: str) -> bool | None:
    """
    Whether a process has a file of this name mapped; None where that may not be read.

    By name and not by inode: overlays and other mount namespaces show other numbers and paths.
    """
    try:
        with (_PROC / str(pid) / "maps").open("rb") as lines:
            wanted = b"/" + os.fsencode(name)
            return any(line.rstrip(b"\n").removesuffix(b" (deleted)").endswith(wanted) for line in lines)
    except OSError:
        return None


def tree(root_pid: int) -> tuple[Proc, ...]:
    """
    The live processes that belong to a root: its descendants, and the rest of its session.

    The session is what keeps a scheduler findable after its parent died and init adopted it. The root comes
    first while it lives; it may be dead already.
    """
    return trees({root_pid})


def trees(root_pids: set[int]) -> tuple[Proc, ...]:
    """The live processes that belong to any of these roots, by one look at the machine."""
    return _members(root_pids, list(every()))


def family(known: tuple[Proc, ...]) -> tuple[Proc, ...] | None:
    """
    A tree that was found before, looked at again without a look at the whole machine.

    The descendants of its root, and whoever of it still lives, adopted by init or not.

    Args:
        known: what was found, the root first.

    Returns:
        None where that cannot be told so: the root is dead, or this kernel names no children.

    """
    if not known or not alive(known[0]):
        return None
    stats = {found.pid: found for one in known if alive(one) and (found := stat(one.pid)) is not None}
    todo = list(stats)
    while todo:
        children = _children(todo.pop())
        if children is None:
            return None
        for pid in children:
            if pid not in stats and (found := stat(pid)) is not None:
                stats[pid] = found
                todo.append(pid)
    return _members(set(stats), list(stats.values()))


def _children(pid: int) -> list[int] | None:
    """The children of all threads of a process (proc(5), needs CONFIG_PROC_CHILDREN); [] once it is gone."""
    found: list[int] = []
    task = _PROC / str(pid) / "task"
    try:
        for thread in os.listdir(task):  # noqa: PTH208 - names alone
            found += map(int, (task / thread / "children").read_bytes().split())
    except FileNotFoundError:
        return None if task.is_dir() and not (task / str(pid) / "children").exists() else found
    except OSError:
        return found
    return found


def marked(variable: str, value: str) -> tuple[Proc, ...]:
    """The live processes that were started with this environment variable, and all that belong to them."""
    wanted = f"{variable}={value}".encode()
    stats = list(every())
    roots = {found.pid for found in stats if not found.dead and wanted in _environ(found.pid)}
    return _members(roots, stats) if roots else ()


def ranks(procs: tuple[Proc, ...]) -> dict[Proc, int]:
    """
    The ranks among the processes of a tree, by the variable RANK that their launcher gave them.

    What a rank starts inherits the variable, so only the topmost process with a number is that rank.
    """
    found: dict[int, tuple[Proc, int]] = {}
    for known in procs:
        text = next((e[5:] for e in _environ(known.pid) if e.startswith(b"RANK=")), b"")
        seen = stat(known.pid)
        if text.isdigit() and seen is not None:
            found[known.pid] = (known, int(text))
    parents = {pid: one.ppid for pid in found if (one := stat(pid)) is not None}
    numbers = {pid: number for pid, (_, number) in found.items()}
    return {
        known: number for pid, (known, number) in found.items() if numbers.get(parents.get(pid, 0)) != number
    }


def _members(roots: set[int], stats: list[Stat]) -> tuple[Proc, ...]:
    members = {found.pid for found in stats if found.pid in roots or found.session in roots}
    grown = True
    while grown:
        more = {found.pid for found in stats if found.ppid in members and found.pid not in members}
        grown = bool(more)
        members |= more
    live = [found for found in stats if found.pid in members and not found.dead]
    # A root whose parent is no member leads.
    live.sort(key=lambda found: (found.ppid in members, found.start_ticks, found.pid))
    return tuple(Proc(pid=s.pid, start_ticks=s.start_ticks, role=_role(s)) for s in live)


def _role(found: Stat) -> str:
    """
    What a process does in a server, out of its title: the kernel cuts `comm` to 15 characters.

    The leader of the session is the server, whatever its arguments hold, unless it calls itself otherwise.
    """
    program, _, arguments = _cmdline(found.pid).partition("\0")
    leads = found.session == found.pid
    for role in _ROLES:
        if role in program or found.comm.endswith(role[:7]) or (not leads and role in arguments):
            return role
    return "server" if leads else "child"


def _environ(pid: int) -> list[bytes]:
    try:
        return (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _cmdline(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def listening(port: int, pids: Iterable[int]) -> int | None:
    """Which of these processes listens on a TCP port; None when none of them does."""
    inodes = set(_listeners(port))
    for pid in pids:
        with suppress(OSError):
            for fd in (_PROC / str(pid) / "fd").iterdir():
                with suppress(OSError):
                    link = fd.readlink().name
                    if link.startswith("socket:[") and link[8:-1] in inodes:
                        return pid
    return None


def port_owner(port: int) -> int | None:
    """Which process listens on a TCP port, among those that can be read."""
    return listening(port, (found.pid for found in every()))


def port_taken(port: int) -> bool:
    """Whether anything on this machine listens on a TCP port."""
    return any(True for _ in _listeners(port))


def _listeners(port: int) -> Iterator[str]:
    """The socket inodes that listen on a port (proc(5), /proc/net/tcp; state 0A is LISTEN)."""
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            lines = (_PROC / "net" / name).read_text().splitlines()[1:]
            for line in lines:
                fields = line.split()
                if len(fields) > 9 and fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]
