"""A small writer of TensorBoard's event files, for tests."""

import struct
from pathlib import Path

from senses.wandb_writer import blob, number
from stepguardd.sources.reward.tensorboard import masked_crc32c


def framed_event(event: bytes) -> bytes:
    head = struct.pack("<Q", len(event))
    return head + struct.pack("<I", masked_crc32c(head)) + event + struct.pack("<I", masked_crc32c(event))


def scalar_event(step: int, tag: str, value: float, *, time: float = 1.5e9, form: str = "simple") -> bytes:
    if form == "simple":
        content = blob(1, tag) + b"\x15" + struct.pack("<f", value)
    elif form == "double":
        content = blob(1, tag) + blob(8, number(1, 2) + blob(4, struct.pack("<d", value)))
    else:
        content = blob(1, tag) + blob(8, number(1, 1) + blob(5, struct.pack("<f", value)))
    return b"\x09" + struct.pack("<d", time) + number(2, step) + blob(5, blob(1, content))


def write_events(path: Path, events: list[bytes]) -> None:
    with path.open("ab") as file:
        if not file.tell():
            file.write(framed_event(b"\x09" + struct.pack("<d", 1.5e9) + blob(3, "brain.Event:2")))
        for event in events:
            file.write(framed_event(event))
