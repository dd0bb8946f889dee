"""
The pieces of logs that belong to an incident: of servers and the trainer by place, of the kernel by time.

Copied without secrets and bounded in size; what cannot be read is said in one line and never an error.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from ..redaction import redacted
from ..sources.kmsg import KMSG, RECORD_BYTES_MAX, KernelMessage, parse_journal_line, parse_record
from ..sources.signatures import SIGNATURES
from .collected import LogSpan

LEAD_BYTES: Final = 64 << 10
KERNEL_LEAD_S: Final = 120.0
KERNEL_LINES_MAX: Final = 400
_LINE_CHARS_MAX: Final = 2000
_JOURNALCTL_TIMEOUT_S: Final = 15.0
_STAMP: Final = re.compile(r"\[?(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:[.,](\d{1,6}))?")
_KERNEL_WORTH: Final = re.compile(
    r"oom-kill:|invoked oom-killer|killed process|\bxid\b|nvrm|nvlink|hung task|segfault|\becc\b|i/o error|"
    r"blocked for more than|machine check|thermal|link is down|no space",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSlice:
    """
    A piece of a log.

    Args:
        name: whose.
        path: the whole log, on its machine.
        lines: what was written around the incident, without secrets.
        before: how many of the lines are from before the opening.
        signs: lines with a known meaning: index, meaning, and the wall time that the line says.

    """

    name: str
    path: str
    lines: tuple[str, ...]
    before: int
    signs: tuple[tuple[int, str, float | None], ...] = ()


def cut_out(name: str, span: LogSpan, *, bytes_max: int) -> LogSlice | str:
    """The part of a log, or why there is none."""
    path = Path(span.path)
    try:
        lead, body = _read(path, span, bytes_max)
    except OSError as error:
        return f"the log of {name} ({path}) cannot be read: {error.strerror}"
    first, rest = _lines(lead), _lines(body)
    lines = (*first, *rest)
    return LogSlice(name=name, path=span.path, lines=lines, before=len(first), signs=tuple(_signs(lines)))


def _read(path: Path, span: LogSpan, bytes_max: int) -> tuple[bytes, bytes]:
    """What stands before the opening, and what came after it; a log that was turned over is found again."""
    size = path.stat().st_size
    lead_bytes = min(LEAD_BYTES, bytes_max // 2)
    if size < span.opened_at:  # turned over since: the beginning is in the older one
        older = path.with_suffix(path.suffix + ".1")
        lead = b""
        with suppress(OSError):
            lead = _piece(older, max(0, span.opened_at - lead_bytes), lead_bytes)
        return lead, _ends(path, 0, size, bytes_max - len(lead))
    begin = max(0, span.opened_at - lead_bytes)
    lead = _piece(path, begin, span.opened_at - begin)
    if begin and b"\n" in lead:
        lead = lead.partition(b"\n")[2]  # the first line is cut
    end = size if span.ended_at is None or span.ended_at < span.opened_at else min(size, span.ended_at)
    return lead, _ends(path, span.opened_at, end, bytes_max - len(lead))


def _ends(path: Path, begin: int, end: int, bytes_max: int) -> bytes:
    """A stretch of a file; of one that is too long its beginning and its end."""
    if end - begin <= bytes_max:
        return _piece(path, begin, end - begin)
    half = bytes_max // 2
    gap = f"\n[… {end - begin - 2 * half} bytes left out …]\n".encode()
    return _piece(path, begin, half) + gap + _piece(path, end - half, half)


def _piece(path: Path, begin: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(size)


def _lines(data: bytes) -> tuple[str, ...]:
    return tuple(_plain(line) for line in data.decode("utf-8", "replace").splitlines())


def _plain(line: str) -> str:
    """One line for people: no control characters, not endless, no secrets."""
    shown = "".join(char if char.isprintable() or char == "\t" else "·" for char in line[:_LINE_CHARS_MAX])
    return redacted(shown.rstrip())


def _signs(lines: tuple[str, ...]) -> Iterator[tuple[int, str, float | None]]:
    for index, line in enumerate(lines):
        raw = line.encode("utf-8", "replace")
        for signature in SIGNATURES:
            if signature.needle in raw and signature.facts(raw) is not None:
                yield index, signature.sign.value, stamp(line)
                break


def stamp(line: str) -> float | None:
    """The wall time that a line begins with, read as this machine's local time; None where there is none."""
    match = _STAMP.search(line[:80])
    if match is None:
        return None
    try:
        told = datetime.fromisoformat(match[1].replace(" ", "T")).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    return told + (float(f"0.{match[2]}") if match[2] else 0.0)


