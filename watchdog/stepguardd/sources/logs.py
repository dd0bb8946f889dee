"""
Follows log files and picks out the lines that mean something.

Promises every signature of the table in order, over rotation and truncation, in any encoding. A burst that is
more than `backlog_bytes_max` ahead is dropped up to there and counted: a log is a hint, and the newest lines
are the ones that matter. Many lines of one meaning in one poll are one match with a count. What a match is
worth is for others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from stepguardd.core.signs import Sign
from stepguardd.sources.lines import Lines
from stepguardd.sources.signatures import SIGNATURES

POLL_BYTES = 4 * 1024 * 1024
BACKLOG_BYTES_MAX = 16 * 1024 * 1024
LINE_CHARS_MAX = 2048


class Stage(Enum):
    """Where in its life the writer of the log is: running out of memory at the start needs another remedy."""

    UNKNOWN = "unknown"
    STARTING = "starting"
    RUNNING = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogMatch:
    """
    Lines of one meaning: how many in this poll, and the first of them.

    `line` is at most 2,048 characters, control characters replaced. `facts` are the first line's.
    """

    sign: Sign
    stage: Stage
    line: str
    facts: Mapping[str, str]
    count: int = 1


class LogError(Exception):
    """The log cannot be read; the message names the file."""


class LogFollower:
    """Follows one log file, which need not exist yet."""

    def __init__(
        self,
        path: Path,
        *,
        position: Mapping[str, object] | None = None,
        from_end: bool = False,
        backlog_bytes_max: int = BACKLOG_BYTES_MAX,
    ) -> None:
        """
        Follow `path` from the stored position, else from its start, or from its end as it is now.

        Where it begins in the middle of a log, the writer's stage is unknown until a line tells it.
        """
        self.path = path
        self._lines = Lines(path, position)
        self._backlog_bytes_max = backlog_bytes_max
        self._stage = Stage.UNKNOWN
        stored = position.get("stage") if position else None
        if stored in {stage.value for stage in Stage}:
            self._stage = Stage(stored)
        if from_end and not position:
            try:
                self._lines.skip_to_last(0)
            except OSError as failed:
                raise LogError(f"{path}: {failed.strerror}") from None
            self._lines.dropped_bytes = 0

    @property
    def position(self) -> dict[str, object]:
        """Where the file stands, and the writer's stage."""
        return {**self._lines.position, "stage": self._stage.value}

    @property
    def absent(self) -> bool:
        """Whether the last poll found no file."""
        return self._lines.absent

    @property
    def caught_up(self) -> bool:
        """Whether the last poll met the end of what there is for now."""
        return self._lines.caught_up

    @property
    def dropped_bytes(self) -> int:
        """How much was left unread because it came too fast, or in lines that were too long."""
        return self._lines.dropped_bytes

    @property
    def stage(self) -> Stage:
        """What the log says of its writer."""
        return self._stage

    def poll(self, bytes_max: int = POLL_BYTES) -> tuple[LogMatch, ...]:
        """Read on, a bounded piece; return the matches in the order of their first lines. Raises LogError."""
        try:
            self._lines.skip_to_last(self._backlog_bytes_max)
            block = self._lines.read_block(bytes_max)
        except OSError as failed:
            raise LogError(f"{self.path}: {failed.strerror}") from None
        return self._match(block)

    def close(self) -> None:
        """Give the file back."""
        self._lines.close()

    def _match(self, block: bytes) -> tuple[LogMatch, ...]:
        found: dict[tuple[Sign, Stage], LogMatch] = {}
        for start, stop in _hits(block):
            line = block[start:stop]
            for signature in SIGNATURES:
                facts = signature.facts(line)
                if facts is None:
                    continue
                self._stage = _STAGES.get(signature.sign, self._stage)
                key = (signature.sign, self._stage)
                before = found.get(key)
                if before is None:
                    found[key] = LogMatch(
                        sign=signature.sign, stage=self._stage, line=_text(line), facts=facts
                    )
                else:
                    found[key] = LogMatch(
                        sign=before.sign,
                        stage=before.stage,
                        line=before.line,
                        facts=before.facts,
                        count=before.count + 1,
                    )
                break
        return tuple(found.values())


_STAGES = {Sign.STARTING: Stage.STARTING, Sign.READY: Stage.RUNNING}


def _hits(block: bytes) -> list[tuple[int, int]]:
    """
    Find the lines that hold any needle, in order.

    A log of a gigabyte is mostly access lines: searching for each needle in the whole piece is far quicker
    than looking at each line.
    """
    lines: set[tuple[int, int]] = set()
    for signature in SIGNATURES:
        at = block.find(signature.needle)
        while at >= 0:
            start = block.rfind(b"\n", 0, at) + 1
            stop = block.find(b"\n", at)
            stop = stop if stop >= 0 else len(block)
            lines.add((start, min(stop, start + 4 * LINE_CHARS_MAX)))
            at = block.find(signature.needle, stop)
    return sorted(lines)


def _text(line: bytes) -> str:
    text = line[: 4 * LINE_CHARS_MAX].decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "�" for char in text)[:LINE_CHARS_MAX]
