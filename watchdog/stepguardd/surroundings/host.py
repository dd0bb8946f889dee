"""Where the machine keeps what is read of it, and its memory now."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..control.contract import HostDict
from ..sources.kmsg import JOURNALD, KMSG, KernelLog, open_kernel_log

INTERVAL_S: Final = 0.5
"""Logs, the kernel's kills, and whose process is whose are looked at this often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFiles:
    """
    Where this machine keeps what is read of it, and how patiently; a test has folders and times of its own.

    `proc` is where pressure, memory and the cgroups of processes are looked up. GPUs and pressure are looked
    at each `slow_s`. A GPU fills up when its memory grew for `growth_s` at least, and a process is a leftover
    when it lives on for `orphan_after_s` outside of every tree.
    """

    proc: Path = Path("/proc")
    kmsg: Path = KMSG
    journald: Path = JOURNALD
    slow_s: float = 2.5
    growth_s: float = 300.0
    orphan_after_s: float = 15.0

    def kernel_log(self) -> KernelLog:
        """Open the kernel's log; raises KernelLogError."""
        return open_kernel_log(self.kmsg, journald=self.journald)


THIS_HOST: Final = HostFiles()


def memory_now(kills: int | None, proc_dir: Path) -> HostDict:
    """The machine's memory now (proc_meminfo(5)); read at each question, since nobody else needs it."""
    found: dict[str, int] = {}
    try:
        lines = (proc_dir / "meminfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, rest = line.partition(":")
        number = rest.split()[:1]
        if key in {"MemAvailable", "MemTotal"} and number and number[0].isdigit():
            found[key] = 1024 * int(number[0])
    return {
        "available_bytes": found.get("MemAvailable"),
        "total_bytes": found.get("MemTotal"),
        "oom_kills": kills,
    }
