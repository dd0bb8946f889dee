"""
Going back to a checkpoint, and undoing it: newer ones are set aside, the framework's marker is moved, nothing
is deleted.

The promise: a crash at any point leaves the folder so that the framework resumes either as before or from the
chosen checkpoint, and the next `settle`, rollback or undo finishes what was begun. How it is kept:

1. A plan with every move is made durable in `quarantine/<name>/plan.json` before anything is touched. 2.
Copies from a pin are complete beside their place before they get its name; AReaL's slot is swapped in one
rename. 3. The marker moves next, because a marker that names a missing folder makes frameworks train from
scratch. 4. Newer checkpoints follow in ascending order. Where a framework has no marker and takes the highest
number, the last
   rename is the one that counts: until then it resumes as before.
5. The plan is marked done. Every step looks at the disk first, so each may be done again.

Undo walks the same steps backwards. What the trainer has saved meanwhile under the same names is set aside in
its turn. It stops no trainer: that is for the caller to do first.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from stepguardd.checkpoints import disk
from stepguardd.checkpoints.layouts import (
    PINNED,
    QUARANTINE,
    Checkpoint,
    Folder,
    markers_for,
    read_marker,
)

PLAN = "plan.json"
VERSION = 1

# Told the name of each point that a crash could hit; the tests stop there.
Failpoint = Callable[[str], None]


def no_failpoint(point: str) -> None:
    """Nothing happens at any point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hands:
    """
    What a rollback works with: `at` is told each point that a crash could hit, `exchange` swaps two names.

    A network file system often cannot exchange; then two renames do it, with a moment in which the slot is
    away.
    """

    at: Failpoint = no_failpoint
    exchange: Callable[[Path, Path], bool] = disk.exchange


_HANDS = Hands()


class RollbackError(Exception):
    """The rollback or undo was not done, or not to its end; the message says what to do."""


