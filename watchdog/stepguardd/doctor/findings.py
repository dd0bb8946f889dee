"""What a check found: one line, how bad it is, and what would help."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is. A thing that cannot be looked at is a warning: nobody can say that it is well."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the answer; the remedy is for all that is not ok."""

    check: str
    subject: str
    level: Level
    text: str
    remedy: str | None = None


def ok(check: str, subject: str, text: str) -> Finding:
    """It is well."""
    return Finding(check=check, subject=subject, level=Level.OK, text=text)


def warn(check: str, subject: str, text: str, remedy: str) -> Finding:
    """It may become trouble, or cannot be seen."""
    return Finding(check=check, subject=subject, level=Level.WARN, text=text, remedy=remedy)


def bad(check: str, subject: str, text: str, remedy: str) -> Finding:
    """It is trouble now."""
    return Finding(check=check, subject=subject, level=Level.BAD, text=text, remedy=remedy)
