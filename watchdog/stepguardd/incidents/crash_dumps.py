"""
What SGLang's own dumps say of the requests in flight when it died (`--crash-dump-folder`).

A dump is a pickle of SGLang's classes: the last five minutes of requests, those that were not answered among
them. It is read as text (`checkpoints.pickles`): nothing in it is imported, called or built.

Source of facts: SGLang 0.5.23, `managers/tokenizer_manager.py`, and dumps that it wrote; a folder for each
host name, a file for each death.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from ..checkpoints.pickles import Made, PickleError, read_value
from ..oneline import one_line

FLAG: Final = "--crash-dump-folder"
_BYTES_MAX: Final = 32 << 20
_DUMPS_MAX: Final = 4
_NAMED: Final = 5
_PROMPT_CHARS: Final = 60
_IDS_SHOWN: Final = 12
_AROUND_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """One death: when its dump was written (wall seconds), and the prompts that had no answer yet."""

    path: Path
    wall: float
    in_flight: tuple[str, ...]


class DumpError(Exception):
    """It cannot be read; the message says why."""


def read_dump(path: Path) -> Dump:
    """
    Read one dump.

    Raises:
        DumpError: it is no such dump, or too large.
        OSError: the file cannot be read.

    """
    found = path.stat()
    if found.st_size > _BYTES_MAX:
        raise DumpError(f"has {found.st_size >> 20} MiB, of which at most {_BYTES_MAX >> 20} are read here")
    try:
        root = read_value(path.read_bytes())
    except PickleError as error:
        raise DumpError(str(error)) from None
    requests = root.get("requests") if isinstance(root, dict) else None
    if not isinstance(requests, list):
        raise DumpError("names no requests")
    waiting = [prompt for request in requests if (prompt := _unanswered(request)) is not None]
    return Dump(path=path, wall=found.st_mtime, in_flight=tuple(dict.fromkeys(waiting)))


def told(folders: Mapping[str, str], since_wall: float, until_wall: float) -> list[str]:
    """
    What the dumps of these times say, a sentence each.

    Args:
        folders: each server's, by its name.
        since_wall: the incident's beginning.
        until_wall: its end.

    """
    sentences = []
    for server, folder in folders.items():
        dumps = []
        for path in _written(Path(folder), since_wall - _AROUND_S, until_wall + _AROUND_S):
            try:
                dumps.append(read_dump(path))
            except (DumpError, OSError) as error:
                sentences.append(f"SGLang's dump of the requests in flight, {path}, was not read: {error}.")
        sentences += [_sentence(server, dump) for dump in dumps]
        sentences += _shared(server, dumps)
    return sentences


def _written(folder: Path, since: float, until: float) -> list[Path]:
    """The dumps of that time, oldest first; the newest few where they are many."""
    try:
        found = [(path.stat().st_mtime, path) for path in folder.glob("*/crash_dump_*.pkl")]
    except OSError:
        return []
    return [path for at, path in sorted(found) if since <= at <= until][-_DUMPS_MAX:]


def _unanswered(request: Any) -> str | None:
    """The prompt of a request without an answer; None for any other."""
    match request:
        case (Made(state=dict() as asked), answer, *_):
            meta = answer.get("meta_info") if isinstance(answer, dict) else None
            if isinstance(meta, dict) and meta.get("finish_reason") is not None:
                return None
            return _prompt(asked)
        case _:
            return None


def _prompt(asked: Mapping[str, Any]) -> str:
    text, ids = asked.get("text"), asked.get("input_ids")
    if isinstance(text, str):
        return repr(text)
    if isinstance(ids, list | tuple):
        return f"ids {' '.join(map(str, ids))}"
    return "a prompt of another kind"


def _sentence(server: str, dump: Dump) -> str:
    when = datetime.fromtimestamp(dump.wall, UTC).strftime("%H:%M:%S")
    count = len(dump.in_flight)
    many = "no request was" if not count else "1 prompt was" if count == 1 else f"{count} prompts were"
    return f"When {server} died at {when} UTC, {many} in flight{_named(dump.in_flight)} ({dump.path})."


def _shared(server: str, dumps: Sequence[Dump]) -> list[str]:
    """Who was in flight each time, where somebody else was not."""
    if len(dumps) < 2:
        return []
    shared = [prompt for prompt in dumps[0].in_flight if all(prompt in one.in_flight for one in dumps[1:])]
    if not shared or all(len(one.in_flight) == len(shared) for one in dumps):
        return []
    each = f"In flight at each of these {len(dumps)} deaths of {server}"
    return [f"{each}{_named(shared)}; suspect them first."]


def _named(prompts: Sequence[str]) -> str:
    if not prompts:
        return ""
    shown = [_short(prompt) for prompt in prompts[:_NAMED]]
    more = len(prompts) - len(shown)
    return ": " + ", ".join(shown) + (f" and {more} more" if more else "")


def _short(prompt: str) -> str:
    if prompt.startswith("ids "):
        words = prompt.split()[1:]
        more = f" … ({len(words)} in all)" if len(words) > _IDS_SHOWN else ""
        return f"ids {' '.join(words[:_IDS_SHOWN])}{more}"
    return one_line(prompt, _PROMPT_CHARS)
