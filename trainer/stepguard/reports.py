"""
Reports: what must not be missed, one JSON object per datagram to `<run_dir>/reports.sock`.

Promise: sending never blocks and never raises; a report that could not be sent is counted. Reading gives a
report whose every field has the declared type and range, or `BadReport`. Numbers that JSON does not know
travel as the strings "NaN", "Infinity" and "-Infinity", and `float()` takes them back.

Not promised: delivery. The guard repeats `batch` and `ack` while it waits for the answer, so a reader must
take the same batch number, or the same generation, as the same report.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NotRequired, TypedDict, cast

from stepguard.prompts import KEYS_MAX

WIRE_VERSION: Final = 1
REPORT_BYTES_MAX: Final = 65_536
_TEXT_CHARS_MAX: Final = 4_096
_ENTRIES_MAX: Final = 4_096
_ADDRESS_BYTES_MAX: Final = 107

Number = float | Literal["NaN", "Infinity", "-Infinity"]


class RewardStats(TypedDict):
    """Over the live members of a batch."""

    mean: Number
    std: Number
    min: Number
    max: Number


class Hello(TypedDict):
    """A trainer is here; `handles` names the orders that it can carry out in place."""

    v: int
    kind: Literal["hello"]
    attempt: int
    pid: int
    host: str
    version: str
    handles: list[str]


class Batch(TypedDict):
    """
    A batch asks for its verdict.

    `weight_versions` counts rollouts, save those without a version. `began` is the CLOCK_MONOTONIC second
    before which none of its rollouts was sent: a batch that overlapped an outage is not to be trusted.
    """

    v: int
    kind: Literal["batch"]
    attempt: int
    step: int
    batch: int
    ok: int
    failed: int
    dropped_groups: int
    reward: RewardStats | None
    weight_versions: dict[str, int]
    stale: int
    refused: str | None
    began: NotRequired[Number | None]


class Step(TypedDict):
    """An optimizer step was committed."""

    v: int
    kind: Literal["step"]
    attempt: int
    step: int
    reward: Number | None
    metrics: dict[str, Number]
    weight_version: str | None


class Saved(TypedDict):
    """A checkpoint was written; `norms` is the trainer's own proof that it is finite."""

    v: int
    kind: Literal["saved"]
    attempt: int
    step: int
    path: str
    norms: dict[str, Number] | None


class Ack(TypedDict):
    """An order was carried out (`ok`) or tried. After ROLLBACK `attempt` is the new one."""

    v: int
    kind: Literal["ack"]
    attempt: int
    generation: int
    order: Literal["GO", "HOLD", "RESYNC", "ROLLBACK", "SAVE", "STOP"]
    ok: bool
    detail: str


class CallFailed(TypedDict):
    """A bounded call (`guard.call`) failed."""

    v: int
    kind: Literal["call_failed"]
    attempt: int
    what: str
    error: str


class CallsHung(TypedDict):
    """So many of the `calls` of one time hung at once that their actors were spared: see `fuse`."""

    v: int
    kind: Literal["calls_hung"]
    attempt: int
    what: str
    failed: int
    calls: int


class RequestsFailed(TypedDict):
    """Requests failed on their way, so many in a row (see `streak`); 0 when one was answered again."""

    v: int
    kind: Literal["requests_failed"]
    attempt: int
    in_a_row: int
    error: str


class Memory(TypedDict):
    """
    The kernel's kills for memory in the trainer's own cgroup, which a daemon in another cannot see.

    `total` counts since the cgroup was made, `new` since this trainer's last report; its first one has 0.
    `identity` is the inode of the cgroup's folder: in a container every cgroup is called "/".
    """

    v: int
    kind: Literal["memory"]
    attempt: int
    cgroup: str
    identity: int
    total: int
    new: int


