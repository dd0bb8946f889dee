"""
The process in which checkpoints are vetted: `python -m stepguardd.checkpoints.vetting_process`.

One JSON request a line on stdin, answered by progress lines and one verdict line on stdout. It promises to be
niced and capped in memory before it reads anything, to write nowhere but to its stdout, to run nothing that
it reads, and to end when its parent is gone. It knows no incident and no ledger: a checkpoint goes in, a
verdict comes out.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from stepguardd import clock
from stepguardd.checkpoints import files
from stepguardd.checkpoints.completeness import Around, Entry, FileKind, Listing
from stepguardd.checkpoints.layouts import (
    LAYOUTS,
    Checkpoint,
    Framework,
    LayoutError,
    Part,
    custom_layout,
    read_listing,
)
from stepguardd.core.verdict import Depth, Finding, Verdict

NICENESS = 10
PROGRESS_EVERY_S = 0.1
SLEEP_MAX_S = 1.0


def main() -> None:
    """Answer requests until stdin ends."""
    memory_bytes = int(sys.argv[1])
    _become_small(memory_bytes)
    for line in sys.stdin:
        try:
            _answer(json.loads(line))
        except MemoryError:
            _send_verdict(
                Verdict.UNKNOWN, Finding.MEMORY, f"needs more than {memory_bytes >> 20} MiB to vet", 0
            )
        except BrokenPipeError:
            os._exit(0)


def _become_small(memory_bytes: int) -> None:
    os.nice(NICENESS)
    with contextlib.suppress(OSError, AttributeError, psutil.Error):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_BE, 7)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(request: dict[str, Any]) -> None:
    try:
        checkpoint, around, surveyor = _parse(request)
        verdict, finding, reason, size = _vet(checkpoint, around, surveyor, request)
    except (OSError, LayoutError) as error:
        verdict, finding, reason, size = Verdict.UNKNOWN, Finding.UNREADABLE, f"cannot be read: {error}", 0
    _send_verdict(verdict, finding, reason, size)


def _parse(request: dict[str, Any]) -> tuple[Checkpoint, Around, Any]:
    framework = Framework(request["framework"])
    layout = custom_layout(request["pattern"]) if framework is Framework.CUSTOM else LAYOUTS[framework]
    checkpoint = Checkpoint(
        root=Path(request["root"]),
        framework=framework,
        step=request["step"],
        parts=tuple(Part(path=path, inside=inside) for path, inside in request["parts"]),
        linked=request["linked"],
    )
    around = Around(
        marker_step=request["marker_step"], step=request["step"], roles=frozenset(request["roles"])
    )
    return checkpoint, around, layout.survey


def _vet(
    checkpoint: Checkpoint, around: Around, surveyor: Any, request: dict[str, Any]
) -> tuple[Verdict, Finding, str, int]:
    if checkpoint.linked:
        return Verdict.UNKNOWN, Finding.LINK, "is a symbolic link, which is not followed", 0
    listing = read_listing(checkpoint)
    size = sum(entry.size_bytes for entry in listing.files.values())
    survey = surveyor(listing, around)
    if survey.missing:
        more = f" (and {len(survey.missing) - 1} more)" if len(survey.missing) > 1 else ""
        return Verdict.INCOMPLETE, Finding.MISSING, survey.missing[0] + more, size
    for name in sorted(survey.read):
        if name in listing.escaping:
            return (
                Verdict.UNKNOWN,
                Finding.LINK,
                f"{name} is a symbolic link that leads out of the folder",
                size,
            )
    depth = Depth(request["depth"])
    pace = _Pace(request["bytes_per_s"])
    reading = files.Reading(values=depth is Depth.FULL, spent=pace.spent)
    worst = _read_all(listing, survey.read, reading)
    if worst is not None:
        return (*worst, size)
    changed = _changed(listing)
    if changed is not None:
        return Verdict.UNKNOWN, Finding.CHANGED, f"{changed} changed while it was read", size
    looked = "every number is finite" if depth is Depth.FULL else "numbers were not read"
    return Verdict.GOOD, Finding.WHOLE, f"complete; {looked}", size


def _read_all(
    listing: Listing, wanted: dict[str, FileKind], reading: files.Reading
) -> tuple[Verdict, Finding, str] | None:
    """Every file that counts. A bad one ends it; unfinished outweighs not understood."""
    cut_short: str | None = None
    unclear: str | None = None
    for name, kind in sorted(wanted.items()):
        try:
            _read_one(listing.files[name], kind, reading)
        except files.BadFileError as error:
            return Verdict.BAD, Finding.DAMAGED, f"{name} {error}"
        except files.CutShortError as error:
            cut_short = cut_short or f"{name} {error}"
        except files.UnknownFileError as error:
            unclear = unclear or f"{name} {error}"
    if cut_short is not None:
        return Verdict.INCOMPLETE, Finding.CUT_SHORT, cut_short
    if unclear is not None:
        return Verdict.UNKNOWN, Finding.NOT_UNDERSTOOD, unclear
    return None


def _read_one(entry: Entry, kind: FileKind, reading: files.Reading) -> None:
    path = Path(entry.path)
    match kind:
        case FileKind.SAFETENSORS:
            files.check_safetensors(path, reading)
        case FileKind.TORCH:
            files.check_torch(path, reading)
        case FileKind.DCP:
            files.check_dcp(path, reading)
        case FileKind.INDEX:
            files.check_index(path)
        case FileKind.MANIFEST:
            files.check_manifest(path)
        case FileKind.JSON:
            files.check_json(path)
        case FileKind.PICKLE:
            files.check_pickle(path)


def _changed(listing: Listing) -> str | None:
    """The first file that is not as it was listed: a trainer is still writing, or rotation took it."""
    for name, entry in listing.files.items():
        try:
            status = Path(entry.path).stat()
        except OSError:
            return name
        if (status.st_size, status.st_mtime_ns) != (entry.size_bytes, entry.modified_ns):
            return name
    return None


class _Pace:
    """Counts what was read, tells the parent now and then, and sleeps where a bandwidth limit asks for it."""

    def __init__(
        self,
        bytes_per_s: int | None,
        now: Callable[[], float] = clock.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = bytes_per_s
        self._now = now
        self._sleep = sleep
        self._started = self._told = now()
        self._total = 0

    def spent(self, count: int) -> None:
        self._total += count
        now = self._now()
        if self._rate is not None:
            due = self._started + self._total / self._rate
            while now < due:
                self._sleep(min(due - now, SLEEP_MAX_S))
                now = self._now()
                self._tell(now)
        self._tell(now)

    def _tell(self, now: float) -> None:
        if now - self._told >= PROGRESS_EVERY_S:
            self._told = now
            _send({"read_bytes": self._total})


def _send_verdict(verdict: Verdict, finding: Finding, reason: str, size: int) -> None:
    _send({"verdict": verdict, "finding": finding, "reason": reason, "bytes": size})


def _send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
