"""
How soon the kernel lets the daemon run when something happened.

A busy machine lets a woken process wait for the slice of whoever runs, whatever its nice level; a thread of
the lowest real-time priority does not wait. `python -m benchmarks.detection` shows the difference.
"""

import os
from contextlib import suppress


def urgent() -> bool:
    """
    Put the calling thread, and nothing that it starts, before ordinary processes, where this user may.

    The event loop works for well under a hundredth of a core, and the kernel keeps a share of each core from
    real-time threads. Servers, threads and tools that are started later are ordinary again.

    Returns:
        Whether it was allowed: root, CAP_SYS_NICE or a limit of RTPRIO.

    """
    with suppress(OSError, AttributeError):
        lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_RR))
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, lowest)
        return True
    return False