class State(StrEnum):
    """How far a plan has come."""

    PLANNED = "planned"
    DONE = "done"
    UNDOING = "undoing"
    UNDONE = "undone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One rename; both paths are relative to the checkpoint folder."""

    source: str
    target: str
    step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """A slot's folder `live` and its replacement `other` change places; `print` tells which was live."""

    live: str
    other: str
    print: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A copy of a pin that is to be there before the plan is carried out."""

    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkerMove:
    """A marker's text before (None: there was no file) and after."""

    path: str
    before: str | None
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a rollback does, in the order in which it is done."""

    name: str
    sequence: int
    framework: str
    chosen_step: int
    from_steps: tuple[int, ...]
    link_copies: bool
    copies: tuple[Copy, ...]
    swaps: tuple[Swap, ...]
    restores: tuple[Move, ...]
    markers: tuple[MarkerMove, ...]
    moves: tuple[Move, ...]
    state: State = State.PLANNED
    undone_by: str = ""

    @property
    def empty(self) -> bool:
        """Whether the folder already stands as the plan wants it."""
        return not (
            self.swaps or self.restores or self.moves or any(m.before != m.after for m in self.markers)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Undone:
    """
    What an undo brought back.

    name       of the rollback.
    steps      that were set aside and are back.
    markers    (path, text) as they are again; text None: the file is gone, as it was before.
    displaced  what had been saved meanwhile under the same names, and where it is now.
    """

    name: str
    steps: tuple[int, ...]
    markers: tuple[tuple[str, str | None], ...]
    displaced: tuple[tuple[str, str], ...]


def undo_command(path: Path) -> str:
    """The command that takes a rollback back, for reports; whoever runs it has decided."""
    return f"stepguard rollback --yes --undo {shlex.quote(str(path))}"


# --- rolling back -------------------------------------------------------------------------------------------


def plan_rollback(folder: Folder, checkpoints: Sequence[Checkpoint], chosen: Checkpoint, name: str) -> Plan:
    """
    What going back to `chosen` would do. Changes nothing.

    Args:
        folder: the checkpoint folder.
        checkpoints: all of it, as `find_checkpoints` gave them.
        chosen: one of them, with a step.
        name: the quarantine's folder: an incident's id, or the time in UTC.

    Raises:
        RollbackError: the chosen one tells no step, or a rename could not work (other file system, no
            permission).
    """
    if chosen.step is None or chosen.linked:
        raise RollbackError(f"{chosen.path} tells no step, or is a symbolic link: it cannot be gone back to")
    if find_unfinished(folder.root) is not None:
        raise RollbackError(
            f"{folder.root} holds a rollback that was interrupted: finish it by rolling back, "
            f"or take it back: {undo_command(folder.root)}"
        )
    existing = _plans(folder.root)
    taken = {plan.name for plan in existing}
    name = _free_name(folder.root, _safe_name(name), taken)
    home = f"{QUARANTINE}/{name}"
    newer = [c for c in checkpoints if not c.pinned and c.step is not None and c.step > chosen.step]
    slot = [c for c in checkpoints if not c.pinned] if folder.layout.slot and chosen.pinned else []
    swaps, restores, copies = _from_pin(folder, chosen, home)
    moves = (
        []
        if folder.layout.slot
        else [
            Move(source=part.path, target=f"{home}/{part.path}", step=checkpoint.step)
            for checkpoint in sorted(newer, key=lambda c: c.step or 0)
            # The main part goes last: it is the one that a framework counts.
            for part in reversed(checkpoint.parts)
        ]
    )
    plan = Plan(
        name=name,
        sequence=max((plan.sequence for plan in existing), default=0) + 1,
        framework=folder.layout.framework,
        chosen_step=chosen.step,
        from_steps=tuple(sorted({c.step for c in (slot or newer) if c.step is not None})),
        link_copies=not folder.layout.in_place,
        copies=copies,
        swaps=swaps,
        restores=restores,
        markers=tuple(
            MarkerMove(path=marker.path, before=_marker_text(folder.root / marker.path), after=marker.text)
            for marker in markers_for(folder, chosen)
        ),
        moves=tuple(moves),
    )
    _check_possible(folder.root, plan)
    return plan


def roll_back(folder: Folder, plan: Plan, hands: Hands = _HANDS) -> Plan:
    """
    Carry out a plan made just now. Returns it as done.

    Raises:
        RollbackError: another Stepguard works on the folder, the disk is full (nothing was touched), or a
            step failed
            (the message says how to finish or undo).
    """
    root = folder.root
    with _held(root), _explained(root):
        try:
            _make_copies(root, plan)
        except disk.NoSpaceError as error:
            disk.remove_tree(root / QUARANTINE / plan.name)
            raise RollbackError(f"{error}: nothing was touched") from error
        hands.at("copied")
        disk.make_folders(root, root / QUARANTINE / plan.name)
        hands.at("plan.before")
        _write_plan(root, plan, hands.at, "plan")
        hands.at("plan.durable")
        return _carry_out(root, plan, hands)


def settle(root: Path, hands: Hands = _HANDS) -> Plan | None:
    """
    Finish what a crash interrupted: a rollback that was planned, or an undo that was begun. None when there
    was nothing.

    Raises:
        RollbackError: as `roll_back`.
    """
    unfinished = find_unfinished(root)
    if unfinished is None:
        return None
    with _held(root), _explained(root):
        if unfinished.state is State.PLANNED:
            return _carry_out(root, unfinished, hands)
        _take_back(root, unfinished, hands)
        return replace(unfinished, state=State.UNDONE)


def find_unfinished(root: Path) -> Plan | None:
    """The plan that a crash interrupted, if there is one. Reads only."""
    waiting = [plan for plan in _plans(root) if plan.state in {State.PLANNED, State.UNDOING}]
    return waiting[-1] if waiting else None


def _carry_out(root: Path, plan: Plan, hands: Hands) -> Plan:
    for number, swap in enumerate(plan.swaps):
        hands.at(f"swap.{number}.before")
        _swap(root, swap, hands, f"swap.{number}", forward=True)
        hands.at(f"swap.{number}.after")
    for number, restore in enumerate(plan.restores):
        hands.at(f"restore.{number}.before")
        _move_once(root, restore.source, restore.target)
        hands.at(f"restore.{number}.after")
    for number, marker in enumerate(plan.markers):
        hands.at(f"marker.{number}.before")
        if _marker_text(root / marker.path) != marker.after:
            _write_marker(root / marker.path, marker.after, hands.at, f"marker.{number}")
        hands.at(f"marker.{number}.after")
    for number, move in enumerate(plan.moves):
        hands.at(f"move.{number}.before")
        disk.make_folders(root, (root / move.target).parent)
        _move_once(root, move.source, move.target)
        hands.at(f"move.{number}.after")
    for marker in plan.markers:
        disk.discard_temporary(root / marker.path)
    done = replace(plan, state=State.DONE)
    _write_plan(root, done, hands.at, "done")
    hands.at("done.durable")
    return done


# --- undoing ------------------------------------------------------------------------------------------------


def newest(path: Path) -> Plan:
    """
    The rollback that `undo` would take back.

    Raises:
        RollbackError: there is none.

    """
    return _undoable(_rolled_back_root(path), None)


def undo(path: Path, *, name: str | None = None, by: str = "", hands: Hands = _HANDS) -> Undone:
    """
    Bring back what the newest rollback (or the one called `name`) set aside.

    Args:
        path: the checkpoint folder as it was given to the rollback; its framework need not be known.
        name: the quarantine's folder; None: the newest rollback that has not been undone.
        by: who wants it and why, kept in the record beside the quarantine.
        hands: what to work with; the tests crash at named points through it.

    Raises:
        RollbackError: nothing to undo there, something was taken out of the quarantine (nothing is then
            touched), or a
            step failed (call it again).
    """
    root = _rolled_back_root(path)
    plan = _undoable(root, name)
    with _held(root), _explained(root):
        _check_all_there(root, plan)
        displaced = _take_back(root, replace(plan, undone_by=by), hands)
    return Undone(
        name=plan.name,
        steps=plan.from_steps,
        markers=tuple((marker.path, marker.before) for marker in plan.markers),
        displaced=displaced,
    )


def _take_back(root: Path, plan: Plan, hands: Hands) -> tuple[tuple[str, str], ...]:
    _write_plan(root, replace(plan, state=State.UNDOING), hands.at, "undo.plan")
    hands.at("undo.plan.durable")
    displaced: list[tuple[str, str]] = []
    for number, move in reversed(list(enumerate(plan.moves))):
        hands.at(f"undo.move.{number}.before")
        displaced += _move_back(root, plan, move)
        hands.at(f"undo.move.{number}.after")
    for number, marker in reversed(list(enumerate(plan.markers))):
        hands.at(f"undo.marker.{number}.before")
        _restore_marker(root / marker.path, marker.before, hands.at, f"undo.marker.{number}")
        hands.at(f"undo.marker.{number}.after")
    for number, restore in reversed(list(enumerate(plan.restores))):
        hands.at(f"undo.restore.{number}.before")
        _move_once(root, restore.target, restore.source)
        hands.at(f"undo.restore.{number}.after")
    for number, swap in reversed(list(enumerate(plan.swaps))):
        hands.at(f"undo.swap.{number}.before")
        _swap(root, swap, hands, f"undo.swap.{number}", forward=False)
        hands.at(f"undo.swap.{number}.after")
    _write_plan(root, replace(plan, state=State.UNDONE), hands.at, "undo.done")
    hands.at("undo.done.durable")
    _clear_up(root, plan)
    return tuple(displaced)


def _move_back(root: Path, plan: Plan, move: Move) -> list[tuple[str, str]]:
    """The checkpoint to its old place; what has been saved there since goes where it can be found."""
    if not os.path.lexists(root / move.target):
        return []
    displaced = []
    if os.path.lexists(root / move.source):
        aside = _free_path(root, f"{QUARANTINE}/{plan.name}/displaced/{move.source}")
        disk.make_folders(root, (root / aside).parent)
        disk.move(root / move.source, root / aside)
        displaced.append((move.source, aside))
    disk.make_folders(root, (root / move.source).parent)
    disk.move(root / move.target, root / move.source)
    return displaced


def _restore_marker(path: Path, before: str | None, at: Failpoint, point: str) -> None:
    if before is None:
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            disk.flush_folder(path.parent)
    elif _marker_text(path) != before:
        _write_marker(path, before, at, point)


def _clear_up(root: Path, plan: Plan) -> None:
    """Take away half-written markers and the folders left empty. What is in the quarantine stays there."""
    for marker in plan.markers:
        disk.discard_temporary(root / marker.path)
    home = root / QUARANTINE / plan.name
    for folder, _, _ in os.walk(home, topdown=False):
        if folder != str(home) and not any(Path(folder).iterdir()):
            Path(folder).rmdir()


def _check_all_there(root: Path, plan: Plan) -> None:
    for move in plan.moves:
        if not (os.path.lexists(root / move.target) or os.path.lexists(root / move.source)):
            raise RollbackError(
                f"{move.target} is no longer in the quarantine: nothing was touched; "
                "put it back, or move the rest by hand"
            )


# --- the single steps ---------------------------------------------------------------------------------------


def _from_pin(
    folder: Folder, chosen: Checkpoint, home: str
) -> tuple[tuple[Swap, ...], tuple[Move, ...], tuple[Copy, ...]]:
    """What it takes to bring a pinned copy to its original's place."""
    if not chosen.pinned:
        return (), (), ()
    swaps, restores, copies = [], [], []
    for part in chosen.parts:
        live = part.path.removeprefix(f"{PINNED}/step-{chosen.step}/")
        incoming = f"{home}/{live}"
        copies.append(Copy(source=part.path, target=incoming))
        if os.path.lexists(folder.root / live):
            swaps.append(Swap(live=live, other=incoming, print=disk.fingerprint(folder.root / live)))
        else:
            restores.append(Move(source=incoming, target=live, step=chosen.step))
    return tuple(swaps), tuple(restores), tuple(copies)


