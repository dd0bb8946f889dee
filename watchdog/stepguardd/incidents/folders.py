"""
Where reports are: `<state_dir>/incidents/<number>`, one folder an incident, Stepguard's alone.

Also what is forgotten: the oldest, when there are too many or they grow too large.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

FOLDER: Final = "incidents"
MARKDOWN: Final = "report.md"
PAGE: Final = "report.html"
DATA: Final = "report.json"
DECISIONS: Final = "decisions.jsonl"
DECISIONS_KIND: Final = "stepguard decisions"


def folder_of(state_dir: Path, number: int) -> Path:
    """Where an incident's report is, or will be."""
    return state_dir / FOLDER / str(number)


def kept(state_dir: Path) -> list[int]:
    """The numbers of the incidents that have a folder, in order."""
    try:
        names = os.listdir(state_dir / FOLDER)  # noqa: PTH208 - names alone
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isdecimal() and len(name) < 10)


def is_decision_log(path: Path) -> bool:
    """Whether a file begins as an incident's log of decisions does."""
    try:
        with path.open("rb") as file:
            return file.read(64).startswith(f'{{"kind":"{DECISIONS_KIND}"'.encode())
    except OSError:
        return False


def keep_few(state_dir: Path, *, keep: int, bytes_max: int) -> list[int]:
    """
    Delete the oldest folders, until there are no more than `keep` of them and they fit; the newest stays.

    Returns:
        The numbers of those that were deleted.

    """
    root = state_dir / FOLDER
    numbers = kept(state_dir)
    sizes = {number: sum(_sizes(root / str(number))) for number in numbers}
    gone = []
    while len(numbers) > 1 and (len(numbers) > keep or sum(sizes[n] for n in numbers) > bytes_max):
        oldest = numbers.pop(0)
        folder = root / str(oldest)
        if folder.is_symlink():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        gone.append(oldest)
    return gone


def _sizes(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                yield (Path(parent) / name).lstat().st_size
            except OSError:
                continue
