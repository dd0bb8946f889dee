"""
The short-lived process that writes one report: `python -m stepguardd.incidents FOLDER KEEP TOTAL_MIB`.

It yields to everything else on the machine, and ends itself should anything hang.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..journal import JournalError
from .collected import Collected, read_collected
from .folders import keep_few
from .passage import has_notice
from .report import ReportError
from .writing import write_report

_LIFE_S: Final = 140
_TRIES: Final = 150
_TRY_S: Final = 0.2


def main(arguments: list[str]) -> int:
    """Write the report of this folder, then delete what is too old; 1 and a line on stderr if it cannot."""
    folder, keep, total_mib = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    signal.alarm(_LIFE_S)
    with suppress(OSError):
        os.nice(10)
    collected = read_collected(folder)
    if collected is None:
        print(f"{folder}: nothing was collected there", file=sys.stderr)
        return 1
    try:
        _wait_for(collected)
        write_report(collected, folder)
    except (ReportError, JournalError, OSError) as error:
        print(f"{folder}: {error}", file=sys.stderr)
        return 1
    keep_few(folder.parent.parent, keep=keep, bytes_max=total_mib << 20)
    return 0


def _wait_for(collected: Collected) -> None:
    """The journal's own thread gathers rows before it writes them: a busy run's newest ones come late."""
    for _ in range(_TRIES):
        if collected.awaits is None:
            return
        if has_notice(Path(collected.journal), collected.incident, collected.awaits):
            return
        time.sleep(_TRY_S)


if __name__ == "__main__":
    # A driver that hangs in its thread must not keep the process.
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)
