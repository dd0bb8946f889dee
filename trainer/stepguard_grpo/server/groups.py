"""
Weight-update groups: the scheduler's end of a sync whose handshake dies with the server.

As with an NCCL communicator, membership is a live connection made once, at init: a server that was started
again is in no group until the trainer makes a new one. The tensors come over that connection, in the order in
which the request names them, as little-endian float32. Nothing is encrypted; both ends are on one machine.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CONNECT_TIMEOUT_S = 10.0
RECEIVE_TIMEOUT_S = 30.0
MAX_UPDATE_BYTES = 1 << 30


class GroupError(Exception):
    """The sync did not happen; the message is what the client is told."""


class Groups:
    """The groups that this scheduler is a member of, by name."""

    def __init__(self) -> None:
        self._members: dict[str, socket.socket] = {}

    def join(self, name: str, host: str, port: int) -> None:
        """Connect to the trainer's listener; GroupError when it does not answer or the name is taken."""
        if name in self._members:
            raise GroupError(f"Group {name} is already initialized; destroy it first.")
        try:
            connection = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
        except OSError as error:
            raise GroupError(f"Failed to initialize custom process group: {error}.") from error
        connection.settimeout(RECEIVE_TIMEOUT_S)
        self._members[name] = connection

    def leave(self, name: str) -> None:
        """Close a group; GroupError when there is none of that name."""
        self._member(name)
        self._members.pop(name).close()

    def receive(
        self, name: str, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> dict[str, NDArray[np.float32]]:
        """
        Read the named tensors; GroupError outside the group, and for a broken connection, which ends the
        group.
        """
        connection = self._member(name)
        if not len(names) == len(dtypes) == len(shapes):
            raise GroupError("names, dtypes and shapes differ in length.")
        if any(dtype.removeprefix("torch.") != "float32" for dtype in dtypes):
            raise GroupError("Only float32 tensors are supported by the embedded server.")
        sizes = [math.prod(shape) for shape in shapes]
        if sum(sizes) * 4 > MAX_UPDATE_BYTES:
            raise GroupError(f"Update of {sum(sizes) * 4} bytes; the limit is {MAX_UPDATE_BYTES}.")
        try:
            flat = np.frombuffer(_read_exactly(connection, sum(sizes) * 4), dtype="<f4")
        except OSError as error:
            self._members.pop(name).close()
            raise GroupError(f"Failed to update parameter online: {error}.") from error
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        return {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    def _member(self, name: str) -> socket.socket:
        if name not in self._members:
            raise GroupError(
                f"Group {name} not in {sorted(self._members)}. Please call `init_weights_update_group` first."
            )
        return self._members[name]


def _read_exactly(connection: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionError("the trainer closed the group's connection")
        view = view[count:]
    return buffer
