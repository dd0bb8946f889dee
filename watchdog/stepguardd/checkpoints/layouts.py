"""
Where each framework keeps its checkpoints, which file tells it where to resume, and what it would resume
from.

It promises to read names, sizes and markers only, to change nothing, never to follow a symbolic link out of
the folder, and to know a checkpoint by the exact name that the framework writes. Which files a checkpoint
must have stands in `completeness.py`; the facts come from the frameworks' own code (docs/checkpoints.md names
the places).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from stepguardd.checkpoints import completeness
from stepguardd.checkpoints.completeness import Around, Entry, Listing, Surveyor

# Stepguard's own folders inside a checkpoint folder. Both keep their content two levels down: ROLL's rotation
# deletes any <folder>/checkpoint-N, and OpenRLHF's counts every folder beside a checkpoint as one.
QUARANTINE = "quarantine"
PINNED = "stepguard-pinned"

MARKER_BYTES_MAX = 4096
FILES_MAX = 1_000_000


class Framework(StrEnum):
    """Who wrote the checkpoints."""

    VERL = "verl"
    SLIME = "slime"
    MILES = "miles"
    AREAL = "areal"
    TRL = "trl"
    OPENRLHF = "openrlhf"
    PRIME_RL = "prime-rl"
    SKYRL = "skyrl"
    NEMO_RL = "nemo-rl"
    ROLL = "roll"
    DCP = "dcp"
    CUSTOM = "custom"


class LayoutError(Exception):
    """The folder does not hold what was asked for; the message names it and says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file or folder of a checkpoint: `path` under the root, `inside` its name within the checkpoint."""

    path: str
    inside: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """
    One checkpoint as found on disk.

    `parts` move together; the first is the main one. `step` is None where the slot does not tell (AReaL).
    `linked` means that the main part is a symbolic link, which is never followed. `pinned` means that the
    framework has rotated the original away and only Stepguard's own copy is left.
    """

    root: Path
    framework: Framework
    step: int | None
    parts: tuple[Part, ...]
    linked: bool = False
    pinned: bool = False

    @property
    def path(self) -> Path:
        """The main part on disk."""
        return self.root / self.parts[0].path


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """A file that tells the framework which checkpoint is the newest: path under the root, and text."""

    path: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """
    How one framework lays out its checkpoints.

    name        a step's folder under the root, with `{step}` for the number (`{step:07d}` where it is
                padded).
    also        further parts of the same step, by the same rule; a `*` stands for any one folder.
    markers     (path, text) of the files that are rewritten at each save; the first is the one that decides.
    slot        the framework keeps one checkpoint and rewrites it in place (AReaL): `name` is then unused.
    in_place    files may be reopened and rewritten, so that a hard link would not protect them.
    """

    framework: Framework
    name: str
    survey: Surveyor
    also: tuple[Part, ...] = ()
    inside: str = ""
    markers: tuple[tuple[str, str], ...] = ()
    slot: bool = False
    in_place: bool = False


_MEGATRON = Layout(
    framework=Framework.SLIME,
    name="iter_{step:07d}",
    survey=completeness.megatron,
    also=(Part(path="rollout/global_dataset_state_dict_{step}.pt", inside="rollout.pt"),),
    markers=(("latest_checkpointed_iteration.txt", "{step}"),),
)

LAYOUTS: dict[Framework, Layout] = {
    Framework.VERL: Layout(
        framework=Framework.VERL,
        name="global_step_{step}",
        survey=completeness.verl,
        markers=(("latest_checkpointed_iteration.txt", "{step}"),),
    ),
    Framework.SLIME: _MEGATRON,
    Framework.MILES: Layout(
        framework=Framework.MILES,
        name=_MEGATRON.name,
        survey=_MEGATRON.survey,
        also=_MEGATRON.also,
        markers=_MEGATRON.markers,
    ),
    Framework.AREAL: Layout(
        framework=Framework.AREAL, name="", survey=completeness.areal, slot=True, in_place=True
    ),
    Framework.TRL: Layout(framework=Framework.TRL, name="checkpoint-{step}", survey=completeness.trl),
    Framework.OPENRLHF: Layout(
        framework=Framework.OPENRLHF,
        name="_actor/global_step{step}",
        inside="actor/",
        survey=completeness.openrlhf,
        also=(
            Part(path="_critic/global_step{step}", inside="critic/"),
            Part(path="global_step{step}_hf", inside="hf/"),
        ),
        markers=(("_actor/latest", "global_step{step}"), ("_critic/latest", "global_step{step}")),
    ),
    Framework.PRIME_RL: Layout(
        framework=Framework.PRIME_RL, name="step_{step}", survey=completeness.prime_rl
    ),
    Framework.SKYRL: Layout(
        framework=Framework.SKYRL,
        name="global_step_{step}",
        survey=completeness.skyrl,
        markers=(("latest_ckpt_global_step.txt", "{step}"),),
    ),
    Framework.NEMO_RL: Layout(framework=Framework.NEMO_RL, name="step_{step}", survey=completeness.nemo_rl),
    Framework.ROLL: Layout(
        framework=Framework.ROLL,
        name="checkpoint-{step}",
        survey=completeness.roll,
        also=(Part(path="*/checkpoint-{step}"),),
    ),
    Framework.DCP: Layout(framework=Framework.DCP, name="*{step}", survey=completeness.dcp, in_place=True),
}


def custom_layout(pattern: str, marker: str | None = None) -> Layout:
    """
    A layout of the user's own.

    Args:
        pattern: the folder of one step under the root, with `{step}` once, e.g. `runs/ckpt-{step}`.
        marker: the file that names the newest step; its text is the bare number.

    Raises:
        LayoutError: the pattern has no `{step}`, or a path is absolute or climbs with `..`.
    """
    for path in (pattern, marker or "x"):
        if path.startswith("/") or ".." in path.split("/") or not path:
            raise LayoutError(f"'{path}' must lie under the checkpoint folder: no leading '/', no '..'")
    if pattern.count("{step}") != 1 or "*" in pattern:
        raise LayoutError(f"the pattern '{pattern}' must hold {{step}} exactly once and no '*'")
    markers = () if marker is None else ((marker, "{step}"),)
    return Layout(framework=Framework.CUSTOM, name=pattern, survey=completeness.custom, markers=markers)


# --- finding ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A checkpoint folder and the layout it is read by."""

    root: Path
    layout: Layout


