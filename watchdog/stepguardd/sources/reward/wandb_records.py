"""
The records of a W&B log, as far as a metric stream needs them: header, run, history rows, exit.

Field numbers were read off wandb 0.31's own message descriptors; keys come as `key` (older writers) or as the
list `nested_key` (0.31, for flat keys too). Promises that malformed bytes end in WireError. Values stay as
they were logged: NaN and infinities are values, null is unknown, text, lists and objects are no metrics and
are left out.
"""

import struct
from dataclasses import dataclass

from stepguardd.sources.reward.rows import WORDS, Row, whole
from stepguardd.sources.reward.wire import WireError, fields, signed, varint, zigzag

GLOBAL_STEP = "train/global_step"
"""The step key of transformers and everything built on it."""

# Fields of a record, of a history item, and two encoded tags of the latter.
_NUM, _HISTORY, _RUN, _EXIT, _HEADER = 1, 2, 17, 18, 21
_KEY, _NESTED_KEY, _NONE, _BOOLEAN, _INTEGER, _DOUBLE, _JSON_VALUE = 1, 2, 3, 4, 5, 6, 16
_ITEM = 0x0A
_HISTORY_TAG, _SUMMARY_TAG = 0x12, 0x1A
# How a value_json of each length that fits one byte begins: its tag and that length.
_VALUE_HEADS = {length: b"\x82\x01" + bytes([length]) for length in range(128)}
_NAMES_MAX = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Who wrote the file: the version of wandb, such as "0.31.0"."""

    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Which run the file belongs to."""

    run_id: str
    project: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """The run was finished, not killed."""

    code: int


Content = tuple[Row, ...] | Header | Run | Exit | None
"""What of a record is of use here."""


class RecordParser:
    """Turns records into content; keeps nothing but a table of the names seen."""

    def __init__(self, step_key: str | None = None) -> None:
        self._step_key = step_key or GLOBAL_STEP
        self._own_step_counts = step_key is None
        self._names: dict[bytes, str] = {}

    def parse(self, data: bytes) -> tuple[int, Content]:
        """Decode one record: its running number (0 where it has none) and its content. Raises WireError."""
        try:
            return self._parse(data)
        except (IndexError, struct.error, UnicodeDecodeError) as broken:
            raise WireError(str(broken)) from None

    def _parse(self, data: bytes) -> tuple[int, Content]:
        num = at = 0
        end = len(data)
        if data[:1] == b"\x08":  # the number comes first, and what follows it decides
            num, at = (data[1], 2) if data[1] < 0x80 else varint(data, 1)
            tag = data[at]
            if tag == _SUMMARY_TAG:  # every other record is one, and nothing of use is behind it
                return signed(num), None
            if tag == _HISTORY_TAG:
                length, begun = varint(data, at + 1)
                if begun + length <= end:
                    return signed(num), self._history(data, begun, begun + length)
        while at < end:
            tag, at = varint(data, at)
            value, at = varint(data, at)
            field = tag >> 3
            if tag & 7 == 0:
                if field == _NUM:
                    num = value
                continue
            if tag & 7 != 2 or at + value > end:
                raise WireError("a record holds whole varints and messages only")
            stop = at + value
            if field == _HISTORY:
                return signed(num), self._history(data, at, stop)
            if field == _HEADER:
                return signed(num), _header(data[at:stop])
            if field == _RUN:
                return signed(num), _run(data[at:stop])
            if field == _EXIT:
                return signed(num), _exit(data[at:stop])
            at = stop
        return signed(num), None

    def _history(self, data: bytes, at: int, end: int) -> tuple[Row, ...]:
        """Decode a history record: one row for each number in it, private keys left out."""
        names, heads = self._names, _VALUE_HEADS
        pairs: list[tuple[str, float | None]] = []
        while at < end:
            tag, length = data[at], data[at + 1]
            at += 2
            if length >= 0x80:
                length, at = varint(data, at - 1)
            stop = at + length
            if stop > end:
                raise WireError("a history item is cut off")
            if tag == _ITEM:  # the other field is the step, which is an item as well
                # A plain item by hand, since this is where all the time goes: one short key, one short
                # value_json.
                key_end = at + 2 + data[at + 1]
                text_at = key_end + 3
                if data[key_end:text_at] == heads.get(stop - text_at):
                    key = data[at + 2 : key_end]
                    try:
                        value: float | None = float(data[text_at:stop])
                    except ValueError:
                        text = data[text_at:stop]
                        if text not in WORDS:
                            at = stop
                            continue
                        value = WORDS[text]
                    pairs.append((names.get(key) or self._learn(key), value))
                elif (item := _any_item(data[at:stop])) is not None:
                    pairs.append(item)
            at = stop
        return self._rows(pairs)

    def _learn(self, key: bytes) -> str:
        name = key.decode()
        if len(self._names) < _NAMES_MAX:
            self._names[key] = name
        return name

    def _rows(self, pairs: list[tuple[str, float | None]]) -> tuple[Row, ...]:
        """Give every public value of a history record the step and the time of that record."""
        values = dict(pairs)
        step = values.get(self._step_key)
        if step is None and self._own_step_counts:
            step = values.get("_step")
        number = whole(step)
        time = values.get("_timestamp")
        # As Row(…) does, without its detour over a Python function.
        return tuple([_new_row(Row, (number, name, value, time)) for name, value in pairs if name[:1] != "_"])


_new_row = tuple.__new__


def _any_item(data: bytes) -> tuple[str, float | None] | None:
    """Decode an item of any shape; None for one that holds no number."""
    names: list[str] = []
    value: float | None = None
    numeric = False
    for field, content in fields(data):
        if isinstance(content, bytes):
            if field in {_KEY, _NESTED_KEY}:
                names.append(content.decode())
            elif field == _JSON_VALUE:
                numeric, value = _number(content)
            elif field == _DOUBLE and len(content) == 8:
                numeric, value = True, struct.unpack("<d", content)[0]
        elif field in {_NONE, _BOOLEAN, _INTEGER}:
            numeric = True
            value = None if field == _NONE else float(zigzag(content) if field == _INTEGER else content)
    return (".".join(names), value) if numeric and names else None


def _number(text: bytes) -> tuple[bool, float | None]:
    try:
        return True, float(text)
    except ValueError:
        return text in WORDS, WORDS.get(text)


def _header(data: bytes) -> Header:
    for field, content in fields(data):
        if field == 1 and isinstance(content, bytes):
            for inner, text in fields(content):
                if inner == 1 and isinstance(text, bytes):
                    return Header(version=text.decode().partition("+")[0])
    return Header(version="")


def _run(data: bytes) -> Run:
    run_id = project = ""
    for field, content in fields(data):
        if isinstance(content, bytes):
            if field == 1:
                run_id = content.decode()
            elif field == 3:
                project = content.decode()
    return Run(run_id=run_id, project=project)


def _exit(data: bytes) -> Exit:
    return Exit(
        code=next(
            (signed(value) for field, value in fields(data) if field == 1 and isinstance(value, int)), 0
        )
    )
