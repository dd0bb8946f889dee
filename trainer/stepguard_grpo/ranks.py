"""
`python -m stepguard_grpo.ranks N ARGUMENTS…`: the trainer on N ranks of this machine, as torchrun would.

It waits for all of them and ends none: a rank whose peer died has to end by itself. Its exit code is the
first that was not 0. TERM and Ctrl-C are handed on.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Start the ranks, and wait for them."""
    world = int(arguments[0])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "stepguard_grpo.train", *arguments[1:]]
    ranks = [subprocess.Popen(command, env=shared | {"RANK": str(rank)}) for rank in range(world)]

    def hand_on(number: int, _: object) -> None:
        for rank in ranks:
            rank.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, hand_on)
    codes = [rank.wait() for rank in ranks]
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
