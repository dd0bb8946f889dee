"""
The state in a journal that another version wrote, as far as this version understands it.

The rule: what the run's safety hangs on is taken piece by piece, what was only learned begins anew.
A hold that cannot be read any more is never taken for no hold: `held` then says that a person has to decide.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Final, get_type_hints

from pydantic import TypeAdapter

from .core.ledger import LedgerRow
from .core.state import Server, State, Trainer
from .oneline import one_line

HOLDS: Final = ("trip", "pause", "lockout", "rollback", "relaunch")
SERVER_SPENT: Final = ("budget", "restarts", "longest_start_s", "climb")
"""What is kept of a server that cannot be read whole: what it has used up. The rest is looked at afresh."""
TRAINER_SPENT: Final = (
    "attempt",
    "committed_step",
    "refused_in_a_row",
    "budget",
    "launches",
    "launches_without_step",
    "crashed_at",
    "skip_steps",
)


class OlderStateError(Exception):
    """What was read is no state of any version; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Older:
    """
    What could be taken over.

    `lost` names what could not, `held` tells that a hold is among it.
    """

    state: State
    lost: tuple[str, ...]
    held: bool


def read_older(text: str, fresh: State, *, without: Collection[str] = ()) -> Older:
    """
    Take over what can be read of a state.

    Args:
        text: the state as JSON, of whatever version.
        fresh: the state of a run that nothing is known of, under today's config.
        without: fields that must not be read, although they may look as if they could be.

    Raises:
        OlderStateError: it is not a state of any version: damaged, most likely.

    """
    try:
        written = json.loads(text)
    except ValueError as error:
        raise OlderStateError(f"it is no JSON: {error}") from error
    if not isinstance(written, dict) or not written.keys() >= {"mode", "gate", "servers", "trainer"}:
        raise OlderStateError("it is no state of a run")
    lost: list[str] = []
    known = [field.name for field in fields(State) if field.name not in without]
    found = _parts(State, written, known, lost)
    lost += [name for name in without if name in written]
    if "servers" not in found:
        found["servers"] = _servers(written.get("servers"), fresh.servers, lost)
    if "trainer" not in found and isinstance(written.get("trainer"), dict):
        found["trainer"] = replace(
            fresh.trainer, **_parts(Trainer, written["trainer"], TRAINER_SPENT, lost, "trainer.")
        )
    if "checkpoints" not in found:
        found["checkpoints"] = _rows(written.get("checkpoints")) or fresh.checkpoints
    held = any(name in lost and written.get(name) is not None for name in HOLDS)
    return Older(state=replace(fresh, **found), lost=tuple(lost), held=held)


def _parts(
    kind: type, written: dict[str, object], names: Collection[str], lost: list[str], prefix: str = ""
) -> dict[str, Any]:
    """Each of these fields that this version can read; the others are named in `lost`."""
    hints = get_type_hints(kind)
    found = {}
    for name in names:
        if name not in written:
            continue
        try:
            found[name] = _read(hints[name], written[name])
        except ValueError:
            lost.append(prefix + name)
    return found


def _servers(written: object, fresh: tuple[Server, ...], lost: list[str]) -> tuple[Server, ...]:
    old = {one.get("name"): one for one in _dicts(written)}
    servers = []
    for server in fresh:
        one = old.get(server.name)
        if one is None:
            servers.append(server)
            continue
        try:
            servers.append(_read(Server, one))
        except ValueError:
            spent = _parts(Server, one, SERVER_SPENT, lost, f"server {one_line(server.name)}: ")
            servers.append(replace(server, **spent))
    return tuple(servers)


def _rows(written: object) -> tuple[LedgerRow, ...]:
    rows = []
    for one in _dicts(written):
        try:
            rows.append(_read(LedgerRow, one))
        except ValueError:
            continue  # `checkpoints` is named as lost already
    return tuple(rows)


def _dicts(written: object) -> list[dict[str, Any]]:
    return [one for one in written if isinstance(one, dict)] if isinstance(written, list) else []


def _read(kind: Any, value: object) -> Any:
    return TypeAdapter(kind).validate_json(json.dumps(value))
