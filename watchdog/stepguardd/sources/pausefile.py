"""
`touch <run_dir>/PAUSE`: the trigger for those who have a shell and nothing else.

The file pauses the run by its owner's name and with its first line as the reason; taking it away resumes.
A pause that somebody ends otherwise takes the file with it, so that a later `touch` counts again.
"""

import pwd
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..core.events import Event, OperatorAsked
from ..core.state import State
from ..oneline import one_line

NAME: Final = "PAUSE"
REASON_BYTES_MAX: Final = 200


class PauseFile:
    """
    The file of one run.

    Args:
        run_dir: where it may appear.
        state: the state as it is now.
        emit: where the requests go.

    """

    def __init__(self, run_dir: Path, state: Callable[[], State], emit: Callable[[Event], None]) -> None:
        self._path = run_dir / NAME
        self._state = state
        self._emit = emit
        self._there = False

    def look(self) -> None:
        """Ask for a pause when the file has come, for its end when it has gone."""
        paused = self._state().pause is not None
        try:
            status = self._path.lstat()
        except OSError:
            if self._there and paused:
                self._emit(OperatorAsked(verb="resume", who="whoever", why=f"took {NAME} away"))
            self._there = False
            return
        if self._there and not paused:
            with suppress(OSError):
                self._path.unlink()
                self._there = False
            return
        if not self._there and not paused:
            self._emit(OperatorAsked(verb="pause", who=_name(status.st_uid), why=self._reason()))
        self._there = self._state().pause is not None

    def _reason(self) -> str:
        try:
            with self._path.open("rb") as file:
                said = file.read(REASON_BYTES_MAX).decode("utf-8", "replace")
        except OSError:
            said = ""
        return one_line(said.partition("\n")[0]) or f"touch {NAME}"


def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