def open_folder(path: Path, framework: Framework | None = None, custom: Layout | None = None) -> Folder:
    """
    The checkpoint folder at `path`, or in its `checkpoints/`; the framework is recognised when not given.

    Raises:
        LayoutError: nothing there, no checkpoints known, several frameworks possible, or `path` is one
            checkpoint.
    """
    if not path.is_dir():
        raise LayoutError(f"{path} is not a folder")
    root = path.parent if path.name in {"_actor", "_critic"} else path
    wanted = [custom] if custom is not None else [LAYOUTS[framework]] if framework is not None else None
    for candidate in (root, root / "checkpoints"):
        if not candidate.is_dir():
            continue
        resolved = candidate.resolve()
        layouts = wanted if wanted is not None else _recognise(resolved)
        if len(layouts) > 1:
            names = ", ".join(layout.framework for layout in layouts)
            raise LayoutError(f"{candidate} could be of {names}: say which with --framework")
        if layouts and _any(resolved, layouts[0]):
            return Folder(root=resolved, layout=layouts[0])
    raise LayoutError(_nothing_found(path, wanted))


def find_checkpoints(folder: Folder) -> list[Checkpoint]:
    """
    Every checkpoint of the folder in ascending order of steps; what was set aside is not among them.

    A checkpoint of which only a pinned copy is left is listed from there.
    """
    root, layout = folder.root, folder.layout
    if layout.slot:
        found = _slot(root)
    else:
        found = [_folder_checkpoint(root, layout, step, name) for name, step in _step_folders(root, layout)]
    steps = {checkpoint.step for checkpoint in found}
    pins = [pin for pin in find_pins(folder) if pin.step not in steps]
    return sorted([*found, *pins], key=lambda c: (-1 if c.step is None else c.step, not c.pinned))


