"""
The protobuf wire format, as much of it as reading a log needs: varints and length-delimited fields.

Promises that malformed bytes end in WireError, never in an endless loop or another exception. It knows no
message types and writes nothing.
"""

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

_SHIFTS = range(7, 70, 7)


class WireError(ValueError):
    """The bytes are no protobuf message."""


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode the unsigned varint at `at`; return it and the index behind it."""
    try:
        value = data[at]
        if value < 0x80:
            return value, at + 1
        value &= 0x7F
        for shift in _SHIFTS:
            at += 1
            byte = data[at]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at + 1
    except IndexError:
        raise WireError("a varint is cut off") from None
    raise WireError("a varint is longer than ten bytes")


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield each field's number and its value: an integer for a varint, the raw bytes for everything else."""
    at, end = 0, len(data)
    while at < end:
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == VARINT:
            value, at = varint(data, at)
            yield tag >> 3, value
            continue
        if kind == BYTES:
            length, at = varint(data, at)
        elif kind == FIXED64:
            length = 8
        elif kind == FIXED32:
            length = 4
        else:
            raise WireError(f"wire type {kind} is not known")
        if at + length > end:
            raise WireError("a field is cut off")
        yield tag >> 3, data[at : at + length]
        at += length


def signed(value: int) -> int:
    """Read an int64 out of its varint."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def zigzag(value: int) -> int:
    """Read a sint64 out of its varint."""
    return (value >> 1) ^ -(value & 1)