def _make_copies(root: Path, plan: Plan) -> None:
    for copy in plan.copies:
        target = root / copy.target
        disk.remove_tree(target)
        disk.make_folders(root, target.parent)
        disk.copy_tree(root / copy.source, target, link=plan.link_copies)


def _swap(root: Path, swap: Swap, hands: Hands, point: str, *, forward: bool) -> None:
    """Exchange once: whether it has been done already is read off the two folders."""
    live, other, between = root / swap.live, root / swap.other, root / f"{swap.other}.old"
    if os.path.lexists(between):
        # Two renames, and a crash between them: `live` is away, or the new one is already there.
        if not os.path.lexists(live):
            disk.move(other, live)
        disk.move(between, other)
    in_place = disk.fingerprint(live) == swap.print
    if not in_place and disk.fingerprint(other) != swap.print:
        raise RollbackError(
            f"neither {live} nor {other} is as it was: move what you want to keep to {live} by hand"
        )
    if in_place != forward:
        return
    if not hands.exchange(live, other):
        disk.move(live, between)
        hands.at(f"{point}.away")
        disk.move(other, live)
        hands.at(f"{point}.in")
        disk.move(between, other)


def _move_once(root: Path, source: str, target: str) -> None:
    if os.path.lexists(root / target):
        return
    if not os.path.lexists(root / source):
        raise RollbackError(f"{source} is gone: it is in neither place")
    disk.make_folders(root, (root / target).parent)
    disk.move(root / source, root / target)