def find_pins(folder: Folder) -> list[Checkpoint]:
    """Stepguard's own copies, in ascending order of steps."""
    home = folder.root / PINNED
    pins = []
    for name in _directories(home):
        found = re.fullmatch(r"step-([0-9]+)", name)
        if found:
            pins.append(_pin(folder, int(found[1])))
    return sorted(pins, key=lambda pin: pin.step or 0)


def read_listing(checkpoint: Checkpoint) -> Listing:
    """
    The files of a checkpoint, by stat alone.

    Raises:
        OSError: a folder cannot be read.
        LayoutError: more than a million files.
    """
    files: dict[str, Entry] = {}
    escaping: set[str] = set()
    for part in checkpoint.parts:
        start = checkpoint.root / part.path
        for path, inside in _walk(start, part.inside):
            name = inside.rstrip("/")
            target = _safe_target(path, checkpoint.root)
            if target is None:
                escaping.add(name)
                continue
            status = target.stat()
            if stat.S_ISREG(status.st_mode):
                entry = Entry(path=str(target), size_bytes=status.st_size, modified_ns=status.st_mtime_ns)
                files[name] = entry
            if len(files) > FILES_MAX:
                raise LayoutError(f"{checkpoint.path} holds more than {FILES_MAX} files: not a checkpoint")
    return Listing(files=files, escaping=frozenset(escaping))


def size_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all files, by stat; 0 for a symbolic link and for what cannot be read."""
    if checkpoint.linked:
        return 0
    try:
        return sum(entry.size_bytes for entry in read_listing(checkpoint).files.values())
    except (OSError, LayoutError):
        return 0


def surroundings(folder: Folder, checkpoints: Sequence[Checkpoint]) -> list[Around]:
    """For each checkpoint, what the marker and the other checkpoints say about it."""
    theirs = [_roles_of(checkpoint) for checkpoint in checkpoints]
    marked = marker_step(folder)
    return [
        Around(
            marker_step=marked,
            step=checkpoint.step,
            roles=frozenset().union(*(found for other, found in enumerate(theirs) if other != index)),
        )
        for index, checkpoint in enumerate(checkpoints)
    ]


def _roles_of(checkpoint: Checkpoint) -> frozenset[str]:
    if checkpoint.linked:
        return frozenset()
    try:
        return completeness.roles(read_listing(checkpoint).names())
    except (OSError, LayoutError):
        return frozenset()


# --- markers ------------------------------------------------------------------------------------------------


def marker_step(folder: Folder) -> int | None:
    """The step that the deciding marker names; None without a marker, or where its text is no step."""
    if not folder.layout.markers:
        return None
    path, text = folder.layout.markers[0]
    content = read_marker(folder.root / path)
    if content is None:
        return None
    pattern = re.escape(text).replace(re.escape("{step}"), "([0-9]{1,18})")
    found = re.fullmatch(rf"(?:best_)?{pattern}", content.decode("utf-8", "replace").strip())
    return int(found[1]) if found else None


def read_marker(path: Path) -> bytes | None:
    """A marker's bytes; None when there is none, or what is there is not a small regular file."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MARKER_BYTES_MAX:
            return None
        return path.read_bytes()
    except OSError:
        return None


def markers_for(folder: Folder, chosen: Checkpoint) -> list[Marker]:
    """
    The markers to write so that the framework resumes from `chosen`, which has a step.

    The first always; a further one (OpenRLHF's critic) only where the checkpoint has the part that it points
    to.
    """
    theirs = {part.path.removeprefix(f"{PINNED}/step-{chosen.step}/") for part in chosen.parts}
    wanted: list[Marker] = []
    for path, text in folder.layout.markers:
        marker = Marker(path=path, text=text.format(step=chosen.step))
        if not wanted or f"{path.rpartition('/')[0]}/{marker.text}" in theirs:
            wanted.append(marker)
    return wanted


def resumes_from(folder: Folder) -> int | None:
    """
    The step that the framework itself would resume from, by its own rule; None: it would start from scratch
    or refuse.

    With a marker: the marked one if its folder is there. Without: the highest number, whole or not.
    """
    steps = [c.step for c in find_checkpoints(folder) if c.step is not None and not c.pinned]
    if folder.layout.markers:
        marked = marker_step(folder)
        return marked if marked in steps else None
    return max(steps, default=None)


