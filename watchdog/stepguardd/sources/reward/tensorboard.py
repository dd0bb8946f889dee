"""
TensorBoard event files, live and without TensorBoard: one file, or a folder of them.

Promises each scalar once, in order, over the files of a folder sorted by the time in their names. Both scalar
forms are read: `simple_value` (PyTorch) and one-element tensors (TensorFlow 2). The framing is TFRecord:
length, masked CRC-32C of the length, data, masked CRC-32C of the data. A file with a damaged length cannot be
read further, which is said; damaged data costs its record. A plain `SummaryWriter` flushes every 120 s or ten
events: see `advice`.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from stepguardd.sources.reward.rows import POLL_BYTES, Notes, Position, Row, StreamError, offset_in
from stepguardd.sources.reward.wire import WireError, fields, signed

RECORD_BYTES_MAX = 64 * 1024 * 1024
CHECKED_BYTES_MAX = 4 * 1024
"""Records up to this size have their data checked; larger ones are pictures, and this CRC is slow here."""

_HEAD = struct.Struct("<QI")
_TAIL_BYTES = 4
_FLOAT, _DOUBLE = 1, 2


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """Return the CRC-32C of `data`, rotated and offset as TFRecord files store it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def is_event_file(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a TFRecord file: the first length's checksum holds."""
    return len(head) >= _HEAD.size and masked_crc32c(head[:8]) == struct.unpack_from("<I", head, 8)[0]


def event_files(path: Path) -> list[Path]:
    """List the event files at `path`, a file or a folder, oldest first."""
    if path.is_dir():
        return sorted(path.glob("*tfevents*"), key=lambda file: file.name)
    return [path] if path.exists() else []


class EventFiles:
    """Follows a file or a folder of them; see `rows.Reader`."""

    _fd = -1

    def __init__(self, path: Path, *, position: Mapping[str, object] | None = None) -> None:
        self._path = path
        self._notes = Notes()
        self._file: Path | None = None
        self._offset = 0
        self._torn = 0
        self._caught_up = False
        self._broken = False
        self._resume = (str(position.get("file", "")), offset_in(position, "offset")) if position else None

    @property
    def position(self) -> Position:
        """The file and the offset in it."""
        if self._file is None:
            return {} if self._resume is None else {"file": self._resume[0], "offset": self._resume[1]}
        return {"file": str(self._file), "offset": self._offset}

    @property
    def caught_up(self) -> bool:
        """See `rows.Reader`."""
        return self._caught_up

    @property
    def finished(self) -> bool:
        """Never: nothing in such a file says that it is complete."""
        return False

    def poll(self, bytes_max: int = POLL_BYTES) -> tuple[Row, ...]:
        """Read on; see `rows.Reader`."""
        if self._file is None:
            first = self._following()
            if first is None:
                self._caught_up = True
                return ()
            self._go_over(*first)
        rows: list[Row] = []
        begun = self._offset
        for record in self._records(bytes_max):
            try:
                rows.extend(scalars(record))
            except WireError as broken:
                self._notes.add(f"{self._file}: an event before byte {self._offset} cannot be read: {broken}")
        following = self._following() if self._caught_up else None
        if following is not None:
            self._caught_up = False
            if self._offset == begun:  # nothing came any more although the next file was there
                self._go_over(*following)
        return tuple(rows)

    def notes(self) -> tuple[str, ...]:
        """See `rows.Reader`."""
        return self._notes.take()

    def unfinished(self) -> tuple[str, ...]:
        """See `rows.Reader`."""
        if self._file is None:
            return (f"{self._path}: no event file here yet",)
        if self._torn:
            return (f"{self._file}: the last {self._torn} bytes are no whole record (torn or half written)",)
        return ()

    def advice(self) -> str | None:
        """See `rows.Reader`."""
        return "a SummaryWriter keeps events for up to 120 s; give it flush_secs=1, or use the guard's report"

    def close(self) -> None:
        """See `rows.Reader`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def _records(self, bytes_max: int) -> Iterator[bytes]:
        """Yield the whole records of the next bytes and move the offset behind each."""
        if self._broken:
            self._caught_up = True
            return
        data, at = self._read(bytes_max), 0
        self._caught_up = len(data) < bytes_max
        while at + _HEAD.size <= len(data):
            length, length_crc = _HEAD.unpack_from(data, at)
            if length > RECORD_BYTES_MAX or masked_crc32c(data[at : at + 8]) != length_crc:
                self._give_up()
                return
            total = _HEAD.size + length + _TAIL_BYTES
            if at + total > len(data):
                if at == 0 and total > bytes_max and not self._caught_up:
                    data = self._read(total)
                    if len(data) == total:
                        continue
                    self._caught_up = True
                break
            body = data[at + _HEAD.size : at + _HEAD.size + length]
            (data_crc,) = struct.unpack_from("<I", data, at + _HEAD.size + length)
            at += total
            self._offset += total
            if length <= CHECKED_BYTES_MAX and masked_crc32c(body) != data_crc:
                self._notes.add(f"{self._file}: a damaged event before byte {self._offset} is left out")
            else:
                yield body
        self._torn = len(data) - at if self._caught_up else 0

    def _read(self, count: int) -> bytes:
        try:
            return os.pread(self._fd, count, self._offset)
        except OSError as failed:
            raise StreamError(f"{self._file}: {failed.strerror}") from None

    def _give_up(self) -> None:
        if self._offset == 0:
            raise StreamError(f"{self._file}: this is no event file of TensorBoard")
        self._notes.add(f"{self._file}: damaged at byte {self._offset}; the rest of this file cannot be read")
        self._broken = True
        self._caught_up = True

    def _following(self) -> tuple[Path, int] | None:
        """Return the next file and the offset to begin with, if there is one."""
        files = event_files(self._path)
        if self._resume is None:
            newer = (file for file in files if self._file is None or file.name > self._file.name)
            following = next(newer, None)
            return None if following is None else (following, 0)
        name, offset = self._resume
        for file in files:
            if str(file) == name:
                return file, offset
        if not files:
            return None
        self._notes.add(f"{name}: the file of the stored position is gone; starting over")
        return files[0], 0

    def _go_over(self, file: Path, offset: int) -> None:
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as refused:
            raise StreamError(f"{file}: {refused.strerror}") from None
        self.close()
        self._fd, self._file, self._offset, self._torn = fd, file, offset, 0
        self._broken, self._resume = False, None


def scalars(event: bytes) -> tuple[Row, ...]:
    """Decode one event: a row for each scalar in it. Raises WireError for bytes that are no event."""
    time: float | None = None
    step = 0
    summary = b""
    for field, content in fields(event):
        if field == 1 and isinstance(content, bytes) and len(content) == 8:
            time = struct.unpack("<d", content)[0]
        elif field == 2 and isinstance(content, int):
            step = signed(content)
        elif field == 5 and isinstance(content, bytes):
            summary = content
    rows = []
    for field, content in fields(summary):
        if field == 1 and isinstance(content, bytes):
            named = _scalar(content)
            if named is not None:
                rows.append(Row(step, named[0], named[1], time))
    return tuple(rows)


def _scalar(value: bytes) -> tuple[str, float] | None:
    tag: str | None = None
    number: float | None = None
    for field, content in fields(value):
        if not isinstance(content, bytes):
            continue
        if field == 1:
            tag = content.decode(errors="replace")
        elif field == 2 and len(content) == 4:
            number = struct.unpack("<f", content)[0]
        elif field == 8:
            number = _tensor(content)
    return (tag, number) if tag is not None and number is not None else None


def _tensor(tensor: bytes) -> float | None:
    """Read a tensor of one float or double, packed or as raw content; None for any other."""
    kind = 0
    raw = b""
    for field, content in fields(tensor):
        if field == 1 and isinstance(content, int):
            kind = content
        elif field in {4, 5, 6} and isinstance(content, bytes):
            raw = content
    if kind == _FLOAT and len(raw) == 4:
        return float(struct.unpack("<f", raw)[0])
    if kind == _DOUBLE and len(raw) == 8:
        return float(struct.unpack("<d", raw)[0])
    return None
