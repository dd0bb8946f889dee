"""
The guard's settings: one schema for the trainer that reads `<run_dir>/guard.json` and the daemon that writes
it.

Promise: reading never raises. A missing file means the defaults; an unknown key, an ill-typed value or broken
JSON is named in a complaint and the default stands in its place.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, cast

FILE_NAME: Final = "guard.json"
_FILE_BYTES_MAX: Final = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """
    What the guard goes by inside the trainer.

    Args:
        max_failed_fraction: a batch with a larger share of failed or stale rollouts is refused (0 to 1).
        max_refused_batches: so many refused in a row, and the guard holds by itself.
        verdict_timeout_s: how long waiting for the daemon's verdict counts as quick; past it, it is a hold.
        orphan_hold_s: how long a hold outlives the daemon that ordered it; then StopRequested.
        on_daemon_lost: what a GO means once its lease has run out, "continue" or "hold".
        max_staleness: how many weight versions behind the newest a rollout may be.
        skip_steps: the steps whose batches crashed the run twice; see `Guard.skips`.

    """

    max_failed_fraction: float = 0.1
    max_refused_batches: int = 3
    verdict_timeout_s: float = 0.25
    orphan_hold_s: float = 600.0
    on_daemon_lost: Literal["continue", "hold"] = "continue"
    max_staleness: int = 0
    skip_steps: tuple[int, ...] = ()

    def to_json(self) -> str:
        """The text of `guard.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> tuple[GuardSettings, tuple[str, ...]]:
        """
        Read the text of `guard.json`.

        Returns:
            The settings, and one complaint for every key that did not count.

        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return cls(), ("not JSON; the defaults are used",)
        if not isinstance(found, dict):
            return cls(), ("not a JSON object; the defaults are used",)
        known: dict[str, Any] = {}
        complaints = []
        for name, value in found.items():
            default = _DEFAULTS.get(name)
            if default is None:
                complaints.append(f"{name}: unknown key, ignored")
            elif not _valid(name, value):
                complaints.append(f"{name}: {value!r:.60} is not possible; the default {default!r} is used")
            else:
                known[name] = type(default)(value)
        return cls(**known), tuple(complaints)

    @classmethod
    def read(cls, run_dir: Path) -> tuple[GuardSettings, tuple[str, ...]]:
        """Read `<run_dir>/guard.json`; without the file, the defaults and no complaint."""
        path = run_dir / FILE_NAME
        try:
            with path.open("rb") as file:
                text = file.read(_FILE_BYTES_MAX).decode("utf-8", "replace")
        except FileNotFoundError:
            return cls(), ()
        except OSError as error:
            return cls(), (f"{path}: {error.strerror}; the defaults are used",)
        settings, complaints = cls.from_json(text)
        return settings, tuple(f"{path}: {complaint}" for complaint in complaints)


_DEFAULTS: Final[dict[str, Any]] = {field.name: field.default for field in fields(GuardSettings)}


def _valid(name: str, value: object) -> bool:
    """Whether a value out of JSON may stand for this key."""
    if name == "on_daemon_lost":
        return value in ("continue", "hold")
    if name == "skip_steps":
        return type(value) is list and all(type(step) is int and step >= 0 for step in value)
    if isinstance(_DEFAULTS[name], int):
        return type(value) is int and value >= (1 if name == "max_refused_batches" else 0)
    if type(value) not in (int, float):
        return False
    try:
        amount = float(cast("float", value))
    except OverflowError:
        return False
    return math.isfinite(amount) and 0 <= amount <= (1 if name == "max_failed_fraction" else math.inf)
