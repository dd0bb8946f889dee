"""
Puts the page on its TCP port, in the daemon's own loop; whatever is wrong with it never stops the daemon.

A port that is taken is asked for again until it is free: another run may end.
"""

import asyncio
import contextlib
import errno
import logging
import socket
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stepguardd.config.settings import WebSettings, split_listen
from stepguardd.control.server import BACKLOG, serve
from stepguardd.web.keys import Keys, TokenError

if TYPE_CHECKING:
    from stepguardd.control.api import Application

log = logging.getLogger("stepguardd")

AGAIN_AFTER_S: Final = 10.0
TOKEN_NAME: Final = "web.token"  # noqa: S105 - a file's name


class PageServer:
    """
    The page of one run.

    Args:
        settings: where and how.
        state_dir: where the token lies when nobody says.

    """

    def __init__(self, settings: WebSettings, state_dir: Path) -> None:
        self._settings = settings
        self.url: str | None = None
        self.failure: str | None = None
        self.keys = Keys.forgotten_at_the_end()
        if not settings.enabled:
            return
        try:
            self.keys = Keys.kept_in(settings.token_file or state_dir / TOKEN_NAME)
        except TokenError as error:
            self.failure = str(error)
            log.error("no page: %s", error)

    def facts(self) -> dict[str, object]:
        """Where it is, or why it is not there."""
        return {"url": self.url, "failure": self.failure}

    async def serve(self, app: "Application") -> None:
        """Serve this application to browsers until cancelled."""
        if not self._settings.enabled or self.failure is not None:
            return
        from stepguardd.web.doors import Doors  # noqa: PLC0415 - with FastAPI, which is there by now

        address, port = split_listen(self._settings.listen)
        tls = self._settings.tls_cert, self._settings.tls_key
        listener = await self._listen(address, port)
        shown = f"[{address}]" if address.version == 6 else str(address)
        doors = Doors(
            app,
            self.keys,
            hosts=("localhost", str(address), "127.0.0.1", "::1", *self._settings.allowed_hosts),
            reads_are_open=address.is_loopback,
        )
        self.url = f"{'http' if tls[0] is None else 'https'}://{shown}:{listener.getsockname()[1]}"
        log.info("page: %s; open it with: stepguard open", self.url)
        try:
            pair = None if tls[0] is None or tls[1] is None else (tls[0], tls[1])
            await serve(doors, listener, uids=None, tls=pair)
        except OSError as error:  # a certificate that cannot be read; the port is ours already
            self.url, self.failure = None, f"web.tls_cert, web.tls_key: {error.strerror or error}"
            log.error("no page: %s", self.failure)
        finally:
            listener.close()

    async def _listen(self, address: IPv4Address | IPv6Address, port: int) -> socket.socket:
        while True:
            try:
                listener = listening(address, port)
            except OSError as error:
                taken = error.errno == errno.EADDRINUSE
                why = "another run's page? set web.listen" if taken else error.strerror or str(error)
                failure = f"{address}:{port} is {'taken' if taken else 'not to be had'}: {why}"
                if failure != self.failure:
                    log.warning("no page yet: %s", failure)
                self.failure = failure
                await asyncio.sleep(AGAIN_AFTER_S)
            else:
                self.failure = None
                return listener


def listening(address: IPv4Address | IPv6Address, port: int) -> socket.socket:
    """A socket that listens there and sends what it has at once. Raises OSError."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle on for its connections: 40 ms more for each answer of two packets.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    with contextlib.ExitStack() as undo:
        undo.callback(listener.close)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(address), port))
        listener.listen(BACKLOG)
        undo.pop_all()
    return listener
