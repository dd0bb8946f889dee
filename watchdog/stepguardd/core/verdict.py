"""What vetting comes to. Plain values: the journal keeps them, the command line prints them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """
    What may be done with a checkpoint.

    GOOD        whole, sound, and (where values were read) finite: it may be loaded.
    BAD         damaged, not finite, or it would run code when loaded: never load it.
    INCOMPLETE  its save never finished: files are missing or cut off.
    UNKNOWN     it could not be judged; it is treated as not good, and nothing is said against it.
    """

    GOOD = "good"
    BAD = "bad"
    INCOMPLETE = "incomplete"
    UNKNOWN = "unknown"


class Depth(StrEnum):
    """How far vetting looks: every number and checksum, or the structure of every file alone."""

    FULL = "full"
    STRUCTURE = "structure"


class Finding(StrEnum):
    """Why, for programs."""

    WHOLE = "whole"
    MISSING = "missing"
    CUT_SHORT = "cut_short"
    DAMAGED = "damaged"
    LINK = "link"
    NOT_UNDERSTOOD = "not_understood"
    CHANGED = "changed_while_read"
    UNREADABLE = "unreadable"
    MEMORY = "memory_cap"
    STALLED = "stalled"
    CANCELLED = "cancelled"
    DIED = "vetting_died"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vetting:
    """One checkpoint's verdict; `reason` is for a person, `size_bytes` the size of all its files."""

    verdict: Verdict
    finding: Finding
    reason: str
    size_bytes: int
    depth: Depth
