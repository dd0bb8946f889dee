"""
Is a checkpoint whole, sound and finite? Asked in a separate, niced process with a memory cap.

It promises that a hostile or broken checkpoint costs at worst an `unknown`: nothing in it is unpickled, a
process that dies, swells or stalls is ended and named, and the folder is only ever read (no caches, no locks,
no time stamps put back). It does not decide what follows from a verdict: see `choice.py`.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from stepguardd import clock
from stepguardd.checkpoints.completeness import Around
from stepguardd.checkpoints.layouts import Checkpoint, Folder, size_bytes, surroundings
from stepguardd.core.verdict import Depth, Finding, Verdict, Vetting

__all__ = ["Depth", "Finding", "Verdict", "Vetter", "Vetting", "VettingLimits", "vet_all"]

_POLL_S = 0.1
_END_S = 5.0
_LINE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class VettingLimits:
    """
    What vetting may use.

    depth        every number and checksum, or structure alone.
    memory_mib   address space of the process; files are read in small pieces, so their size does not matter.
    bytes_per_s  reading speed; None: as fast as a niced process gets.
    stall_s      no progress for this long (a dead network mount) ends the process; the verdict is then
                 unknown.
    """

    depth: Depth = Depth.FULL
    memory_mib: int = 2048
    bytes_per_s: int | None = None
    stall_s: float = 300.0


class Vetter:
    """
    Vets checkpoints one after another in one process, which is started when first needed.

    Use it as a context manager. A process that died takes one checkpoint with it, not the rest: the next one
    gets a new process.
    """

    def __init__(self, limits: VettingLimits | None = None) -> None:
        self._limits = limits or VettingLimits()
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process, self._pending = self._process, None, b""
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        try:
            process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            # Stuck in the kernel on a dead mount: it ends when the mount answers, and holds nothing of ours.
            return

    def vet(
        self,
        folder: Folder,
        checkpoint: Checkpoint,
        around: Around,
        *,
        progress: Callable[[int], None] = lambda read_bytes: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Vetting:
        """
        Vet one checkpoint.

        Args:
            folder: the folder it lies in.
            checkpoint: what to vet, as `find_checkpoints` gave it.
            around: what its neighbours say, as `surroundings` gave it.
            progress: called with the bytes read so far, about ten times a second.
            cancelled: asked about ten times a second; True ends the process.

        Returns:
            The verdict. This never raises for anything that a checkpoint may hold.
        """
        try:
            process = self._ensure_process()
            self._ask(process, folder, checkpoint, around)
            return self._await_verdict(process, checkpoint, progress, cancelled)
        except OSError as error:
            self.close()
            return self._unknown(checkpoint, Finding.DIED, f"the vetting process could not be used: {error}")
        except BaseException:
            # Ctrl-C or a cancelled task: the half-answered process must not serve the next question.
            self.close()
            raise

    def _ensure_process(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._process = subprocess.Popen(
            # -P: the current folder is no place to import from. -B: no byte code is written anywhere.
            [
                *(sys.executable, "-P", "-B", "-m", "stepguardd.checkpoints.vetting_process"),
                str(self._limits.memory_mib << 20),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # One thread each: thread pools reserve address space by the gigabyte, and one core is all it may
            # use.
            env=os.environ
            | dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        )
        return self._process

    def _ask(
        self, process: subprocess.Popen[bytes], folder: Folder, checkpoint: Checkpoint, around: Around
    ) -> None:
        request = {
            "root": str(checkpoint.root),
            "framework": checkpoint.framework,
            "pattern": folder.layout.name,
            "step": checkpoint.step,
            "parts": [[part.path, part.inside] for part in checkpoint.parts],
            "linked": checkpoint.linked,
            "marker_step": around.marker_step,
            "roles": sorted(around.roles),
            "depth": self._limits.depth,
            "bytes_per_s": self._limits.bytes_per_s,
        }
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()

    def _await_verdict(
        self,
        process: subprocess.Popen[bytes],
        checkpoint: Checkpoint,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Vetting:
        heard = clock.monotonic()
        while True:
            if cancelled():
                self.close()
                return self._unknown(checkpoint, Finding.CANCELLED, "vetting was cancelled")
            if clock.monotonic() - heard > self._limits.stall_s:
                self.close()
                reason = f"reading made no progress for {self._limits.stall_s:.0f} s"
                return self._unknown(checkpoint, Finding.STALLED, reason)
            lines = self._read_lines(process)
            if lines is None:
                status = process.wait(timeout=_END_S)
                self.close()
                return self._unknown(checkpoint, Finding.DIED, f"the vetting process died (status {status})")
            for line in lines:
                heard = clock.monotonic()
                message = json.loads(line)
                if "verdict" in message:
                    return Vetting(
                        verdict=Verdict(message["verdict"]),
                        finding=Finding(message["finding"]),
                        reason=message["reason"],
                        size_bytes=message["bytes"],
                        depth=self._limits.depth,
                    )
                progress(message["read_bytes"])

    def _read_lines(self, process: subprocess.Popen[bytes]) -> list[bytes] | None:
        """Whole lines that came within a tenth of a second; None when the process has closed its end."""
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        if not select.select([descriptor], [], [], _POLL_S)[0]:
            return []
        data = os.read(descriptor, 1 << 16)
        if not data or len(self._pending) > _LINE_BYTES_MAX:
            return None
        *lines, self._pending = (self._pending + data).split(b"\n")
        return lines

    def _unknown(self, checkpoint: Checkpoint, finding: Finding, reason: str) -> Vetting:
        return Vetting(
            verdict=Verdict.UNKNOWN,
            finding=finding,
            reason=reason,
            size_bytes=size_bytes(checkpoint),
            depth=self._limits.depth,
        )


def vet_all(
    folder: Folder,
    checkpoints: Sequence[Checkpoint],
    limits: VettingLimits | None = None,
    *,
    progress: Callable[[int, int], None] = lambda index, read_bytes: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Vetting]:
    """Vet checkpoints in order; `progress` gets (index of the checkpoint, bytes of it read so far)."""
    neighbours = surroundings(folder, checkpoints)
    verdicts = []
    with Vetter(limits) as vetter:
        for index, (checkpoint, near) in enumerate(zip(checkpoints, neighbours, strict=True)):

            def tell(read_bytes: int, at: int = index) -> None:
                progress(at, read_bytes)

            verdicts.append(vetter.vet(folder, checkpoint, near, progress=tell, cancelled=cancelled))
    return verdicts
