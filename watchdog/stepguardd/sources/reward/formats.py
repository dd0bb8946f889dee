"""
Which reader a path needs: told from what the file holds, not from its name alone.

Promises StreamError, with the formats that there are, for anything else.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from stepguardd.sources.reward.rows import Reader, StreamError

_HEAD_BYTES = 64 * 1024


class Format(StrEnum):
    """A format of a metric stream that is a file or a folder."""

    WANDB = "wandb"
    TENSORBOARD = "tensorboard"
    JSONL = "jsonl"
    CSV = "csv"
    LOG = "log"


def open_stream(
    path: Path,
    *,
    step_key: str | None = None,
    format_: Format | None = None,
    pattern: str | None = None,
    position: Mapping[str, object] | None = None,
) -> Reader:
    """
    Return the reader for `path`: of the given format, else of the one that the file shows.

    `pattern` is a regular expression for a log (see `table`). Raises StreamError for another kind of file.
    """
    # The readers are imported one by one: `stepguard stream` is to stay small.
    match format_ or (Format.LOG if pattern is not None else detect(path)):
        case Format.WANDB:
            from stepguardd.sources.reward.wandb_log import WandbLog  # noqa: PLC0415

            return WandbLog(path, step_key=step_key, position=position)
        case Format.TENSORBOARD:
            from stepguardd.sources.reward.tensorboard import EventFiles  # noqa: PLC0415

            return EventFiles(path, position=position)
        case Format.JSONL:
            from stepguardd.sources.reward.jsonl import JsonLines  # noqa: PLC0415

            return JsonLines(path, step_key=step_key, position=position)
        case Format.CSV:
            from stepguardd.sources.reward.table import Csv  # noqa: PLC0415

            return Csv(path, step_key=step_key, position=position)
        case Format.LOG:
            from stepguardd.sources.reward.table import LogTable  # noqa: PLC0415

            return LogTable(path, pattern=pattern, position=position)


def detect(path: Path) -> Format:
    """Tell the format of a file or a folder; raises StreamError where it is none of ours, or not there."""
    if path.is_dir():
        return _detect_folder(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as refused:
        raise StreamError(f"{path}: {refused.strerror}") from None
    found = _detect_head(path, head)
    if found is None:
        raise StreamError(
            f"{path}: not a metric stream: neither a W&B log (.wandb), a TensorBoard event file, JSON lines, "
            "CSV with a header, nor a text log (.log, .out, .txt, .err)"
        )
    return found


def _detect_folder(path: Path) -> Format:
    from stepguardd.sources.reward.wandb_log import run_files  # noqa: PLC0415

    if run_files(path) or (path / "latest-run").exists():
        return Format.WANDB
    if next(path.glob("*tfevents*"), None) is not None:
        return Format.TENSORBOARD
    raise StreamError(f"{path}: no W&B run (run-*/run-*.wandb) and no TensorBoard event file in this folder")


def _detect_head(path: Path, head: bytes) -> Format | None:
    from stepguardd.sources.reward.tensorboard import is_event_file  # noqa: PLC0415

    if head.startswith(b":W&B") or (path.suffix == ".wandb" and len(head) < 7):
        return Format.WANDB
    if is_event_file(head) or (not head and "tfevents" in path.name):
        return Format.TENSORBOARD
    if b"\0" in head:
        return None
    first = head.split(b"\n", 1)[0].strip()
    if path.suffix in {".jsonl", ".ndjson"} and (not head or first.startswith(b"{")):
        return Format.JSONL
    if first.startswith(b"{") and _is_object(first):
        return Format.JSONL
    if path.suffix in {".csv", ".tsv"}:
        return Format.CSV
    if path.suffix in {".log", ".out", ".txt", ".err"}:
        return Format.LOG
    return None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