def _write_marker(path: Path, text: str, at: Failpoint, point: str) -> None:
    disk.replace_file(path, text.encode("utf-8", "surrogateescape"), lambda step: at(f"{point}.{step}"))


def _marker_text(path: Path) -> str | None:
    content = read_marker(path)
    return None if content is None else content.decode("utf-8", "surrogateescape")


def _check_possible(root: Path, plan: Plan) -> None:
    """Every rename and every marker, before anything is touched."""
    device = root.lstat().st_dev
    for move in plan.moves:
        source = root / move.source
        if source.lstat().st_dev != device:
            raise RollbackError(f"{source} is on another file system: move it away by hand, then roll back")
    for path in {root, *((root / move.source).parent for move in plan.moves)}:
        if not os.access(path, os.W_OK | os.X_OK):
            raise RollbackError(f"{path} cannot be written to: run as the user who owns the checkpoints")
    for marker in plan.markers:
        place = root / marker.path
        if not place.parent.is_dir():
            raise RollbackError(f"{place.parent} is not there: the marker {place.name} could not be written")
        if os.path.lexists(place) and marker.before is None:
            raise RollbackError(
                f"{place} is no plain file with a step in it: look at it first, nothing was touched"
            )
    if os.path.lexists(root / QUARANTINE) and (root / QUARANTINE).is_symlink():
        raise RollbackError(f"{root / QUARANTINE} is a symbolic link: replace it by a folder")


