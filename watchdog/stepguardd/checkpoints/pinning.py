"""
Copies of proven checkpoints that the framework's own rotation cannot take.

It promises that a pin is complete or not there, that making one never touches the original, and that only
Stepguard's own copies are ever taken away. Hard links where rotation unlinks whole folders; reflinks or
copies where files are rewritten in place (AReaL's slot, torch DCP reopening its files), because a hard link
would be rewritten with them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from stepguardd.checkpoints import disk
from stepguardd.checkpoints.layouts import PINNED, Checkpoint, Folder, read_listing

__all__ = ["PinError", "costs_space", "free_bytes", "pin", "release"]


class PinError(Exception):
    """The pin was not made; nothing was left behind, the original is untouched."""


def costs_space(folder: Folder) -> bool:
    """Whether a pin is a copy rather than a set of hard links."""
    return folder.layout.in_place


def free_bytes(folder: Folder) -> int:
    """What the checkpoints' file system has left for a plain user."""
    return shutil.disk_usage(folder.root).free


def pin(folder: Folder, checkpoint: Checkpoint) -> Path:
    """
    Keep a checkpoint: returns the folder of its pin. A pin that is already there is left as it is.

    Raises:
        PinError: the checkpoint tells no step, changed while it was copied, or the disk is full.
    """
    if checkpoint.step is None or checkpoint.linked:
        raise PinError(f"{checkpoint.path} cannot be pinned: it tells no step, or is a symbolic link")
    home = folder.root / PINNED
    target, partial = home / f"step-{checkpoint.step}", home / f".step-{checkpoint.step}.partial"
    if target.is_dir():
        return target
    try:
        before = read_listing(checkpoint)
        disk.make_folders(folder.root, home)
        disk.remove_tree(partial)
        partial.mkdir()
        for part in checkpoint.parts:
            disk.make_folders(partial, (partial / part.path).parent)
            disk.copy_tree(checkpoint.root / part.path, partial / part.path, link=not folder.layout.in_place)
        if read_listing(checkpoint) != before:
            raise PinError(f"{checkpoint.path} changed while it was pinned: pin it again after the next save")
        disk.move(partial, target)
    except disk.NoSpaceError as error:
        disk.remove_tree(partial)
        raise PinError(
            f"{error}: free some space, or lower the number of pinned checkpoints; training is not affected"
        ) from error
    except OSError as error:
        disk.remove_tree(partial)
        raise PinError(f"{checkpoint.path} could not be pinned: {error}") from error
    except PinError:
        disk.remove_tree(partial)
        raise
    return target


def release(folder: Folder, step: int) -> None:
    """Take away Stepguard's own copy of a step, if there is one; renamed first, so half a pin never shows."""
    home = folder.root / PINNED
    target, dying = home / f"step-{step}", home / f".step-{step}.partial"
    if not target.is_dir():
        return
    disk.remove_tree(dying)
    disk.move(target, dying)
    disk.remove_tree(dying)
