"""
The wire between the head and the agent of one machine: a line a message, JSON under a keyed hash.

Promise: a side takes only what the other one, who holds the same token, sent on this very connection, in this
order; the token itself never travels. What is sent never waits: an end that does not read loses the
connection. Not promised: secrecy. Rewards and paths can be read on the way; where that matters, let the wire
run through a tunnel.
"""

import asyncio
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

VERSION: Final = 1
LINE_BYTES_MAX: Final = 256 * 1024
UNSENT_BYTES_MAX: Final = 1 << 20
HANDSHAKE_S: Final = 5.0
ALIVE_S: Final = 0.5
"""How often each side says that it lives."""
NODE_NAME: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")

_NONCE_BYTES: Final = 16
_PROOF: Final = re.compile(r"^[0-9a-f]{64}$")
_NONCE: Final = re.compile(r"^[0-9a-f]{32}$")


class WireError(Exception):
    """A connection is over; the message says why, and what helps where something does."""


class TokenError(Exception):
    """The token cannot be used; the message names the file and the remedy."""


class Wire:
    """One connection after its handshake. Made by `call` (agent) or `answer` (head)."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        send_key: bytes,
        receive_key: bytes,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0

    def send(self, message: Mapping[str, object]) -> None:
        """
        Hand a message over, without waiting.

        Raises:
            WireError: it does not fit, or the other end has not read for too long; the connection is over.

        """
        body = json.dumps(message, separators=(",", ":")).encode()
        self._sent += 1
        line = _mac(self._send_key, self._sent, body) + b" " + body + b"\n"
        unsent = self._writer.transport.get_write_buffer_size()
        if len(line) > LINE_BYTES_MAX or unsent > UNSENT_BYTES_MAX:
            self.close()
            raise WireError("the other end does not read what it is sent")
        if self._writer.is_closing():
            raise WireError("the connection is closed")
        self._writer.write(line)

    async def receive(self) -> dict[str, Any]:
        """
        The next message.

        Raises:
            WireError: there is none any more, or it is not the other end's.

        """
        line = await _line(self._reader)
        mac, _, body = line.partition(b" ")
        self._received += 1
        if not hmac.compare_digest(mac, _mac(self._receive_key, self._received, body)):
            raise WireError("a message was changed, repeated or left out on the way")
        return _object(body)

    def close(self) -> None:
        """End the connection; what is under way may be lost."""
        self._writer.close()


async def call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str, node: str) -> Wire:
    """
    The agent's side of the handshake.

    Raises:
        WireError: the head speaks another version, refuses this node, or does not hold the token.

    """
    async with asyncio.timeout(HANDSHAKE_S):
        greeting = _object(await _line(reader))
        if greeting.get("v") != VERSION:
            raise WireError(
                f"the head speaks version {greeting.get('v')!r:.20} of the wire and this agent {VERSION}: "
                "install the same stepguard on every machine"
            )
        theirs, ours = _matching(greeting.get("nonce"), _NONCE), secrets.token_hex(_NONCE_BYTES)
        what = f"{node}|{theirs}|{ours}"
        _write(writer, {"v": VERSION, "node": node, "nonce": ours, "proof": _proof(token, "agent", what)})
        reply = _object(await _line(reader))
        if "refused" in reply:
            raise WireError(f"the head refuses this agent: {str(reply['refused'])[:200]!r}")
        if not hmac.compare_digest(_matching(reply.get("proof"), _PROOF), _proof(token, "head", what)):
            raise WireError("whoever answers there does not hold the token: is it the head?")
    return Wire(
        reader,
        writer,
        send_key=_key(token, "from agent", what),
        receive_key=_key(token, "from head", what),
    )


async def answer(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    token: str,
    refusal: Callable[[str], str | None],
) -> tuple[Wire, str]:
    """
    The head's side of the handshake.

    Args:
        reader: the connection's one half.
        writer: the other.
        token: what both hold.
        refusal: why the node of this name may not join, asked once it has shown that it holds the token.

    Returns:
        The wire, and the node's name.

    Raises:
        WireError: whoever called is no agent of this run.

    """
    async with asyncio.timeout(HANDSHAKE_S):
        ours = secrets.token_hex(_NONCE_BYTES)
        _write(writer, {"v": VERSION, "nonce": ours})
        hello = _object(await _line(reader))
        node, theirs = _matching(hello.get("node"), NODE_NAME), _matching(hello.get("nonce"), _NONCE)
        what = f"{node}|{ours}|{theirs}"
        if not hmac.compare_digest(_matching(hello.get("proof"), _PROOF), _proof(token, "agent", what)):
            _write(writer, {"refused": "it does not hold this run's token (--token-file)"})
            raise WireError(f"{node} does not hold this run's token")
        why = refusal(node)
        if why is not None:
            _write(writer, {"refused": why})
            raise WireError(f"{node}: {why}")
        _write(writer, {"proof": _proof(token, "head", what)})
    wire = Wire(
        reader,
        writer,
        send_key=_key(token, "from head", what),
        receive_key=_key(token, "from agent", what),
    )
    return wire, node


def read_token(path: Path) -> str:
    """
    The token that the head and all agents of a run hold.

    Raises:
        TokenError: no file, not ours alone, or no token in it.

    """
    try:
        if path.stat().st_mode & 0o077:
            raise TokenError(f"{path}: others may read the token; chmod 600 {path}")
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no token"
        raise TokenError(f"{path}: {why}; copy the head's cluster.token here, mode 600") from error
    if len(token) < 32:
        raise TokenError(f"{path}: holds no token of at least 32 characters; the head makes a good one")
    return token


def kept_token(path: Path) -> str:
    """
    The token of this file, which is made where it is absent (head's side).

    Raises:
        TokenError: it cannot be made, or what is there is none.

    """
    if not path.exists():
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TokenError(f"{path}: {error.strerror}; choose another cluster.token_file") from error
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    return read_token(path)


def _proof(token: str, side: str, what: str) -> str:
    return hmac.new(token.encode(), f"stepguard proof|{side}|{what}".encode(), hashlib.sha256).hexdigest()


def _key(token: str, direction: str, what: str) -> bytes:
    return hmac.new(token.encode(), f"stepguard key|{direction}|{what}".encode(), hashlib.sha256).digest()


def _mac(key: bytes, number: int, body: bytes) -> bytes:
    return hmac.new(key, b"%d|%b" % (number, body), hashlib.sha256).hexdigest().encode()


def _write(writer: asyncio.StreamWriter, message: Mapping[str, object]) -> None:
    writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return (await reader.readuntil(b"\n"))[:-1]
    except asyncio.IncompleteReadError:
        raise WireError("the other end closed the connection") from None
    except asyncio.LimitOverrunError:
        raise WireError(f"a line of more than {LINE_BYTES_MAX} bytes: that is no stepguard") from None
    except OSError as error:
        raise WireError(f"the connection broke: {error.strerror or error}") from None


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise WireError("a line that is not JSON: that is no stepguard") from None
    if not isinstance(found, dict):
        raise WireError("a line that is no JSON object: that is no stepguard")
    return found


def _matching(value: object, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        raise WireError("a greeting that no stepguard gives")
    return value
