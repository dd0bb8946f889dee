"""
Whole lines of a growing text file, over rotation, truncation and rewriting.

Promises each byte once while the file is only appended to, and never half a line. A file that was renamed
away is read to its end before the new one is begun; one that was cut or written anew is begun again. What is
in a line, and whether it is valid UTF-8, is the caller's affair. Nothing here waits.
"""

import os
from collections.abc import Mapping
from pathlib import Path

LINE_BYTES_MAX = 1024 * 1024
"""A line longer than this is dropped and counted; nobody logs a metric like that."""

_MARK_BYTES = 32


class Lines:
    """
    Follows the file that `path` names, which need not exist yet.

    Counters for a person: `restarted` (cut or written anew), `dropped_bytes` (by `skip_to_last`, or in lines
    that were too long). `torn` is the count of bytes behind the last newline.
    """

    _fd = -1

    def __init__(self, path: Path, position: Mapping[str, object] | None = None) -> None:
        self.path = path
        self.torn = 0
        self.restarted = 0
        self.dropped_bytes = 0
        self._inode = 0
        self._offset = 0
        self._mark = b""
        self._overlong = False
        if position:
            self._resume(position)

    @property
    def position(self) -> dict[str, object]:
        """Inode, offset behind the last whole line, and the last bytes before it, to know the file again."""
        return {"inode": self._inode, "offset": self._offset, "mark": self._mark.hex()}

    @property
    def absent(self) -> bool:
        """Whether the last look found no file, or there was none yet."""
        return self._fd < 0

    @property
    def fresh(self) -> bool:
        """Whether the next line to come is the first of its file."""
        return self._offset == 0

    def read(self, bytes_max: int) -> list[bytes]:
        """Return the next whole lines without their ends, `bytes_max` bytes or one line. OSError passes."""
        block = self.read_block(bytes_max)
        return block.split(b"\n")[:-1] if block else []

    def read_block(self, bytes_max: int) -> bytes:
        """Like `read`, in one piece that ends with a newline; empty when there is nothing whole."""
        if self._fd < 0 and not self._open():
            self.caught_up = True
            self.torn = 0
            return b""
        want = bytes_max
        while True:
            data = self._next(want)
            end = data.rfind(b"\n") + 1
            at_end = len(data) < want
            self.caught_up = at_end and not self._renamed()
            if end:
                self.torn = len(data) - end if at_end else 0
                return self._take(data, end)
            if not at_end:
                if want <= LINE_BYTES_MAX:
                    want *= 4
                    continue
                self._drop(data)
                return b""
            self.torn = len(data)
            if self.caught_up:
                return b""
            rest = data + b"\n" if data and not self._overlong else b""
            self._change_file()
            return rest

    def skip_to_last(self, bytes_max: int) -> int:
        """Leave out what lies more than `bytes_max` behind the end; return how many bytes that were."""
        if self._fd < 0 and not self._open():
            return 0
        skipped = os.fstat(self._fd).st_size - self._offset - bytes_max
        if skipped <= 0:
            return 0
        self._offset += skipped
        self._mark = os.pread(self._fd, 1, self._offset - 1)
        self._overlong = self._mark != b"\n"  # inside of a line, the rest of which is no line
        self.dropped_bytes += skipped
        return skipped

    def close(self) -> None:
        """Give the file back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def _open(self) -> bool:
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        inode = os.fstat(self._fd).st_ino
        if inode != self._inode:
            self._inode, self._offset, self._mark = inode, 0, b""
        return True

    def _resume(self, position: Mapping[str, object]) -> None:
        """Open the file of the position again, under its new name when it was rotated meanwhile."""
        inode, offset, mark = position.get("inode"), position.get("offset"), position.get("mark")
        if (
            not isinstance(inode, int)
            or not isinstance(offset, int)
            or not isinstance(mark, str)
            or offset < 0
        ):
            return
        try:
            self._mark = bytes.fromhex(mark)[:_MARK_BYTES]
        except ValueError:
            return
        if offset < len(self._mark):
            self._mark = b""
        self._inode, self._offset = inode, offset
        self._overlong = self._mark != b"" and not self._mark.endswith(b"\n")
        try:
            siblings = [entry.path for entry in os.scandir(self.path.parent) if entry.inode() == inode]
            if siblings:
                self._fd = os.open(siblings[0], os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return

    def _next(self, want: int) -> bytes:
        """Read on behind the last whole line; from the start where the file is no longer the same."""
        mark = self._mark
        data = os.pread(self._fd, len(mark) + want, self._offset - len(mark))
        if not data.startswith(mark) or (not data and os.fstat(self._fd).st_size < self._offset):
            self.restarted += 1
            self._offset, self._mark, self._overlong = 0, b"", False
            return os.pread(self._fd, want, 0)
        return data[len(mark) :]

    def _take(self, data: bytes, end: int) -> bytes:
        block = data[:end]
        self._advance(block)
        if self._overlong:
            self._overlong = False
            first = block.find(b"\n") + 1
            self.dropped_bytes += first
            block = block[first:]
        return block

    def _drop(self, data: bytes) -> None:
        """Give up a line that is too long: the rest of it goes as well."""
        self._advance(data)
        self.dropped_bytes += len(data)
        self._overlong = True

    def _advance(self, block: bytes) -> None:
        self._offset += len(block)
        self._mark = (self._mark + block[-_MARK_BYTES:])[-_MARK_BYTES:]

    def _renamed(self) -> bool:
        try:
            return self.path.stat().st_ino != self._inode
        except FileNotFoundError:
            return False

    def _change_file(self) -> None:
        self.close()
        self._inode, self._offset, self._mark, self._overlong = 0, 0, b"", False
        self.torn = 0