# --- the plan on disk ---------------------------------------------------------------------------------------


def _write_plan(root: Path, plan: Plan, at: Failpoint, point: str) -> None:
    content = json.dumps({"version": VERSION, **asdict(plan)}, indent=2).encode() + b"\n"
    path = root / QUARANTINE / plan.name / PLAN
    disk.replace_file(path, content, lambda step: at(f"{point}.{step}"))


def _plans(root: Path) -> list[Plan]:
    """Every plan that can be read, oldest first."""
    home = root / QUARANTINE
    if home.is_symlink() or not home.is_dir():
        return []
    found = [plan for path in home.glob(f"*/{PLAN}") if (plan := _read_plan(path)) is not None]
    return sorted(found, key=lambda plan: plan.sequence)


def _read_plan(path: Path) -> Plan | None:
    try:
        raw = json.loads(path.read_bytes())
        if raw.pop("version") != VERSION:
            return None
        plan = Plan(
            name=raw["name"],
            sequence=raw["sequence"],
            framework=raw["framework"],
            chosen_step=raw["chosen_step"],
            from_steps=tuple(raw["from_steps"]),
            link_copies=raw["link_copies"],
            copies=tuple(Copy(**item) for item in raw["copies"]),
            swaps=tuple(Swap(**item) for item in raw["swaps"]),
            restores=tuple(Move(**item) for item in raw["restores"]),
            markers=tuple(MarkerMove(**item) for item in raw["markers"]),
            moves=tuple(Move(**item) for item in raw["moves"]),
            state=State(raw["state"]),
            undone_by=str(raw.get("undone_by", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return plan if plan.name == path.parent.name and _all_inside(plan) else None


def _all_inside(plan: Plan) -> bool:
    """A plan is a file that anyone could have edited: no path in it may leave the folder."""
    paths = [m.source for m in (*plan.moves, *plan.restores)] + [
        m.target for m in (*plan.moves, *plan.restores)
    ]
    paths += [marker.path for marker in plan.markers] + [
        path for s in plan.swaps for path in (s.live, s.other)
    ]
    paths += [path for copy in plan.copies for path in (copy.source, copy.target)]
    return not any(path.startswith("/") or ".." in path.split("/") or not path for path in paths)


def _undoable(root: Path, name: str | None) -> Plan:
    plans = [plan for plan in _plans(root) if plan.state is not State.UNDONE]
    if name is not None:
        plans = [plan for plan in plans if plan.name == name]
    if not plans:
        which = "a rollback" if name is None else f"the rollback {name}"
        raise RollbackError(f"nothing to undo: {root / QUARANTINE} holds no plan of {which}")
    return plans[-1]


def _rolled_back_root(path: Path) -> Path:
    base = path.parent if path.name in {"_actor", "_critic"} else path
    for candidate in (base, base / "checkpoints"):
        if (candidate / QUARANTINE).is_dir():
            return candidate.resolve()
    raise RollbackError(f"nothing to undo: there is no {QUARANTINE}/ in {path}")


def _safe_name(name: str) -> str:
    kept = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".-")
    return kept[:80] or "rollback"


def _free_name(root: Path, name: str, taken: set[str]) -> str:
    number, candidate = 1, name
    while candidate in taken or os.path.lexists(root / QUARANTINE / candidate):
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _free_path(root: Path, path: str) -> str:
    number, candidate = 1, path
    while os.path.lexists(root / candidate):
        number += 1
        candidate = f"{path}-{number}"
    return candidate


@contextmanager
def _held(root: Path) -> Iterator[None]:
    with disk.folder_lock(root) as free:
        if not free:
            raise RollbackError(f"another Stepguard is at work in {root}: wait for it")
        yield


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RollbackError(
            f"stopped half-way: {error}; run the rollback again to finish it, or: {undo_command(root)}"
        ) from error
