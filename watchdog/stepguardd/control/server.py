"""
Puts the control API on a Unix socket, and lets in only whom the kernel names and the configuration allows.

The socket is listening before FastAPI is even imported: callers wait in its backlog for that second. The web
server runs inside the daemon's own loop and installs no signal handlers.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepguardd.control.contract import Daemon

if TYPE_CHECKING:
    import uvicorn

    from stepguardd.control.api import Application, Receive, Scope, Send
    from stepguardd.web.keys import Keys
    from stepguardd.web.live import Live

log = logging.getLogger("stepguardd")

BACKLOG = 64
CONNECTIONS_MAX = 64
CLOSE_TIMEOUT_S = 1.0


class ControlSocketError(Exception):
    """The control socket cannot be had. The message is one line with the path and the remedy."""


def allowed_uids(configured: Iterable[int] = ()) -> frozenset[int]:
    """Who may call: the daemon's own user, root, and those of the configuration."""
    return frozenset({os.geteuid(), 0, *configured})


def listen(path: Path) -> socket.socket:
    """
    A listening socket at this path, for owner and group only (mode 0660).

    A socket that a dead daemon left behind is replaced; one that a living daemon serves is not.

    Raises:
        ControlSocketError: taken by a living daemon, not a socket, or the folder does not allow it.

    """
    _clear_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    before = os.umask(0o077)  # nobody may connect between bind and chmod
    try:
        listener.bind(str(path))
        path.chmod(0o660)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ControlSocketError(f"{path}: cannot listen there: {error.strerror or error}") from None
    finally:
        os.umask(before)
    return listener


async def serve_control(
    daemon: Daemon,
    path: Path,
    *,
    uids: frozenset[int],
    page: "Callable[[Application], Coroutine[Any, Any, None]] | None" = None,
    keys: "Keys | None" = None,
) -> None:
    """
    Listen, and serve the control API of this daemon until cancelled.

    Args:
        daemon: Whom the wishes go to.
        path: Where to listen; must not be served already.
        uids: Who may call, see `allowed_uids`.
        page: Serves the same application to browsers, beside the socket, until it is cancelled.
        keys: What opens the page.

    Raises:
        ControlSocketError: the socket cannot be had.

    """
    listener = listen(path)
    ours = path.stat().st_ino
    try:
        app, live = await asyncio.to_thread(_make_app, daemon, keys)
        beside = None if page is None else asyncio.create_task(page(app))
        if beside is not None:
            beside.add_done_callback(_tell_failure)  # a bug of the page ends nothing else
        try:
            await serve(app, listener, uids=uids, live=live)
        finally:
            live.end()
            if beside is not None:
                beside.cancel()
                await asyncio.wait([beside])
    finally:
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == ours:
                path.unlink()


def _tell_failure(page: "asyncio.Task[None]") -> None:
    if not page.cancelled() and (failure := page.exception()) is not None:
        log.error("no page any more: %r; the control socket goes on", failure, exc_info=failure)


async def serve(
    app: "Application",
    listener: socket.socket,
    *,
    uids: frozenset[int] | None,
    live: "Live | None" = None,
    tls: tuple[Path, Path] | None = None,
) -> None:
    """
    Serve an application on this socket until cancelled; then finish running answers, a second at most.

    Args:
        app: what answers.
        listener: where; listening already.
        uids: on a Unix socket, who may call; None on TCP, where the application checks by itself.
        live: streams to end first, since they have no end of their own.
        tls: certificate and key.

    """
    server = await asyncio.to_thread(_make_server, app, uids, tls)
    try:
        await server.serve(sockets=[listener])
    finally:
        if live is not None:
            live.end()
        if server.started:
            await asyncio.wait_for(server.shutdown(), 2 * CLOSE_TIMEOUT_S)


def _make_app(daemon: Daemon, keys: "Keys | None") -> "tuple[Application, Live]":
    from stepguardd.control.api import create_app  # noqa: PLC0415 - half a second of imports, off the loop
    from stepguardd.web.live import Live  # noqa: PLC0415

    live = Live(daemon)
    return create_app(daemon, keys, live), live


def _make_server(
    app: "Application", uids: frozenset[int] | None, tls: tuple[Path, Path] | None
) -> "uvicorn.Server":
    import uvicorn  # noqa: PLC0415 - as above
    from uvicorn.protocols.http.h11_impl import H11Protocol  # noqa: PLC0415

    class PeerCheckedProtocol(H11Protocol):
        """One connection; its application sees the kernel's word on who is at the other end."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type]
            if uids is not None:
                pid, uid, _gid = _peer(transport.get_extra_info("socket"))
                self.app = _vouched(app, uid, pid) if uid in uids else _refuse(uid)

    class Server(uvicorn.Server):
        """Without signal handlers, and without the ten wake-ups a second that look for their marks."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def main_loop(self) -> None:
            await self.on_tick(0)
            await asyncio.get_running_loop().create_future()

    certificate, key = tls if tls is not None else (None, None)
    return Server(
        uvicorn.Config(
            app,
            http=PeerCheckedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=int(CLOSE_TIMEOUT_S),
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
    )


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    """Pid, uid and gid of the process that connected, as the kernel noted them then."""
    size = struct.calcsize("3i")
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid, gid


def _vouched(app: "Application", uid: int, pid: int) -> "Application":
    async def with_peer(scope: "Scope", receive: "Receive", send: "Send") -> None:
        await app({**scope, "peer": (uid, pid)}, receive, send)

    return with_peer


def _refuse(uid: int) -> "Application":
    text = f'{{"error": "uid {uid} may not do this: see allowed_uids in [control] of the configuration"}}'
    body = text.encode()

    async def refuse(_scope: "Scope", _receive: "Receive", send: "Send") -> None:
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return refuse


def _clear_stale(path: Path) -> None:
    if not path.is_socket():
        if path.exists():
            raise ControlSocketError(
                f"{path}: is in the way and is not a socket; move it, or set another run_dir"
            )
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except OSError as error:
            raise ControlSocketError(f"{path}: cannot tell whose it is: {error.strerror or error}") from None
    raise ControlSocketError(
        f"{path}: a daemon is already running there; see: stepguard status --run-dir {path.parent}"
    )
