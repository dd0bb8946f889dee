"""
Secrets taken out of text that goes into reports: what follows a name that says so, and well-known tokens.

A help and no promise: a secret under a harmless name stays. It errs on the side of taking out too much.
"""

import re
from collections.abc import Sequence
from typing import Final

HIDDEN: Final = "<secret>"

_NAMES: Final = r"[\w-]*(?:api[_-]?key|token|passw(?:or)?d|secret|credential|authorization|webhook)[\w-]*"
_ASSIGNED: Final = re.compile(
    rf"(?i)(\b{_NAMES}['\"]?\s*[=:]\s*)(?:bearer\s+)?('[^']*'|\"[^\"]*\"|[^\s,;)\]}}]+)"
)
_OPTION: Final = re.compile(rf"(?i)(--{_NAMES}\s+)(\S+)")
_KNOWN: Final = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|gh[pousr]_[A-Za-z0-9]{20,}|"
    r"AKIA[A-Z0-9]{16})\b|(?<=https://hooks\.slack\.com/)\S+|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
# Words that say how many tokens there are, and hide nothing.
_COUNTS: Final = re.compile(
    r"(?i)(max|num|new|total|prefill|input|output|completion|gen\w*|cached?|used)[_-]?\w*tokens?"
    r"|tokens?[_-]?(usage|ratio|id|ids|per|total|count|num|cap)|tokenizer|tokens\b"
)


def redacted(text: str) -> str:
    """The text without what looks like a secret."""
    text = _KNOWN.sub(HIDDEN, text)
    text = _ASSIGNED.sub(_hidden, text)
    return _OPTION.sub(_hidden, text)


def redacted_command(arguments: Sequence[str]) -> list[str]:
    """A command's arguments without what looks like a secret, also where name and value are two."""
    shown: list[str] = []
    hide = False
    for argument in arguments:
        if hide and not argument.startswith("-"):
            shown.append(HIDDEN)
            hide = False
            continue
        hide = bool(re.fullmatch(rf"(?i)--{_NAMES}", argument)) and not _COUNTS.search(argument)
        shown.append(redacted(argument))
    return shown


def _hidden(match: re.Match[str]) -> str:
    return match[0] if _COUNTS.search(match[1]) else match[1] + HIDDEN
