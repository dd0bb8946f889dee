"""
The daemon's word to systemd: sd_notify(3), in the few lines it takes.

Under no service manager nothing is sent. A message that cannot be delivered is dropped: systemd draws its own
conclusion from the silence, which is the point of a watchdog.
"""

import os
import socket
from collections.abc import MutableMapping

_SOCKET = "NOTIFY_SOCKET"
_NOT_FOR_CHILDREN = (_SOCKET, "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """
    A way to the service manager.

    Args:
        address: its socket; "@" opens an abstract one. None: nobody listens.

    """

    def __init__(self, address: str | None) -> None:
        self._address = address.replace("@", "\0", 1) if address and address[0] == "@" else address
        self._status = ""

    @classmethod
    def from_env(cls, environ: MutableMapping[str, str] = os.environ) -> "Notifier":
        """The manager that the environment names, taken out of it: a child must not speak in our name."""
        taken = {name: environ.pop(name, None) for name in _NOT_FOR_CHILDREN}
        return cls(taken[_SOCKET])

    def ready(self) -> None:
        """Everything is in place."""
        self._send("READY=1")

    def alive(self, status: str) -> None:
        """The decision loop turns; `status` is one line for people, sent when it is another than the last."""
        lines = ["WATCHDOG=1"]
        if status != self._status:
            self._status = status
            lines.append(f"STATUS={status}")
        self._send("\n".join(lines))

    def stopping(self) -> None:
        """It ends, and means to."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            try:
                sender.sendto(message.encode(), self._address)
            except OSError:
                return