# --- inside -------------------------------------------------------------------------------------------------


def _recognise(root: Path) -> list[Layout]:
    """The layouts whose own traces are in the folder; more than one only where nothing tells them apart."""
    found = []
    for framework, sign in _SIGNS.items():
        layout = LAYOUTS[framework]
        if layout.slot:
            if _slot(root):
                found.append(layout)
            continue
        names = [name for name, _ in _step_folders(root, layout)]
        if names and sign([root / name for name in names]):
            found.append(layout)
    if not found and _step_folders(root, LAYOUTS[Framework.DCP]):
        found = [LAYOUTS[Framework.DCP]]
    if not found:
        # Everything may be gone but Stepguard's own copies, which lie there as they lay here.
        pins = [root / PINNED / name for name in _directories(root / PINNED)]
        found = _recognise(pins[-1]) if pins else []
    return found


def _has(*names: str) -> Callable[[list[Path]], bool]:
    return lambda folders: any((folder / name).exists() for folder in folders for name in names)


def _is_roll(folders: list[Path]) -> bool:
    return any((folder / "pipeline").is_dir() or folder.parent.name == "pipeline" for folder in folders)


# What tells a framework from its neighbours with the same folder names.
_SIGNS: dict[Framework, Callable[[list[Path]], bool]] = {
    Framework.VERL: _has("actor"),
    Framework.SKYRL: _has("policy", "trainer_state.pt"),
    Framework.SLIME: lambda folders: True,
    Framework.AREAL: lambda folders: True,
    Framework.TRL: lambda folders: not _is_roll(folders),
    Framework.ROLL: _is_roll,
    Framework.OPENRLHF: lambda folders: True,
    Framework.PRIME_RL: _has("trainer", "orchestrator", "weight", "weights"),
    Framework.NEMO_RL: _has("training_info.json", "policy"),
}


def _nothing_found(path: Path, wanted: list[Layout] | None) -> str:
    for layout in LAYOUTS.values():
        if (
            layout.name
            and layout.framework is not Framework.DCP
            and _name_pattern(layout).fullmatch(path.name)
        ):
            return f"{path} is one checkpoint: give the folder that holds it, {path.parent}"
    if wanted is not None:
        name = wanted[0].name or "recover_info/ and <model>/recover_checkpoint/"
        return f"no checkpoint of {wanted[0].framework} in {path}: looked for {name}"
    return f"no checkpoints that Stepguard knows in {path}: name the framework with --framework"


def _any(root: Path, layout: Layout) -> bool:
    return bool(_slot(root) if layout.slot else _step_folders(root, layout)) or (root / PINNED).is_dir()


def _name_pattern(layout: Layout) -> re.Pattern[str]:
    base = layout.name.rpartition("/")[2]
    pattern = re.sub(r"\\\{step(?::07d)?\\\}", r"([0-9]{1,18})", re.escape(base))
    return re.compile(pattern.replace(re.escape("*"), r".*?(?<![0-9])"))


def _step_folders(root: Path, layout: Layout) -> list[tuple[str, int]]:
    """(path, step) of each step's folder. Only the spelling that the framework writes counts."""
    parent = layout.name.rpartition("/")[0]
    home = root / parent
    pattern = _name_pattern(layout)
    found: dict[str, int] = {}
    for base in _directories(home):
        matched = pattern.fullmatch(base)
        if not matched:
            continue
        step = int(matched[1])
        if "*" not in layout.name and layout.name.rpartition("/")[2].format(step=step) != base:
            continue
        if layout.framework is Framework.DCP and not _is_dcp(home / base):
            continue
        found[f"{parent}/{base}" if parent else base] = step
    if layout.framework is Framework.ROLL and not found:
        return _roll_local(root)
    return sorted(found.items(), key=lambda item: item[1])


