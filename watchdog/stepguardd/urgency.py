"""
How soon the daemon's loop runs when something happened.

Two things make it wait: the slice of another process on a busy core (measured beside two busy cores: 4 ms at
p90 and 12 ms at p99, whatever its nice level), and the interpreter's lock in the hands of one of its own
threads (5 ms by default). A thread of the lowest real-time priority does not wait for the first.
"""

import os
import sys
from contextlib import suppress
from typing import Final

LOCK_INTERVAL_S: Final = 0.0005


def urgent() -> bool:
    """
    Put the calling thread, and nothing that it starts, before ordinary processes, where this user may.

    The event loop works for well under a hundredth of a core, and the kernel keeps a share of each core from
    real-time threads. Servers, threads and tools that are started later are ordinary again.

    Returns:
        Whether it was allowed: to root, with CAP_SYS_NICE, or with a limit of RTPRIO.

    """
    sys.setswitchinterval(LOCK_INTERVAL_S)
    with suppress(OSError, AttributeError):
        lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_RR))
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, lowest)
        return True
    return False
