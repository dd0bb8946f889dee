"""The reward's curve as PNG, drawn in a process of its own: matplotlib is large, and rarely needed."""

import asyncio
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

log = logging.getLogger("stepguardd")

TIMEOUT_S: Final = 30.0
PNG_BYTES_MAX: Final = 4 << 20
_PNG: Final = b"\x89PNG\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """
    Which curve.

    Args:
        journal: the run's journal; None draws an example.
        title: over it.
        onset_step: where the trouble began.
        opened_wall: when the incident opened; what is refused or held after it is marked.

    """

    journal: Path | None
    title: str
    onset_step: int | None = None
    opened_wall: float | None = None


async def draw(wanted: Wanted, *, cache: Path | None = None, timeout_s: float = TIMEOUT_S) -> bytes | None:
    """
    The picture; None where nothing can be drawn: no alert waits for a picture that does not come.

    Args:
        wanted: which curve.
        cache: a folder that we may write, for matplotlib's list of fonts.
        timeout_s: for the whole.

    """
    request = {
        "journal": None if wanted.journal is None else str(wanted.journal),
        "title": wanted.title,
        "onset_step": wanted.onset_step,
        "opened_wall": wanted.opened_wall,
        "cache": None if cache is None else str(cache),
    }
    try:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stepguardd.alerts.curve_process"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        log.warning("no curve: its process does not start (%s)", error.strerror)
        return None
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await child.communicate(json.dumps(request).encode())
    except TimeoutError:
        log.warning("the curve took longer than %g s, and is left out", timeout_s)
        return None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0 or not out.startswith(_PNG) or len(out) > PNG_BYTES_MAX:
        last = err.decode("utf-8", "replace").strip().splitlines()[-1:]
        log.warning("no curve: %s", last[0] if last else f"exit code {child.returncode}")
        return None
    return out
