"""The clocks: the only module that reads them. Monotonic for durations, wall time for people."""

import time
from pathlib import Path


def monotonic() -> float:
    """Seconds since boot, the same for every process of this machine."""
    return time.monotonic()


def monotonic_ns() -> int:
    """The same, in nanoseconds, as the gate page counts its lease."""
    return time.monotonic_ns()


def wall() -> float:
    """Seconds since 1970, for people and files alone: it may jump."""
    return time.time()


def boot_id() -> str:
    """The id of this boot: monotonic times of another boot mean nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