class RolloutsLost(TypedDict):
    """
    Rollouts that were under way and failed, by their prompts' keys; and suspects that were answered.

    `began` is the CLOCK_MONOTONIC second at which they were sent: a server that died since died under them.
    """

    v: int
    kind: Literal["rollouts_lost"]
    attempt: int
    began: Number
    lost: list[str]
    answered: list[str]


class Bye(TypedDict):
    """
    The training process ends, and knows why.

    `why` is "finished" at the loop's good end, "stopped" on an order or a signal, "failed" after an error.
    """

    v: int
    kind: Literal["bye"]
    attempt: int
    pid: int
    why: Literal["finished", "stopped", "failed"]
    detail: str


Report = (
    Hello | Batch | Step | Saved | Ack | CallFailed | CallsHung | RequestsFailed | Memory | RolloutsLost | Bye
)


class BadReport(ValueError):  # noqa: N818 - named after what is wrong
    """A datagram that is no report; the message says which field is wrong."""


def parse_report(datagram: bytes) -> Report:
    """
    Read one datagram, trusting nothing.

    Args:
        datagram: what the socket gave; read with a buffer of `REPORT_BYTES_MAX + 1`.

    Returns:
        The report as it was on the wire. Fields that this version does not know are left out.

    Raises:
        BadReport: too long, no JSON object, unknown version or kind, or a field missing, ill-typed or out of
            range.

    """
    if len(datagram) > REPORT_BYTES_MAX:
        raise BadReport(f"longer than {REPORT_BYTES_MAX} bytes")
    try:
        found = json.loads(datagram.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadReport("not JSON") from error
    if not isinstance(found, dict):
        raise BadReport("not a JSON object")
    if found.get("v") != WIRE_VERSION or found["v"] is True:
        raise BadReport("v: unknown version")
    kind = found.get("kind")
    fields = _FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise BadReport("kind: unknown")
    for name, valid in fields.items():
        if name not in found:
            raise BadReport(f"{kind}.{name}: missing")
        if not valid(found[name]):
            raise BadReport(f"{kind}.{name}: ill-typed or out of range")
    optional = _OPTIONAL.get(str(kind), {})
    for name, valid in optional.items():
        if not valid(found.setdefault(name, None)):
            raise BadReport(f"{kind}.{name}: ill-typed or out of range")
    fields = {**fields, **optional}
    report = {"v": WIRE_VERSION, "kind": kind} | {name: found[name] for name in fields}
    return cast("Report", report)


def number(value: float) -> Number:
    """A float as it travels: itself, or the name of what JSON cannot say."""
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def numbers(values: Mapping[str, Any]) -> dict[str, Number]:
    """The numeric entries of a mapping as they travel; what is no number, or too much, is left out."""
    out: dict[str, Number] = {}
    for name, value in values.items():
        if len(out) == _ENTRIES_MAX:
            break
        if isinstance(value, str | bytes):
            continue
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            out[str(name)[:_TEXT_CHARS_MAX]] = number(value)
    return out


class ReportSender:
    """
    Sends reports; one per trainer.

    Args:
        path: the socket, `<run_dir>/reports.sock`; it may appear, vanish and come back.

    Attributes:
        sent: reports handed to the kernel.
        dropped: reports that were not, for whatever cause.
        last_error: the newest cause, in words.

    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.sent = 0
        self.dropped = 0
        self.last_error = ""
        self._socket: socket.socket | None = None

    def send(self, report: Report) -> bool:
        """Hand one report to the kernel without waiting; False (and counted) when it did not go."""
        address = os.fsencode(self.path)
        try:
            if len(address) > _ADDRESS_BYTES_MAX:
                raise OSError(
                    f"the path has {len(address)} bytes, a socket's at most {_ADDRESS_BYTES_MAX};"
                    " shorten run_dir"
                )
            if self._socket is None:
                self._socket = socket.socket(
                    socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
                )
            self._socket.sendto(_encode(report), address)
        except (OSError, ValueError, TypeError) as error:
            self.dropped += 1
            self.last_error = f"{self.path}: {error}"
            return False
        self.sent += 1
        return True

    def close(self) -> None:
        """Close the socket; sending again opens a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _encode(report: Report) -> bytes:
    """The datagram; what may be large and can be done without goes first when it is too long."""
    datagram = json.dumps(report, allow_nan=False, separators=(",", ":")).encode()
    if len(datagram) <= REPORT_BYTES_MAX:
        return datagram
    slim: dict[str, Any] = dict(report)
    for name, nothing in (("metrics", {}), ("norms", None), ("weight_versions", {}), ("detail", "")):
        if name in slim:
            slim[name] = nothing
    datagram = json.dumps(slim, allow_nan=False, separators=(",", ":")).encode()
    if len(datagram) > REPORT_BYTES_MAX:
        raise ValueError(f"a report of {len(datagram)} bytes is too long")
    return datagram


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _text(value: object) -> bool:
    return type(value) is str and len(value) <= _TEXT_CHARS_MAX


def _number(value: object) -> bool:
    if type(value) is str:
        return value in {"NaN", "Infinity", "-Infinity"}
    if type(value) is int:
        return abs(value) < 1 << 63
    return type(value) is float and math.isfinite(value)


def _or_null(valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or valid(value)


def _numbers(value: object) -> bool:
    return (
        type(value) is dict
        and len(value) <= _ENTRIES_MAX
        and all(_text(name) and _number(entry) for name, entry in value.items())
    )


def _counts(value: object) -> bool:
    return (
        type(value) is dict
        and len(value) <= _ENTRIES_MAX
        and all(_text(name) and _count(entry) for name, entry in value.items())
    )


def _reward_stats(value: object) -> bool:
    return type(value) is dict and value.keys() == {"mean", "std", "min", "max"} and _numbers(value)


def _texts(value: object) -> bool:
    return type(value) is list and len(value) <= 16 and all(_text(entry) for entry in value)


def _keys(value: object) -> bool:
    return type(value) is list and len(value) <= KEYS_MAX and all(_text(entry) for entry in value)


def _order(value: object) -> bool:
    return value in {"GO", "HOLD", "RESYNC", "ROLLBACK", "SAVE", "STOP"} if type(value) is str else False


_FIELDS: Final[dict[str, dict[str, Callable[[object], bool]]]] = {
    "hello": {"attempt": _count, "pid": _count, "host": _text, "version": _text, "handles": _texts},
    "batch": {
        "attempt": _count,
        "step": _count,
        "batch": _count,
        "ok": _count,
        "failed": _count,
        "dropped_groups": _count,
        "reward": _or_null(_reward_stats),
        "weight_versions": _counts,
        "stale": _count,
        "refused": _or_null(_text),
    },
    "step": {
        "attempt": _count,
        "step": _count,
        "reward": _or_null(_number),
        "metrics": _numbers,
        "weight_version": _or_null(_text),
    },
    "saved": {"attempt": _count, "step": _count, "path": _text, "norms": _or_null(_numbers)},
    "ack": {
        "attempt": _count,
        "generation": _count,
        "order": _order,
        "ok": lambda v: type(v) is bool,
        "detail": _text,
    },
    "call_failed": {"attempt": _count, "what": _text, "error": _text},
    "requests_failed": {"attempt": _count, "in_a_row": _count, "error": _text},
    "calls_hung": {"attempt": _count, "what": _text, "failed": _count, "calls": _count},
    "memory": {"attempt": _count, "cgroup": _text, "identity": _count, "total": _count, "new": _count},
    "rollouts_lost": {"attempt": _count, "began": _number, "lost": _keys, "answered": _keys},
    "bye": {
        "attempt": _count,
        "pid": _count,
        "why": lambda v: type(v) is str and v in {"finished", "stopped", "failed"},
        "detail": _text,
    },
}
_OPTIONAL: Final[dict[str, dict[str, Callable[[object], bool]]]] = {"batch": {"began": _or_null(_number)}}
