"""
Secrets: read from systemd's credentials or from files that only we can read, and never printed.

A `Secret` shows as <secret> wherever it is formatted, logged, dumped or traced; `reveal` is the one way to
its value, and is called in the line that hands it to a peer.
"""

import os
import stat
from pathlib import Path
from typing import Final, NoReturn

BYTES_MAX: Final = 16 * 1024
HIDDEN: Final = "<secret>"
FOLDER: Final = "CREDENTIALS_DIRECTORY"


class CredentialError(Exception):
    """A secret cannot be had. The message is one line: which one, where it was looked for, the remedy."""


class Secret:
    """A value that does not print. Two are equal when their values are; none can be pickled or copied out."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself, for the peer that it is meant for."""
        return self._value

    def hidden_in(self, text: str) -> str:
        """The text without this secret: a peer's answer may repeat what it was sent."""
        for value in (self._value, self._value.rpartition("/")[2]):
            if len(value) >= 6:
                text = text.replace(value, HIDDEN)
        return text

    def __repr__(self) -> str:
        return HIDDEN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written anywhere")


def read_secret(key: str, source: str) -> Secret:
    """
    The secret that a setting names.

    Args:
        key: the setting, for errors.
        source: a file (with a slash in it), or the name of a credential: `<name>` or `secrets_<name>` in
            $CREDENTIALS_DIRECTORY.

    Raises:
        CredentialError: it is not there, others can read it, or there is nothing in it.

    """
    path = _path(key, source)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            _refuse_open_doors(key, path, status)
            raw = file.read(BYTES_MAX + 1)
    except OSError as error:
        raise CredentialError(
            f"{key}: {path} cannot be read ({error.strerror}); see docs/alerts.md"
        ) from None
    if len(raw) > BYTES_MAX:
        raise CredentialError(f"{key}: {path} is larger than {BYTES_MAX // 1024} KiB; is it a secret?")
    try:
        text = raw.decode().strip()
    except UnicodeDecodeError:
        raise CredentialError(f"{key}: {path} is not UTF-8 text") from None
    if not text:
        raise CredentialError(f"{key}: {path} is empty; write the secret into it")
    return Secret(text)


def _path(key: str, source: str) -> Path:
    if "/" in source:
        return Path(source)
    folder = os.environ.get(FOLDER)
    if not folder:
        raise CredentialError(
            f"{key}: {source!r} is the name of a systemd credential, and ${FOLDER} is not set; run under "
            "stepguardd@.service, or name a file of mode 0600 by its path"
        )
    # The unit loads a whole folder as "secrets", and systemd names its files secrets_<file>.
    named = [Path(folder) / name for name in (source, f"secrets_{source}")]
    found = next((path for path in named if path.is_file()), None)
    if found is None:
        raise CredentialError(
            f"{key}: there is no credential {source!r}; put it into the folder that the unit's "
            "LoadCredential names (/etc/stepguard/credentials), mode 0600, and restart the unit"
        )
    return found


def _refuse_open_doors(key: str, path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CredentialError(f"{key}: {path} is no plain file")
    if status.st_uid not in {os.geteuid(), 0}:
        raise CredentialError(f"{key}: {path} belongs to somebody else (uid {status.st_uid}); chown it")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise CredentialError(f"{key}: {path} has mode {mode:04o}, others can read it; chmod 600 {path}")
