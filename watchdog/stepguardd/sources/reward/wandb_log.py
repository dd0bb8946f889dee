"""
The W&B log of a run, live and without `wandb`: one file, a run's folder, or a folder of runs.

Promises each logged row once, in order, over resumed runs too: W&B gives every resumption of a run a new
folder with the same run id, so the files of the newest run id are read one after the other, sorted by the
time in their folder's name. A damaged block costs its records, a torn tail is waited for, and both are said.
What wandb has not flushed cannot be seen: see `advice`. The step is the configured key; without one it is
`train/global_step` in the rows that carry it, else `_step`, which counts calls of `log` and is no training
step in every trainer.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stepguardd.sources.reward.rows import POLL_BYTES, Notes, Position, Row, offset_in
from stepguardd.sources.reward.wandb_frames import Frames
from stepguardd.sources.reward.wandb_records import Exit, Header, RecordParser, Run
from stepguardd.sources.reward.wire import WireError

FLUSH_VARIABLE = "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL"

_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")


@dataclass(frozen=True, slots=True, order=True)
class RunFile:
    """One file of a run: when its folder was made, where it lies, and its run id."""

    made: str
    path: Path
    run_id: str


def run_files(path: Path, run_id: str | None = None) -> list[RunFile]:
    """
    List the files of the run at `path`, oldest first; an empty list where there is none yet.

    `path` is a file, a run's folder, or a folder of runs (or the one above it, with `wandb` inside). Of
    several runs it is the one whose newest folder is the newest, or the one named by `run_id`.
    """
    if path.suffix == ".wandb":
        return [RunFile("", path, path.stem.removeprefix("run-"))] if path.exists() else []
    here = sorted(path.glob("run-*.wandb"))
    if here:
        return [RunFile("", here[0], here[0].stem.removeprefix("run-"))]
    found: list[RunFile] = []
    for folder in (path, path / "wandb"):
        for name in _names(folder):
            match = _FOLDER.fullmatch(name)
            if match is None or (run_id is not None and match[2] != run_id):
                continue
            file = folder / name / f"run-{match[2]}.wandb"
            if file.exists():
                found.append(RunFile(match[1], file, match[2]))
    found.sort()
    return [file for file in found if file.run_id == found[-1].run_id]


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder)]
    except OSError:
        return []


def advice_for(version: str) -> str:
    """Say what makes the file of this version of wandb live; `version` is the writer's, such as "0.30.0"."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if len(numbers) == 2 and numbers < (0, 31):
        return (
            f"wandb {version} writes its file only when 32 KiB are full: minutes late, and lost in a kill; "
            f"use wandb 0.31 or newer with {FLUSH_VARIABLE}=0.2, or the guard's own report"
        )
    return (
        f"wandb {version} writes its file every 15 s unless told otherwise; "
        f"start the trainer with {FLUSH_VARIABLE}=0.2"
    )


