"""
Who may change something over TCP: the run's token, one-time codes that open the page, and its sessions.

The token lies in a file that only its owner can read. A code is made for somebody the kernel vouches for at
the control socket, is good once and for minutes, and becomes a session that carries their name; a session is
signed with the token, so it outlives the daemon and dies with the file.
"""

import base64
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from stepguardd import clock
from stepguardd.oneline import one_line

CODE_LIFE_S: Final = 300.0
CODES_MAX: Final = 16
SESSION_LIFE_S: Final = 12 * 3600.0
TOKEN_BYTES_MAX: Final = 512
TOKEN_CHARS_MIN: Final = 32


class TokenError(Exception):
    """The token file cannot be used; the message is one line with the remedy."""


class Keys:
    """
    The secrets of one run's page.

    Args:
        token: what the token file holds.

    """

    def __init__(self, token: str) -> None:
        self._token = token
        self._codes: dict[str, tuple[float, str]] = {}

    @classmethod
    def kept_in(cls, path: Path) -> "Keys":
        """
        The token of this file, which is made where it is absent.

        Raises:
            TokenError: others may read it, it is not ours, or it holds no token.

        """
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return cls(_made(path))
        except OSError as error:
            raise TokenError(f"{path}: {error.strerror}; it must be a file of ours") from None
        with os.fdopen(handle, "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in {os.geteuid(), 0}:
                raise TokenError(f"{path}: is not a file of ours; remove it, and a new token is made")
            if stat.S_IMODE(facts.st_mode) & 0o077:
                raise TokenError(f"{path}: others may read it; remove it, and a new token is made")
            token = file.read(TOKEN_BYTES_MAX).decode("ascii", "replace").strip()
        if len(token) < TOKEN_CHARS_MIN or not token.isprintable():
            raise TokenError(f"{path}: holds no token; remove it, and a new one is made")
        return cls(token)

    @classmethod
    def forgotten_at_the_end(cls) -> "Keys":
        """A token that no file keeps."""
        return cls(secrets.token_urlsafe(32))

    def code(self, who: str) -> str:
        """A code that opens one session for `who`, within `CODE_LIFE_S`."""
        now = clock.monotonic()
        self._codes = {code: known for code, known in self._codes.items() if known[0] > now}
        while len(self._codes) >= CODES_MAX:
            del self._codes[next(iter(self._codes))]
        code = secrets.token_urlsafe(24)
        self._codes[code] = (now + CODE_LIFE_S, who)
        return code

    def redeem(self, code: str) -> tuple[str, str] | None:
        """The session that a code opens, and whose it is; None for a code that is used up, old or no code."""
        ends, who = self._codes.pop(code, (0.0, ""))
        if ends <= clock.monotonic():
            return None
        claims = f"{int(clock.wall() + SESSION_LIFE_S)}.{_base64(who.encode())}"
        return f"{claims}.{self._signature(claims)}", who

    def holder(self, bearer: str) -> str | None:
        """Who comes with this token or session; None where it opens nothing."""
        if hmac.compare_digest(bearer.encode(), self._token.encode()):
            return "the holder of the token"
        claims, _, signature = bearer.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(claims).encode()):
            return None
        ends, _, name = claims.partition(".")
        if int(ends) <= clock.wall():
            return None
        who = base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode("utf-8", "replace")
        return f"{one_line(who, 200)}, on the page"

    def _signature(self, claims: str) -> str:
        return _base64(hmac.digest(self._token.encode(), claims.encode(), hashlib.sha256))


def _made(path: Path) -> str:
    token = secrets.token_urlsafe(32)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(token + "\n")
    except OSError as error:
        raise TokenError(f"{path}: cannot be made: {error.strerror}; see web.token_file") from None
    return token


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
