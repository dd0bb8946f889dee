"""
Out of memory, kept apart by where it was seen, because each kind needs another remedy.

The kernel's kill (its log names the victim, a cgroup's counter the place), Ray's memory monitor, CUDA at the
start and CUDA at work, and a full KV pool, which is no crash. Promises that what a source does not say is
None, and that one kernel kill is one event per source: who counts kills takes one source. Whose process it
was is told by `roles`, since the victim is gone before anyone can ask.
"""

import re
from collections.abc import Callable, Iterable
from typing import assert_never

from stepguardd.core.events import OomKind, OomSeen, Role
from stepguardd.core.signs import Sign
from stepguardd.sources.cgroups import KillCounter
from stepguardd.sources.kmsg import KernelLog, KernelMessage
from stepguardd.sources.logs import LogMatch, Stage

RoleOf = Callable[[int | None, str | None], Role]
"""Tells the role of a process by its pid and name, of those that lived before."""

_ANNOUNCED = re.compile(
    r"oom-kill:constraint=(?P<constraint>\w{1,40}),.{0,400}?"
    r"(?:oom_memcg=(?P<oom_memcg>[^,]{0,1024})|(?P<host>global_oom)),"
    r"task_memcg=(?P<task_memcg>.{0,1024}?),task=(?P<task>.{0,64}),pid=(?P<pid>\d{1,9}),uid=(?P<uid>\d{1,10})"
)
_KILLED = re.compile(
    r"(?P<scope>Memory cgroup out of memory|Out of memory|Out of memory \(oom_kill_allocating_task\))?(?:: )?"
    r"Killed process (?P<pid>\d{1,9}) \((?P<name>.{0,64})\),?(?: UID:? ?(?P<early_uid>\d{1,10}),?)? "
    r"total-vm:(?P<total_vm>\d{1,15})kB, anon-rss:(?P<anon_rss>\d{1,15})kB, file-rss:(?P<file_rss>\d{1,15})kB"
    r"(?:, shmem-rss:(?P<shmem_rss>\d{1,15})kB)?(?:, UID:(?P<uid>\d{1,10}))?"
    r"(?: pgtables:(?P<pgtables>\d{1,15})kB)?(?: oom_score_adj:(?P<oom_score_adj>-?\d{1,5}))?"
)
_SIZE = re.compile(r"([\d.]{1,12}) ?([KMGT]?)i?B")
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_ANNOUNCED_MAX = 64


class KernelKills:
    """Puts together the lines that the kernel prints about one kill."""

    def __init__(self, role_of: RoleOf) -> None:
        self._role_of = role_of
        self._announced: dict[int, dict[str, str]] = {}

    def take(self, message: KernelMessage) -> OomSeen | None:
        """Read one message; return the kill that it completes, if it does."""
        announced = _ANNOUNCED.search(message.text)
        if announced is not None:
            facts = {key: value for key, value in announced.groupdict().items() if value is not None}
            if len(self._announced) >= _ANNOUNCED_MAX:
                self._announced.clear()
            self._announced[int(facts["pid"])] = facts
            return None
        killed = _KILLED.search(message.text)
        if killed is None:
            return None
        facts = {key: value for key, value in killed.groupdict().items() if value is not None}
        pid = int(facts["pid"])
        before = self._announced.pop(pid, {})
        in_cgroup = facts.get("scope", "").startswith("Memory cgroup") or "oom_memcg" in before
        return OomSeen(
            kind=OomKind.KERNEL_CGROUP if in_cgroup else OomKind.KERNEL_HOST,
            role=self._role_of(pid, facts["name"]),
            pid=pid,
            name=facts["name"],
            used_bytes=1024 * sum(int(facts.get(part, 0)) for part in ("anon_rss", "file_rss", "shmem_rss")),
            cgroup=before.get("oom_memcg") or before.get("task_memcg"),
            time_s=message.time_s,
            facts={**before, **facts},
        )


class OomSense:
    """The kernel's side of it: its log where it can be read, and the counters of the cgroups in question."""

    def __init__(
        self,
        *,
        role_of: RoleOf,
        kernel_log: KernelLog | None = None,
        counters: Iterable[tuple[KillCounter, Role]] = (),
    ) -> None:
        """`counters` come with the role of what lives in their cgroup."""
        self._kernel_log = kernel_log
        self._counters = list(counters)
        self._kills = KernelKills(role_of)

    def poll(self) -> tuple[OomSeen, ...]:
        """Return what is new, bounded; never waits. Raises KernelLogError when the log is over."""
        seen = [
            OomSeen(kind=OomKind.CGROUP_COUNTER, role=role, cgroup=counter.cgroup.name, count=new)
            for counter, role in self._counters
            if (new := counter.new_kills())
        ]
        if self._kernel_log is not None:
            for message in self._kernel_log.poll():
                kill = self._kills.take(message)
                if kill is not None:
                    seen.append(kill)
        return tuple(seen)


def oom_in_log(match: LogMatch, role: Role) -> OomSeen | None:
    """Tell what a line of a server's or trainer's log says about memory; None where it says nothing of it."""
    kind = _log_kind(match)
    if kind is None:
        return None
    facts = match.facts
    asked = facts.get("tried") or facts.get("used")
    return OomSeen(
        kind=kind,
        role=role if kind is not OomKind.RAY_MONITOR else Role.UNKNOWN,
        pid=int(facts["pid"]) if "pid" in facts else None,
        used_bytes=size_bytes(asked) if asked is not None else None,
        gpu=int(facts["gpu"]) if "gpu" in facts else None,
        count=int(facts.get("workers", match.count)),
        facts={**facts, "line": match.line},
    )


def _log_kind(match: LogMatch) -> OomKind | None:
    if match.sign is Sign.CUDA_OOM:
        match match.stage:
            case Stage.STARTING:
                return OomKind.CUDA_START
            case Stage.RUNNING:
                return OomKind.CUDA_RUN
            case Stage.UNKNOWN:
                return OomKind.CUDA_UNKNOWN
            case never:
                assert_never(never)
    return {
        Sign.POOL_TOO_SMALL: OomKind.POOL_TOO_SMALL,
        Sign.KV_EXHAUSTED: OomKind.KV_FULL,
        Sign.RAY_MEMORY_KILL: OomKind.RAY_MONITOR,
    }.get(match.sign)


def size_bytes(text: str) -> int | None:
    """Read "2.00 GiB" or Ray's "21.50GB", which are powers of 1024 as well; None for anything else."""
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    try:
        return int(float(match[1]) * 1024 ** _POWERS[match[2]])
    except ValueError:
        return None
