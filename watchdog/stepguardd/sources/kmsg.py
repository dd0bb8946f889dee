"""
The kernel's log, live: /dev/kmsg, or `journalctl -k` where that cannot be read.

Promises the messages of the kernel itself, from now on: what a process writes into the log is left out, so
that no one can feign a kernel kill. Messages that were overwritten before they were read are counted. Reading
needs CAP_SYSLOG or root for the one, membership of `systemd-journal` or `adm` for the other; where both fail,
KernelLogError says so.
"""

import errno
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

KMSG = Path("/dev/kmsg")
JOURNALD = Path("/run/systemd/journal/socket")
RECORD_BYTES_MAX = 8192
RECORDS_A_POLL = 1000
_READ_BYTES = 256 * 1024
_LINE_BYTES_MAX = 1024 * 1024

_PREFIX = re.compile(rb"(\d{1,10}),(\d{1,19}),(\d{1,19}),[^;]{0,64};")
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


class KernelLogError(Exception):
    """The kernel's log cannot be read; the message says why and what would help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelMessage:
    """One message of the kernel; `time_s` counts from boot, as the kernel's log does."""

    text: str
    time_s: float | None
    number: int | None = None


class KernelLog(Protocol):
    """What reads the kernel's log."""

    def poll(self) -> tuple[KernelMessage, ...]:
        """Return what came since the last poll, bounded, without waiting; KernelLogError at its end."""
        ...

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when there is something to poll for."""
        ...

    @property
    def lost(self) -> int:
        """How many messages were overwritten or unreadable before they could be read."""
        ...

    def close(self) -> None:
        """Give the log back."""
        ...


def parse_record(record: bytes) -> KernelMessage | None:
    """
    Decode one record of /dev/kmsg; None for what no kernel has written: a process's message, or malformed
    bytes.

    A record is `priority,number,microseconds,flags;text`, then lines of key and value that nobody needs here.
    """
    match = _PREFIX.match(record)
    if match is None or int(match[1]) >> 3 != 0:
        return None
    text = record[match.end() :].partition(b"\n")[0].decode("utf-8", "replace")
    text = _ESCAPE.sub(lambda escaped: chr(int(escaped[1], 16)), text)
    return KernelMessage(text=text, time_s=int(match[3]) / 1e6, number=int(match[2]))


class Kmsg:
    """/dev/kmsg, from its end; see `KernelLog`."""

    def __init__(self, path: Path = KMSG) -> None:
        self.lost = 0
        self._path = path
        self._next: int | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as refused:
            raise KernelLogError(
                f"{path}: {refused.strerror}; give the daemon CAP_SYSLOG, or let it read the journal"
            ) from None

    def poll(self) -> tuple[KernelMessage, ...]:
        """See `KernelLog`."""
        messages = []
        for _ in range(RECORDS_A_POLL):
            try:
                record = os.read(self._fd, RECORD_BYTES_MAX)
            except BlockingIOError:
                break
            except OSError as failed:
                if (
                    failed.errno == errno.EPIPE
                ):  # overwritten under our eyes; the next read goes on behind the gap
                    continue
                if failed.errno == errno.EINVAL:  # a record longer than any that there is; it is skipped
                    self.lost += 1
                    continue
                raise KernelLogError(f"{self._path}: {failed.strerror}") from None
            if not record:
                break
            self._count(record)
            message = parse_record(record)
            if message is not None:
                messages.append(message)
        return tuple(messages)

    def fileno(self) -> int:
        """See `KernelLog`."""
        return self._fd

    def close(self) -> None:
        """See `KernelLog`."""
        os.close(self._fd)

    def _count(self, record: bytes) -> None:
        """Records are numbered without gaps: a gap is a loss."""
        match = _PREFIX.match(record)
        if match is None:
            return
        number = int(match[2])
        if self._next is not None and number > self._next:
            self.lost += number - self._next
        self._next = number + 1


class Journal:
    """`journalctl --dmesg --follow`, a child process that is read without waiting; see `KernelLog`."""

    def __init__(self, command: str = "journalctl") -> None:
        self.lost = 0
        self._rest = b""
        try:
            self._child = subprocess.Popen(
                [command, "--dmesg", "--output=json", "--follow", "--lines=0", "--no-pager", "--quiet"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as refused:
            raise KernelLogError(f"{command}: {refused.strerror}") from None
        assert self._child.stdout is not None
        self._fd = self._child.stdout.fileno()
        os.set_blocking(self._fd, False)

    def poll(self) -> tuple[KernelMessage, ...]:
        """See `KernelLog`."""
        try:
            piece = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return ()
        if not piece:
            raise KernelLogError(f"journalctl has ended (exit code {self._child.poll()})")
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > _LINE_BYTES_MAX:
            self._rest = b""
            self.lost += 1
        messages = [parse_journal_line(line) for line in lines if line]
        self.lost += messages.count(None)
        return tuple(message for message in messages if message is not None)

    def fileno(self) -> int:
        """See `KernelLog`."""
        return self._fd

    def close(self) -> None:
        """See `KernelLog`."""
        self._child.kill()
        self._child.wait(timeout=5)
        if self._child.stdout is not None:
            self._child.stdout.close()


def parse_journal_line(line: bytes) -> KernelMessage | None:
    """Decode one entry of `journalctl -o json`; None where it is none. Odd bytes come as numbers."""
    try:
        entry = json.loads(line)
        message = entry["MESSAGE"]
        text = bytes(message).decode("utf-8", "replace") if isinstance(message, list) else message
        stamp = entry.get("_SOURCE_MONOTONIC_TIMESTAMP")
        time_s = int(stamp) / 1e6 if isinstance(stamp, str) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return KernelMessage(text=text, time_s=time_s) if isinstance(text, str) else None


def open_kernel_log(
    kmsg: Path = KMSG, journalctl: str = "journalctl", journald: Path = JOURNALD
) -> KernelLog:
    """
    Open /dev/kmsg, else the journal; KernelLogError, with both reasons, where neither can be read.

    Without journald there is nothing to follow, as in a container: journalctl would wait for ever, and what
    nobody can see would pass for seen.
    """
    try:
        return Kmsg(kmsg)
    except KernelLogError as first:
        try:
            if not journald.exists():
                raise KernelLogError("no journald runs here")
            return Journal(journalctl)
        except KernelLogError as second:
            raise KernelLogError(f"{first}; {second}") from None
