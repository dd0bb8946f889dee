"""
The decision log: what was decided in one incident, as a file that decides itself again.

One JSON object a line: first a state, then each event with the commands that came of it. `redecide` feeds the
events to the core of today and compares the commands byte for byte. A difference means another version of the
core, or a bug of it; the log itself cannot lie about that.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import stepguard

from ..core.invariants import InvariantError
from ..core.state import State
from ..journal import (
    JournalError,
    Recorded,
    decode_event,
    decode_state,
    encode_commands,
    encode_event,
    encode_state,
)
from ..oneline import one_line
from .folders import DECISIONS_KIND as KIND
from .passage import Passage, again

VERSION: Final = 1
_LINE_CHARS_MAX: Final = 8 << 20


class DecisionLogError(Exception):
    """The file cannot be decided again; the message names file, line and remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first decision that came out otherwise."""

    seq: int
    event: str
    recorded: str
    decided: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Redecided:
    """What came of deciding a log again."""

    source: str
    incident: int
    decisions: int
    commands: int
    difference: Difference | None

    @property
    def same(self) -> bool:
        """Whether every command came out byte for byte as recorded."""
        return self.difference is None


def write_log(passage: Passage, file: IO[str], *, bytes_max: int) -> int:
    """
    Write a passage as a decision log.

    Args:
        passage: the journal's rows.
        file: where to.
        bytes_max: where it ends at the latest; a log that is cut decides itself as far as it goes.

    Returns:
        How many decisions are in it.

    """
    head = {
        "kind": KIND,
        "version": VERSION,
        "incident": passage.number,
        "written_by": stepguard.__version__,
        "opened_seq": passage.opened.seq,
        "state": json.loads(encode_state(passage.start)),
    }
    written = file.write(_line(head))
    count = 0
    for row in passage.rows:
        came_up = passage.come_up.get(row.seq)
        fields: dict[str, object] = {
            "seq": row.seq,
            "at": row.at,
            "wall": row.wall,
            "event": [type(row.event).__name__, json.loads(encode_event(row.event))],
            "commands": json.loads(encode_commands(row.commands)),
        }
        if came_up is not None:
            fields["came_up"] = json.loads(encode_state(came_up))
        line = _line(fields)
        if written + len(line) > bytes_max:
            break
        written += file.write(line)
        count += 1
    return count


def redecide(path: Path) -> Redecided:
    """
    Decide a log again, up to the first difference.

    Raises:
        DecisionLogError: it is no such log, is broken, or holds what this version does not know.

    """
    try:
        with path.open(encoding="utf-8") as file:
            return _redecide(path, file)
    except OSError as error:
        raise DecisionLogError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DecisionLogError(f"{path}: is not UTF-8 text") from None


def _redecide(path: Path, file: IO[str]) -> Redecided:
    lines = _objects(path, file)
    head = next(lines, None)
    if head is None or head.get("kind") != KIND:
        raise DecisionLogError(f"{path}:1: no decision log of Stepguard")
    if head.get("version") != VERSION:
        raise DecisionLogError(
            f"{path}:1: written in version {head.get('version')} of the log, and this reads {VERSION}; "
            "replay it with the stepguard that wrote it"
        )
    number, state = 1, _state(path, 1, head.get("state"))
    decisions = commands = 0
    difference = None
    for number, line in enumerate(lines, start=2):
        try:
            kind, body = line["event"]
            event = decode_event(kind, json.dumps(body))
            row = Recorded(seq=int(line["seq"]), at=float(line["at"]), wall=0.0, event=event, commands=())
            recorded = _bytes(line["commands"])
            came_up = _state(path, number, line["came_up"]) if "came_up" in line else None
        except (KeyError, TypeError, ValueError, JournalError) as error:
            raise DecisionLogError(f"{path}:{number}: {one_line(str(error), 200)}") from None
        try:
            state, again_decided = again(state, row, came_up)
            decided = encode_commands(again_decided)
        except InvariantError as error:
            decided = f"the core refused it: {error}"
        if decided != recorded:
            difference = Difference(seq=row.seq, event=kind, recorded=recorded, decided=decided)
            break
        decisions += 1
        commands += len(again_decided)
    return Redecided(
        source=str(path),
        incident=int(head.get("incident", 0)),
        decisions=decisions,
        commands=commands,
        difference=difference,
    )


def _objects(path: Path, file: IO[str]) -> Iterator[dict[str, Any]]:
    number = 0
    while line := file.readline(_LINE_CHARS_MAX):
        number += 1
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise DecisionLogError(f"{path}:{number}: is cut short or broken: no JSON object") from None
        if not isinstance(value, dict):
            raise DecisionLogError(f"{path}:{number}: is no JSON object")
        yield value


def _state(path: Path, number: int, value: object) -> State:
    try:
        return decode_state(json.dumps(value))
    except JournalError:
        raise DecisionLogError(
            f"{path}:{number}: the state there is none that this version of Stepguard knows: replay it with "
            "the version that wrote it"
        ) from None


def _bytes(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _line(value: object) -> str:
    return _bytes(value) + "\n"