def _roll_local(root: Path) -> list[tuple[str, int]]:
    """ROLL before its upload: `<worker>/checkpoint-N` for each worker, `pipeline` among them."""
    found = [
        (f"pipeline/{base}", int(matched[1]))
        for base in _directories(root / "pipeline")
        if (matched := re.fullmatch(r"checkpoint-([0-9]{1,18})", base))
    ]
    return sorted(found, key=lambda item: item[1])


def _is_dcp(folder: Path) -> bool:
    return (folder / ".metadata").exists() or any(folder.glob("*.distcp"))


def _folder_checkpoint(root: Path, layout: Layout, step: int, name: str) -> Checkpoint:
    parts = [Part(path=name, inside=layout.inside)]
    for part in layout.also:
        path = part.path.format(step=step)
        if path.startswith("*/"):
            # A merged ROLL checkpoint has no such parts: its own name is at the top.
            homes = _directories(root) if "/" in name else []
            paths = [f"{home}/{path[2:]}" for home in homes if home not in {QUARANTINE, PINNED}]
        else:
            paths = [path]
        parts += [
            Part(path=one, inside=part.inside) for one in paths if one != name and os.path.lexists(root / one)
        ]
    return Checkpoint(
        root=root,
        framework=layout.framework,
        step=step,
        parts=tuple(parts),
        linked=any((root / part.path).is_symlink() for part in parts),
    )


def _slot(root: Path) -> list[Checkpoint]:
    """AReaL's slot under a trial's folder: each model's weights, and `recover_info` with the step."""
    models = [
        name
        for name in _directories(root)
        if name not in {QUARANTINE, PINNED, "recover_info"}
        and _holds_files(root / name / "recover_checkpoint")
    ]
    info = (root / "recover_info").is_dir()
    if not models and not info:
        return []
    parts = [Part(path=f"{name}/recover_checkpoint", inside=f"models/{name}/") for name in models]
    parts += [Part(path="recover_info", inside="info/")] if info else []
    return [
        Checkpoint(
            root=root,
            framework=Framework.AREAL,
            step=_slot_step(root / "recover_info"),
            parts=tuple(parts),
            linked=any((root / part.path).is_symlink() for part in parts),
        )
    ]


def _slot_step(info: Path) -> int | None:
    content = read_marker(info / "step_info.json")
    try:
        step = json.loads(content or b"")["global_step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and step >= 0 else None


def _pin(folder: Folder, step: int) -> Checkpoint:
    home = f"{PINNED}/step-{step}"
    copies = Folder(root=folder.root / home, layout=folder.layout)
    if folder.layout.slot:
        inner = _slot(copies.root)
    else:
        inner = [
            _folder_checkpoint(copies.root, folder.layout, found, name)
            for name, found in _step_folders(copies.root, folder.layout)
            if found == step
        ]
    parts = [Part(path=f"{home}/{part.path}", inside=part.inside) for one in inner for part in one.parts]
    return Checkpoint(
        root=folder.root,
        framework=folder.layout.framework,
        step=step,
        parts=tuple(parts) or (Part(path=home),),
        pinned=True,
    )


def _directories(home: Path) -> list[str]:
    """Names of the folders, and of links to folders, in `home`; none when it cannot be read."""
    try:
        with os.scandir(home) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError:
        return []


def _holds_files(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def _walk(start: Path, inside: str) -> Iterator[tuple[Path, str]]:
    """(path, name inside) of every file and link under `start`; links to folders are not entered."""
    if start.is_symlink() or not start.is_dir():
        if os.path.lexists(start):
            yield start, inside or start.name
        return
    for folder, directories, files in os.walk(start, followlinks=False, onerror=_raise):
        here = Path(folder).relative_to(start).as_posix()
        prefix = inside if here == "." else f"{inside}{here}/"
        directories.sort()
        linked = [name for name in directories if (Path(folder) / name).is_symlink()]
        for name in (*files, *linked):
            yield Path(folder) / name, prefix + name


def _raise(error: OSError) -> None:
    raise error


def _safe_target(path: Path, root: Path) -> Path | None:
    """The file itself, or what a link points to when that lies under the root; None when it leaves it."""
    if not path.is_symlink():
        return path
    try:
        target = path.resolve(strict=True)
    except OSError:
        return None
    return target if target.is_relative_to(root) and not target.is_dir() else None
