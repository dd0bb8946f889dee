"""One log that is followed, from where an earlier daemon stood; its lines as what they mean."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..control.contract import LogDict
from ..sources.logs import LogError, LogFollower, LogMatch
from .host import INTERVAL_S

ABSENT_MAX_S: Final = 4.0
POSITION_KEPT_EACH_BYTES: Final = 4 * 1024 * 1024
"""So far into a log that says nothing its position is kept anew: a restart reads no more than that again."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What was read of a log at one look; the position is None where it need not be kept."""

    matches: tuple[LogMatch, ...] = ()
    position: str | None = None


class FollowedLog:
    """
    One log that is followed; None is the trainer's.

    From where an earlier daemon stood, else from its end: what it said before anybody watched is history.
    One that is not there is looked for ever more rarely: it is read from its start whenever it comes.
    """

    def __init__(self, server: str | None, path: Path) -> None:
        self.server = server
        self.cause: str | None = None
        self.due = 0.0
        self._lines = 0
        self._absent_s = 0.0
        self._path = path
        self._follower: LogFollower | None = None
        self._kept: tuple[object, int] | None = None

    def poll(self, stood: str | None, now: float) -> Piece:
        """
        What it says that means something; nothing while it cannot be read.

        Args:
            stood: the position that is kept, of this daemon or an earlier one.
            now: the time of the look.

        """
        piece = self._read(stood)
        absent = self._follower is None or self._follower.absent
        self._absent_s = min(max(2.0 * self._absent_s, INTERVAL_S), ABSENT_MAX_S) if absent else 0.0
        self.due = now + self._absent_s
        return piece

    def _read(self, stood: str | None) -> Piece:
        try:
            if self._follower is None:
                self._open(stood)
            assert self._follower is not None
            matches = self._follower.poll()
        except LogError as unreadable:
            self.cause = str(unreadable)
            return Piece()
        self.cause = None
        self._lines += sum(match.count for match in matches)
        return Piece(matches, self._to_keep(self._follower.position, matches))

    def status(self) -> LogDict:
        """How it is followed, for `status`."""
        follower = self._follower
        absent = None if follower is None or not follower.absent else "it is not there yet"
        return {
            "server": self.server,
            "path": str(self._path),
            "trouble": self.cause or absent,
            "lines": self._lines,
            "dropped_bytes": 0 if follower is None else follower.dropped_bytes,
        }

    def close(self) -> None:
        """Give the file back."""
        if self._follower is not None:
            self._follower.close()

    def _open(self, stood: str | None) -> None:
        known = None if stood is None else _position(stood, self._path)
        self._follower = LogFollower(self._path, position=known, from_end=True)

    def _to_keep(self, position: Mapping[str, object], matches: tuple[LogMatch, ...]) -> str | None:
        """The position, where something was said, the file is another one, or much was read."""
        inode, offset = position["inode"], position["offset"]
        assert isinstance(offset, int)
        far = self._kept is None or self._kept[0] != inode or offset < self._kept[1]
        far = far or (self._kept is not None and offset - self._kept[1] >= POSITION_KEPT_EACH_BYTES)
        if not matches and not far:
            return None
        self._kept = (inode, offset)
        return json.dumps({"path": str(self._path), **position})


def read_all(
    logs: list[FollowedLog], stood: Mapping[str | None, str], now: float
) -> list[tuple[FollowedLog, Piece]]:
    """What each of these logs says; `stood` has the positions that are kept, by server, None the trainer."""
    return [(followed, followed.poll(stood.get(followed.server), now)) for followed in logs]


def _position(stood: str, path: Path) -> Mapping[str, object] | None:
    """The kept position; None for one of another file, or in words that are not understood."""
    try:
        known = json.loads(stood)
    except ValueError:
        return None
    return known if isinstance(known, dict) and known.get("path") == str(path) else None
