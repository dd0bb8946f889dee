"""A small writer of W&B's transaction log, for tests: the same records as wandb, without wandb."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from zlib import crc32

BLOCK = 32 * 1024


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def blob(field: int, data: bytes | str) -> bytes:
    data = data.encode() if isinstance(data, str) else data
    return varint(field << 3 | 2) + varint(len(data)) + data


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def framed(records: Sequence[bytes], offset: int) -> bytes:
    """The chunks of `records` for a file that is `offset` bytes long."""
    out = bytearray()
    for record in records:
        rest, first = record, True
        while True:
            left = BLOCK - (offset + len(out)) % BLOCK
            if left < 7:
                out += bytes(left)
                continue
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = (1 if not rest else 2) if first else (4 if not rest else 3)
            out += struct.pack("<IHB", crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
            if not rest:
                break
    return bytes(out)


class WandbWriter:
    """Writes one run's file at once or record by record; `style` is how the writer spells keys."""

    def __init__(
        self, path: Path, *, run_id: str = "abc", version: str = "0.31.0", style: str = "nested"
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._style = style
        self._num = 0
        path.write_bytes(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
        self.record(21, blob(1, blob(1, version + "+0123abc") + blob(2, "0.70.0")))
        self.record(17, blob(1, run_id) + blob(3, "project"))

    def record(self, field: int, content: bytes) -> None:
        self._num += 1
        data = framed([number(1, self._num) + blob(field, content)], self.path.stat().st_size)
        with self.path.open("ab") as file:
            file.write(data)

    def row(self, step: int, values: Mapping[str, object], time: float = 1.5e9) -> None:
        """What `run.log(values)` leaves behind: a summary record, then the history record."""
        items = b"".join(
            blob(1, self._keys(name) + blob(16, json.dumps(value)))
            for name, value in {**values, "_step": step, "_timestamp": time, "_runtime": 1.0}.items()
        )
        self.record(3, items)
        self.record(2, items + blob(2, number(1, step)))

    def exit(self, code: int = 0) -> None:
        self.record(18, number(1, code) if code else b"")

    def _keys(self, name: str) -> bytes:
        if self._style == "key":
            return blob(1, name)
        return b"".join(blob(2, part) for part in name.split("."))
