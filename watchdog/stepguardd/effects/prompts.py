"""The two files that tell the guard, and people, which prompts are under suspicion and which are withheld."""

import contextlib
import logging
import os
from pathlib import Path

from stepguard.prompts import QUARANTINE_FILE, SUSPECTS_FILE, names_in

from ..core.commands import MarkPrompts

log = logging.getLogger("stepguardd")

_QUARANTINE_HEAD = "# Prompts that the guard does not send, a key a line. Take a line out to send it again."
_SUSPECTS_HEAD = "# Prompts in flight at every one of the server's last crashes: the guard sends them apart."


def mark(run_dir: Path, command: MarkPrompts) -> None:
    """
    Write both files, each in one step; what people wrote into the quarantine stays.

    A disk that refuses is said in the log: the run goes on, and the next crash marks again.
    """
    try:
        if command.quarantine is not None:
            _quarantine(run_dir / QUARANTINE_FILE, command.quarantine)
        suspects = run_dir / SUSPECTS_FILE
        if command.suspects:
            _replace(suspects, "\n".join((_SUSPECTS_HEAD, *command.suspects)))
        else:
            suspects.unlink(missing_ok=True)
    except OSError as error:
        log.error("%s: cannot be written: %s", error.filename or run_dir, error.strerror or error)


def _quarantine(file: Path, prompt: str) -> None:
    if prompt in names_in(file):
        return
    text = _QUARANTINE_HEAD
    with contextlib.suppress(FileNotFoundError):
        text = file.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n")
    _replace(file, f"{text}\n{prompt}")


def _replace(file: Path, text: str) -> None:
    following = file.with_name(f".{file.name}.new")
    with following.open("w", encoding="utf-8", errors="surrogateescape") as out:
        out.write(text + "\n")
        out.flush()
        os.fsync(out.fileno())
    following.replace(file)