class WandbLog:
    """Follows a run; see `rows.Reader`. In a folder of runs it goes over to a newer run id, and says so."""

    def __init__(
        self,
        path: Path,
        *,
        step_key: str | None = None,
        run_id: str | None = None,
        position: Mapping[str, object] | None = None,
    ) -> None:
        self._path = path
        self._pinned = run_id
        self._parser = RecordParser(step_key)
        self._notes = Notes()
        self._frames: Frames | None = None
        self._file: RunFile | None = None
        self._last_num = 0
        self._version = ""
        self._exit: Exit | None = None
        self._caught_up = False
        self._waiting: list[RunFile] | None = None
        self._resume: tuple[str, int, int] | None = None
        if position:
            self._resume = (
                str(position.get("file", "")),
                offset_in(position, "offset"),
                offset_in(position, "num"),
            )

    @property
    def position(self) -> Position:
        """The file, the offset in it and the number of the last record."""
        if self._frames is None:
            if self._resume is None:
                return {}
            file, offset, num = self._resume
            return {"file": file, "offset": offset, "num": num}
        return {"file": str(self._frames.path), "offset": self._frames.offset, "num": self._last_num}

    @property
    def caught_up(self) -> bool:
        """Whether the newest file was read to its end."""
        return self._caught_up

    @property
    def finished(self) -> bool:
        """Whether the newest file ends with the exit record. A run that was killed never writes one."""
        return self._caught_up and self._exit is not None

    @property
    def run_id(self) -> str | None:
        """The id of the run that is being read, None before there is one."""
        return self._file.run_id if self._file is not None else None

    def poll(self, bytes_max: int = POLL_BYTES) -> tuple[Row, ...]:
        """Read on; see `rows.Reader`."""
        if self._frames is None:
            first = self._following()
            if first is None:
                self._caught_up = True
                return ()
            self._go_over(*first)
        frames = self._frames
        assert frames is not None
        damaged = frames.damaged
        records = frames.read(bytes_max)
        rows: list[Row] = []
        for data in records:
            rows.extend(self._take(data))
        if frames.damaged > damaged:
            self._notes.add(
                f"{frames.path}: damaged near byte {frames.offset}; the rest of that block is skipped"
            )
        following = self._following() if frames.caught_up else None
        self._caught_up = frames.caught_up and following is None
        if following is not None and not records:  # nothing came any more although the next file was there
            self._go_over(*following)
        return tuple(rows)

    def notes(self) -> tuple[str, ...]:
        """See `rows.Reader`."""
        return self._notes.take()

    def unfinished(self) -> tuple[str, ...]:
        """See `rows.Reader`."""
        if self._frames is None:
            return (f"{self._path}: no W&B run here yet",)
        said = []
        torn = self._frames.torn
        if torn:
            said.append(
                f"{self._frames.path}: the last {torn} bytes are no whole record (torn or half written)"
            )
        if self._exit is None:
            said.append(f"{self._frames.path}: no exit record; the run is still going, or it was killed")
        return tuple(said)

    def advice(self) -> str | None:
        """See `rows.Reader`; None before the header record was read."""
        return advice_for(self._version) if self._version else None

    def close(self) -> None:
        """See `rows.Reader`."""
        if self._frames is not None:
            self._frames.close()

    def _take(self, data: bytes) -> tuple[Row, ...]:
        assert self._frames is not None
        try:
            num, content = self._parser.parse(data)
        except WireError as broken:
            self._notes.add(
                f"{self._frames.path}: a record before byte {self._frames.offset} cannot be read: {broken}"
            )
            return ()
        if num != self._last_num + 1:
            self._note_gap(num)
        self._last_num = num or self._last_num
        if content is None or isinstance(content, tuple):  # nearly always
            return content or ()
        match content:
            case Header(version=version):
                self._version = version
            case Exit():
                self._exit = content
            case Run():
                pass
        return ()

    def _note_gap(self, num: int) -> None:
        """Records carry running numbers: a gap between them is a loss, and is said."""
        lost = num - self._last_num - 1
        if lost > 0:
            assert self._frames is not None
            self._notes.add(f"{self._frames.path}: {lost} records are lost before record {num}")

    def _following(self) -> tuple[RunFile, int, int] | None:
        """Return the next file of the run, and the offset and record number to begin with."""
        files = run_files(self._path, self._pinned)
        if self._resume is not None:
            return self._where_it_stood(files)
        for file in files:
            if self._file is None or file.run_id != self._file.run_id or file > self._file:
                return file, 0, 0
        return None

    def _go_over(self, file: RunFile, offset: int, num: int) -> None:
        frames = Frames(file.path, offset)
        self._leave(file)
        self._frames, self._file, self._last_num, self._exit, self._resume = frames, file, num, None, None

    def _where_it_stood(self, files: list[RunFile]) -> tuple[RunFile, int, int] | None:
        """Find the file of the stored position; where it is gone, start at the oldest and say so."""
        assert self._resume is not None
        name, offset, num = self._resume
        for file in files:
            if str(file.path) == name:
                return file, offset, num
        if not files:
            return None
        self._notes.add(f"{name}: the file of the stored position is not of this run; starting over")
        return files[0], 0, 0

    def _leave(self, chosen: RunFile) -> None:
        if self._frames is None or self._file is None:
            return
        if self._exit is None:
            self._notes.add(
                f"{self._frames.path}: ended without an exit record (killed), {self._frames.torn} bytes torn"
            )
        if chosen.run_id != self._file.run_id:
            self._notes.add(f"{self._path}: a newer run, {chosen.run_id}, has begun; going over to it")
        self._frames.close()
