"""
What logs and kernel logs say: each kind of line once, with its first place, its time and how often.

Reads line by line and keeps nothing but counts; a line of any length, and a log of any size up to a bound, is
fine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from stepguardd.core.diagnosis import Evidence, Fact
from stepguardd.core.signs import Sign
from stepguardd.oneline import one_line
from stepguardd.sources.signatures import SIGNATURES

__all__ = ["line_evidence", "log_evidence"]

_LOG_BYTES_MAX = 512 << 20
_LINE_BYTES_MAX = 4096
_QUOTE_CHARS = 160
_TIME = re.compile(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d|^\[ *\d+\.\d+\]|^\w{3} +\d+ \d\d:\d\d:\d\d")

_FACTS: dict[Sign, Fact] = {
    Sign.SCHEDULER_CRASHED: Fact.SERVER_CRASHED,
    Sign.DETOKENIZER_CRASHED: Fact.SERVER_CRASHED,
    Sign.SCHEDULER_EXCEPTION: Fact.SERVER_CRASHED,
    Sign.CHILD_FAILED: Fact.SERVER_CRASHED,
    Sign.SEGFAULT: Fact.SERVER_CRASHED,
    Sign.SCHEDULER_HUNG: Fact.SERVER_HUNG,
    Sign.HEALTH_FAILED: Fact.SERVER_HUNG,
    Sign.CUDA_OOM: Fact.GPU_OOM,
    Sign.POOL_TOO_SMALL: Fact.GPU_OOM,
    Sign.CUDA_ERROR: Fact.GPU_FAULT,
    Sign.XID: Fact.GPU_FAULT,
    Sign.KV_EXHAUSTED: Fact.KV_FULL,
    Sign.NCCL_TIMEOUT: Fact.COLLECTIVE_TIMEOUT,
    Sign.NCCL_ERROR: Fact.NETWORK_FAULT,
    Sign.CONNECTION_REFUSED: Fact.SERVER_UNREACHABLE,
    Sign.CONNECTION_RESET: Fact.SERVER_UNREACHABLE,
    Sign.RAY_ACTOR_DIED: Fact.WORKER_DIED,
    Sign.RAY_NODE_DIED: Fact.WORKER_DIED,
    Sign.RAY_MEMORY_KILL: Fact.HOST_OOM,
    Sign.HOST_OOM_KILL: Fact.HOST_OOM,
    Sign.DISK_FULL: Fact.DISK_FULL,
}
# A trainer's own words have no fixed form, so these are broad, and weigh less.
_WORDS: tuple[tuple[Fact, re.Pattern[bytes]], ...] = (
    (
        Fact.GRADER_ERROR,
        re.compile(
            rb"\b(reward|grader|verifier|scor(?:er|ing))\w*\W.{0,60}(exception|error|traceback|failed)"
        ),
    ),
    (
        Fact.NAN_LINE,
        re.compile(
            rb"\b(loss|grad(?:_norm|ient)?s?)\b.{0,24}\b(?:nan|inf)\b|\bnan\b.{0,24}\b(?:loss|grad)|non-?finite"
        ),
    ),
    (
        Fact.DATA_ERROR,
        re.compile(rb"\b(data ?set|data ?loader|environment|env)\b.{0,60}(exception|error|failed|corrupt)"),
    ),
    (
        Fact.WEIGHTS_FAILED,
        re.compile(rb"update_weights\w*.{0,60}(fail|error)|weight (?:sync|update)\w*.{0,40}(fail|error)"),
    ),
    (
        Fact.TRAINING_WENT_ON,
        re.compile(rb"(weights?|optimi[sz]er|policy).{0,40}(update|step|sync)\w*.{0,24}success"),
    ),
    (
        Fact.NETWORK_FAULT,
        re.compile(rb"no route to host|network is unreachable|name or service not known|name resolution"),
    ),
    (Fact.HOST_OOM, re.compile(rb"oom-kill:|oom_kill\b|memory cgroup out of memory")),
)


def log_evidence(logs: Sequence[Path]) -> Iterator[Evidence]:
    """
    The evidence in logs and kernel logs.

    Raises:
        OSError: one of them cannot be read.

    """
    lines, memory = 0, False
    for path in logs:
        found: dict[Fact, tuple[int, bytes, int]] = {}
        for number, line in _lines(path):
            lines += 1
            for fact in _facts(line):
                first, text, count = found.get(fact, (number, line, 0))
                found[fact] = (first, text, count + 1)
        for fact, (number, line, count) in found.items():
            memory = memory or fact in {Fact.HOST_OOM, Fact.GPU_OOM}
            yield _piece(path.name, fact, number, line, count)
    if lines and not memory:
        names = ", ".join(path.name for path in logs[:3]) + (" and others" if len(logs) > 3 else "")
        yield Evidence(
            fact=Fact.NO_OOM_LINES,
            time="whole log",
            source=names,
            text=f"no out-of-memory line in {lines} lines",
        )


def line_evidence(source: str, lines: Sequence[str]) -> Iterator[Evidence]:
    """The evidence in lines that were cut out of a log."""
    found: dict[Fact, tuple[int, bytes, int]] = {}
    for number, text in enumerate(lines, start=1):
        line = text.encode("utf-8", "replace")[:_LINE_BYTES_MAX]
        for fact in _facts(line):
            first, told, count = found.get(fact, (number, line, 0))
            found[fact] = (first, told, count + 1)
    for fact, (number, line, count) in found.items():
        yield _piece(source, fact, number, line, count)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    read = 0
    with path.open("rb") as file:
        number = 0
        while read < _LOG_BYTES_MAX:
            line = file.readline(_LINE_BYTES_MAX)
            if not line:
                return
            read += len(line)
            number += 1
            yield number, line
            while not line.endswith(b"\n") and line:  # the rest of a very long line says nothing more
                line = file.readline(1 << 16)
                read += len(line)


def _facts(line: bytes) -> set[Fact]:
    facts = {
        fact
        for signature in SIGNATURES
        if signature.needle in line
        and (fact := _FACTS.get(signature.sign)) is not None
        and signature.facts(line) is not None
    }
    lowered = line.lower()
    facts.update(fact for fact, pattern in _WORDS if pattern.search(lowered))
    return facts


def _piece(source: str, fact: Fact, number: int, line: bytes, count: int) -> Evidence:
    match = _TIME.search(line)
    time = match.group().decode("ascii", "replace").strip("[] ") if match else "time not logged"
    text = one_line(line.decode("utf-8", "replace"), _QUOTE_CHARS)
    times = "once" if count == 1 else f"{count} times"
    return Evidence(fact=fact, time=time, source=f"{source}:{number}", text=f"“{text}” ({times})")
