"""
The other end of the control socket: asks a daemon, and waits no longer and reads no more than it should.

A daemon that is gone, refuses, drips or babbles comes out as one of three errors, each with a line for a
person.
"""

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import httpx

from stepguardd import clock
from stepguardd.control.contract import REPLY_BYTES_MAX, Refused, StatusDict, Verb

TIMEOUT_S = 5.0


class NoDaemonError(Exception):
    """Nobody answers at the socket. The message names it."""


class ControlError(Exception):
    """Somebody answered, and not as a daemon does. The message is one line."""


class ControlClient:
    """
    A connection to one daemon.

    Args:
        socket_path: Its control socket.
        timeout_s: For a whole status answer; a wish may take three times as long.

    """

    def __init__(self, socket_path: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        self.socket_path = socket_path
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket_path)),
            base_url="http://stepguard",
            timeout=timeout_s,
            trust_env=False,
            follow_redirects=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def status(self) -> StatusDict:
        """
        How the run is.

        Raises:
            NoDaemonError, ControlError

        """
        return cast("StatusDict", self._call("GET", "status", None, self._timeout_s))

    def ask(self, verb: Verb, why: str = "", args: Mapping[str, object] | None = None) -> dict[str, Any]:
        """
        Tell the daemon a wish; returns when it is accepted, with the daemon's facts about it.

        Raises:
            Refused: the daemon says why not.
            NoDaemonError, ControlError

        """
        return self._call("POST", verb, {"why": why, **(args or {})}, 3 * self._timeout_s)

    def link(self) -> dict[str, Any]:
        """
        A link that opens the run's page once: its `url`, and in how many seconds it is void.

        Raises:
            Refused: there is no page; the message says why.
            NoDaemonError, ControlError

        """
        return self._call("POST", "link", {}, self._timeout_s)

    def _call(
        self, method: str, what: str, body: Mapping[str, object] | None, limit_s: float
    ) -> dict[str, Any]:
        deadline = clock.monotonic() + limit_s
        self._knock()
        try:
            with self._http.stream(method, f"/api/v1/{what}", json=body, timeout=limit_s) as reply:
                content = bytearray()
                for chunk in reply.iter_raw():  # as it comes: with a size it would wait for one
                    content += chunk
                    if len(content) > REPLY_BYTES_MAX:
                        raise ControlError(f"{self.socket_path}: the answer is larger than 1 MiB")
                    if clock.monotonic() > deadline:
                        raise ControlError(f"{self.socket_path}: no whole answer within {limit_s:g} s")
                code = reply.status_code
        except httpx.ConnectError as error:
            raise NoDaemonError(f"{self.socket_path}: {_cause(error)}") from None
        except httpx.TimeoutException:
            raise ControlError(f"{self.socket_path}: no answer within {limit_s:g} s") from None
        except httpx.HTTPError as error:
            raise ControlError(f"{self.socket_path}: {_cause(error)}") from None
        return self._understood(code, bytes(content))

    def _knock(self) -> None:
        """Say plainly that nobody is there; the HTTP library would leave its socket open over it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(self._timeout_s)
            try:
                probe.connect(str(self.socket_path))
            except OSError as error:
                raise NoDaemonError(f"{self.socket_path}: {error.strerror or error}") from None

    def _understood(self, code: int, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ControlError(
                f"{self.socket_path}: the answer is no JSON object; is this a stepguard daemon?"
            )
        if code == 200:
            return answer
        message = str(answer.get("error", f"HTTP status {code}"))
        if code == 409:
            raise Refused(message)
        raise ControlError(message)


def _cause(error: BaseException) -> str:
    """The operating system's own word, from deep inside the HTTP library's."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return str(error) or type(error).__name__
