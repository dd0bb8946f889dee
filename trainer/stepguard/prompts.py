"""
Prompts that kill the server: which are withheld, and in which order suspects are sent.

Two text files in the run's folder, one prompt's key a line, `#` for comments: `quarantine` is never sent and
is for people to edit as well; `suspects` were in flight at every one of several crashes, are written by the
daemon alone, and are sent after all others, few at a time.

Promise: reading never raises; a file that is missing or unreadable names nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

QUARANTINE_FILE: Final = "quarantine"
SUSPECTS_FILE: Final = "suspects"
KEYS_MAX: Final = 1_024
KEY_CHARS_MAX: Final = 48
WAVES: Final = 16
"""
Suspects are sent in so many waves. Each wave costs the time of a rollout and each crash costs a server's
start, so many small waves are cheaper than halves: two crashes find one of 256 suspects, where halves need
eight.
"""
_FILE_BYTES_MAX: Final = 1 << 20


class Withheld(Exception):  # noqa: N818 - named after what is the case
    """The prompt is quarantined: it was not sent, and does not count as a failure."""


class NotSent(Exception):  # noqa: N818 - named after what is the case
    """The server died under prompts that were sent before this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """What the two files name."""

    quarantined: frozenset[str] = frozenset()
    suspects: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """
    In which order a batch's items are sent, by their places in it.

    Args:
        waves: one after another; the first has everyone who is under no suspicion, the others suspects.
        withheld: never.

    """

    waves: tuple[tuple[int, ...], ...]
    withheld: tuple[int, ...] = ()


def key_of(prompt: Any) -> str:
    """A prompt's key as it stands in the files: itself where it is short and one line, else its hash."""
    text = str(prompt).strip()
    if 0 < len(text) <= KEY_CHARS_MAX and text.isascii() and text.isprintable() and not text.startswith("#"):
        return text
    import hashlib  # noqa: PLC0415 - importing stepguard must stay cheap

    return "sha256:" + hashlib.sha256(str(prompt).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read(run_dir: Path | None) -> Marked:
    """What the files in this folder name."""
    if run_dir is None:
        return Marked()
    return Marked(
        quarantined=frozenset(names_in(run_dir / QUARANTINE_FILE)),
        suspects=frozenset(names_in(run_dir / SUSPECTS_FILE)),
    )


def names_in(file: Path) -> list[str]:
    """The keys in a file, in their order."""
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            text = lines.read(_FILE_BYTES_MAX)
    except OSError:
        return []
    found = (line.strip() for line in text.splitlines())
    return [line for line in found if line and not line.startswith("#")]


def turns(keys: Sequence[str], marked: Marked) -> Turns:
    """The order for items with these keys: all at once, unless somebody is under suspicion."""
    withheld = tuple(at for at, key in enumerate(keys) if key in marked.quarantined)
    under = list(dict.fromkeys(key for key in keys if key in marked.suspects - marked.quarantined))
    first = tuple(at for at, key in enumerate(keys) if key not in marked.quarantined | marked.suspects)
    each = -(-len(under) // WAVES)
    waves = [set(under[at : at + each]) for at in range(0, len(under), each or 1)]
    later = tuple(tuple(at for at, key in enumerate(keys) if key in wave) for wave in waves)
    return Turns(waves=(first, *later), withheld=withheld)
