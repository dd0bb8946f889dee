"""
Messages between the server's parent and its scheduler: a four-byte length, then one JSON object.

Both ends are ours and the socket pair has no name, so nothing is validated beyond its size.
"""

from __future__ import annotations

import json
import struct
from typing import Any

Message = dict[str, Any]

_LENGTH = struct.Struct("<I")
HEADER_BYTES = _LENGTH.size
MAX_MESSAGE_BYTES = 64 << 20


def pack(message: Message) -> bytes:
    """One message, framed; ValueError when it is larger than both ends accept."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {len(body)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    return _LENGTH.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """The length that a header announces; ValueError when no sane peer sent it."""
    (length,) = _LENGTH.unpack(header)
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {length} bytes announced; the limit is {MAX_MESSAGE_BYTES}")
    return int(length)


class Inbox:
    """Bytes as they come, messages as they are whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= HEADER_BYTES:
            end = HEADER_BYTES + body_length(bytes(self._buffer[:HEADER_BYTES]))
            if len(self._buffer) < end:
                break
            messages.append(json.loads(self._buffer[HEADER_BYTES:end]))
            del self._buffer[:end]
        return messages
