"""Named points at which the crash tests kill the daemon, as nothing else could be so exact."""

import os
import signal
from typing import Final

CRASH_AT: Final = "STEPGUARD_CRASH_AT"


def failpoint(name: str) -> None:
    """Die here by SIGKILL if the environment names this point; do nothing else."""
    if os.environ.get(CRASH_AT) == name:
        os.kill(os.getpid(), signal.SIGKILL)
