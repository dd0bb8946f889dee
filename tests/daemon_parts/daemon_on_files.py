"""A real daemon, its machine a folder, its looks quick: `daemon_on_files.py CONFIG FOLDER`, until SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from stepguardd.config import load_config
from stepguardd.daemon import Daemon
from stepguardd.surroundings import HostFiles


def main(config: str, folder: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    machine = Path(folder)
    files = HostFiles(
        proc=machine / "proc",
        kmsg=machine / "kmsg",
        journald=machine / "journald",
        slow_s=0.1,
        growth_s=2.0,
        orphan_after_s=1.0,
    )
    asyncio.run(Daemon(load_config(Path(config)), files).run())


if __name__ == "__main__":
    main(*sys.argv[1:])