# --- The kernel


def kernel_slice(
    *, since: float, until: float, since_wall: float, opened: float, kmsg: Path = KMSG
) -> LogSlice | str:
    """
    What the kernel said about memory, GPUs and disks, by the monotonic clock.

    Args:
        since: where to begin.
        until: where to end.
        since_wall: the same beginning in wall time, for `journalctl`.
        opened: when the incident was opened.
        kmsg: the kernel's log.

    """
    messages = _from_kmsg(kmsg)
    source = str(kmsg)
    if messages is None:
        messages, source = _from_journalctl(since_wall), "journalctl -k"
    if messages is None:
        return "the kernel's log cannot be read (needs root, CAP_SYSLOG, or the group adm)"
    found = [
        message
        for message in messages
        if message.time_s is not None
        and since <= message.time_s <= until
        and _KERNEL_WORTH.search(message.text)
    ][-KERNEL_LINES_MAX:]
    lines = tuple(f"[{message.time_s:12.6f}] {_plain(message.text)}" for message in found)
    before = sum(message.time_s is not None and message.time_s < opened for message in found)
    return LogSlice(name="kernel", path=source, lines=lines, before=before, signs=tuple(_signs(lines)))


def _from_kmsg(path: Path) -> list[KernelMessage] | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    messages = []
    try:
        for _ in range(200_000):
            try:
                record = os.read(fd, RECORD_BYTES_MAX)
            except BlockingIOError:
                break
            except BrokenPipeError:  # overwritten under our eyes; the next read goes on behind the gap
                continue
            if not record:
                break
            if (message := parse_record(record)) is not None:
                messages.append(message)
    except OSError:
        return None
    finally:
        os.close(fd)
    return messages


def _from_journalctl(since_wall: float) -> list[KernelMessage] | None:
    command = [
        "journalctl",
        "--dmesg",
        "--output=json",
        "--no-pager",
        "--quiet",
        f"--since=@{since_wall:.0f}",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_JOURNALCTL_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    found = (parse_journal_line(line) for line in done.stdout.splitlines() if line)
    return [message for message in found if message is not None]


# --- A server's /metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One metric of a server before the incident and after it; None: not told."""

    server: str
    name: str
    before: float | None
    after: float | None


def metric_figures(server: str, before: str | None, after: str | None, *, most: int = 24) -> list[Figure]:
    """The metrics that moved, each summed over its labels; those that people know first."""
    old, new = _totals(before), _totals(after)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    names.sort(key=lambda name: (_KNOWN.index(name) if name in _KNOWN else len(_KNOWN), name))
    return [
        Figure(server=server, name=name, before=old.get(name), after=new.get(name)) for name in names[:most]
    ]


_KNOWN: Final = [
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "sglang:token_usage",
    "sglang:num_used_tokens",
    "sglang:gen_throughput",
    "sglang:cache_hit_rate",
    "sglang:num_requests_total",
    "sglang:num_aborted_requests_total",
    "sglang:prompt_tokens_total",
    "sglang:generation_tokens_total",
]


def _totals(text: str | None) -> dict[str, float]:
    totals: dict[str, float] = {}
    for line in (text or "").splitlines():
        if not line or line.startswith("#"):
            continue
        name = line.partition("{")[0].partition(" ")[0]
        if name.endswith(("_bucket", "_created")):
            continue
        try:
            value = float(line.rpartition(" ")[2])
        except ValueError:
            continue
        totals[name] = totals.get(name, 0.0) + value
    return totals


def read_metrics_files(folder: Path, servers: Mapping[str, object] | list[str]) -> list[Figure]:
    """The figures of each server out of the scrapes that the daemon kept in the incident's folder."""
    figures = []
    for server in servers:
        texts = [_text(folder / "metrics" / f"{server}-{when}.txt") for when in ("before", "after")]
        if any(text is not None for text in texts):
            figures += metric_figures(server, texts[0], texts[1])
    return figures


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def slice_text(found: LogSlice) -> str:
    """A slice as a file of its own."""
    head = json.dumps({"log": found.path, "lines_before_opening": found.before})
    return f"# {head}\n" + "\n".join(found.lines) + "\n"
