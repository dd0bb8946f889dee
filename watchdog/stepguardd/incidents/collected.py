"""
What only the daemon can know of an incident, kept in its folder: whose logs, from where on, which config.

One JSON file, written anew whole; a reader takes what is there and does without the rest.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

FILE: Final = "collected.json"
SCRAPE_EVERY_S: Final = 5.0
SCRAPE_BYTES_MAX: Final = 512 << 10
SERVERS_SCRAPED_MAX: Final = 64
_BYTES_MAX: Final = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """One answer of `/metrics`, and when."""

    wall: float
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSpan:
    """A log file and which part of it belongs to the incident: bytes, from the opening to the end."""

    path: str
    opened_at: int
    ended_at: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """
    What the daemon handed over.

    Args:
        run: the run's name.
        incident: its number.
        journal: the database.
        run_dir: for the commands that a report proposes.
        checkpoint_dir: where a rollback could be taken back; None: not configured.
        config: key, value as text, and whether it differs from the default.
        logs: by name ("trainer", or a server's).
        metrics_walls: by file name under `metrics/`, when it was scraped.
        crash_dumps: by server, the folder in which its SGLang leaves the requests that were in flight.
        notes: what could not be collected, and why.
        awaits: the notice that the journal must have before a report is whole: its writer may be behind.

    """

    run: str
    incident: int
    journal: str
    run_dir: str = ""
    checkpoint_dir: str | None = None
    config: tuple[tuple[str, str, bool], ...] = ()
    logs: Mapping[str, LogSpan] = field(default_factory=dict)
    metrics_walls: Mapping[str, float] = field(default_factory=dict)
    crash_dumps: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    awaits: str | None = None
    log_bytes_max: int = 256 << 10
    decision_bytes_max: int = 32 << 20


def write_collected(folder: Path, collected: Collected) -> None:
    """Keep it in the incident's folder. Raises OSError."""
    write_whole(folder / FILE, json.dumps(asdict(collected), ensure_ascii=False, indent=1))


def read_collected(folder: Path) -> Collected | None:
    """What was handed over; None where nothing that can be read was."""
    try:
        with (folder / FILE).open("rb") as file:
            fields: Any = json.loads(file.read(_BYTES_MAX))
        return Collected(
            run=str(fields["run"]),
            incident=int(fields["incident"]),
            journal=str(fields["journal"]),
            run_dir=str(fields.get("run_dir") or ""),
            checkpoint_dir=fields.get("checkpoint_dir"),
            config=tuple((str(key), str(value), bool(own)) for key, value, own in fields.get("config", ())),
            logs={
                str(name): LogSpan(
                    path=str(span["path"]),
                    opened_at=int(span["opened_at"]),
                    ended_at=None if span.get("ended_at") is None else int(span["ended_at"]),
                )
                for name, span in fields.get("logs", {}).items()
            },
            metrics_walls={str(name): float(wall) for name, wall in fields.get("metrics_walls", {}).items()},
            crash_dumps={str(name): str(path) for name, path in fields.get("crash_dumps", {}).items()},
            notes=tuple(map(str, fields.get("notes", ()))),
            awaits=fields.get("awaits"),
            log_bytes_max=int(fields.get("log_bytes_max", 256 << 10)),
            decision_bytes_max=int(fields.get("decision_bytes_max", 32 << 20)),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it. Raises OSError."""
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(text, encoding="utf-8", errors="replace")
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
