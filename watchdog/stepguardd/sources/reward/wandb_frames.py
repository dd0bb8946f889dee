"""
The framing of a W&B transaction log (`run-<id>.wandb`): from a growing file to whole records.

A seven-byte file header (`:W&B`, 0xBEE1, version 0), then blocks of 32 KiB counted from the start of the
file, filled with chunks: CRC-32 over type and data, length, type (whole, first, middle, last), data. Promises
whole records only, each once, in order. A damaged chunk costs the rest of its block; a torn tail is waited
for. What is in a record is `wandb_records`' affair. The format was found by experiment with wandb 0.28 to
0.31.
"""

import os
import struct
from pathlib import Path
from zlib import crc32

from stepguardd.sources.reward.rows import POLL_BYTES, StreamError

MAGIC = b":W&B\xe1\xbe\x00"
BLOCK = 32 * 1024
RECORD_BYTES_MAX = 64 * 1024 * 1024
"""A record longer than this is skipped as damage."""

WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
_CHUNK = struct.Struct("<IHB")


class Frames:
    """
    The records of one file, from an offset on.

    `offset` is where the next record begins (for a new file: 0, before the header). `torn` is the count of
    bytes behind it that make no whole record yet. `damaged` counts blocks that were given up.
    """

    _fd = -1

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset
        self.caught_up = False
        self.torn = 0
        self.damaged = 0
        self._opened = False
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as refused:
            raise StreamError(f"{path}: {refused.strerror}") from None

    def close(self) -> None:
        """Give the file back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def read(self, bytes_max: int = POLL_BYTES) -> list[bytes]:
        """Return the whole records of the next `bytes_max` bytes, of more when a single record is longer."""
        if not self._opened and not self._check_header():
            return []
        want = bytes_max
        while True:
            data = self._pread(want, self.offset)
            begun = self.offset
            at_end = len(data) < want
            records = self._split(data, at_end)
            self.caught_up = at_end
            self.torn = max(0, begun + len(data) - self.offset) if at_end else 0
            if records or at_end or self.offset > begun:
                return records
            if want > RECORD_BYTES_MAX:
                self._give_up_block(begun)
                return []
            want *= 4

    def _pread(self, count: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, count, offset)
        except OSError as failed:
            raise StreamError(f"{self.path}: {failed.strerror}") from None

    def _check_header(self) -> bool:
        """Look at the file's first bytes; False while they are not all there."""
        head = self._pread(len(MAGIC), 0)
        if not MAGIC.startswith(head):
            if head[:6] == MAGIC[:6]:
                raise StreamError(
                    f"{self.path}: version {head[6]} of W&B's file format is not known here; update stepguard"
                )
            raise StreamError(f"{self.path}: this is no W&B log; it does not begin with ':W&B'")
        self.caught_up = True
        self.torn = len(head)
        if len(head) < len(MAGIC):
            return False
        self._opened = True
        self.offset = max(self.offset, len(MAGIC))
        return True

    def _give_up_block(self, at: int) -> None:
        self.offset = (at // BLOCK + 1) * BLOCK
        self.damaged += 1

    def _split(self, data: bytes, at_end: bool) -> list[bytes]:
        """Cut `data`, which begins at `self.offset`, into records; the offset moves behind the last one."""
        base, size = self.offset, len(data)
        records: list[bytes] = []
        parts: list[bytes] = []
        at = done = 0
        while True:
            left = BLOCK - (base + at) % BLOCK
            if left < _CHUNK.size:
                if at + left > size:
                    break
                at += left
                if not parts:
                    done = at
                continue
            if at + _CHUNK.size > size:
                break
            checksum, length, kind = _CHUNK.unpack_from(data, at)
            stop = at + _CHUNK.size + length
            sound = WHOLE <= kind <= LAST and _CHUNK.size + length <= left
            if sound and stop > size:
                break
            if not sound or crc32(data[at + 6 : stop]) != checksum:
                # In the block that is still being written, damage and a half-seen write look alike: wait
                # for the next.
                if at + left > size:
                    break
                self.damaged += 1
                parts = []
                at = done = at + left
                continue
            body = data[at + _CHUNK.size : stop]
            if kind == WHOLE:
                records.append(body)
                parts = []
                done = stop
            elif kind == FIRST:
                parts = [body]
                done = at
            elif parts:
                parts.append(body)
                if kind == LAST:
                    records.append(b"".join(parts))
                    parts = []
                    done = stop
            else:
                done = stop  # the rest of a record whose beginning was lost
            at = stop
        self.offset = base + done
        return records
