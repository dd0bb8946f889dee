"""
The few ways in which checkpoints are moved, copied and pointed to, each durable when it returns.

It promises that a rename has reached the disk before the next step begins, that a file is replaced whole or
not at all, and that a copy is complete before it gets its name. It decides nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_FICLONE = 0x40049409
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EPERM}
)


class NoSpaceError(Exception):
    """The disk is full; what had been copied has been taken away again."""


def flush_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(root: Path, folder: Path) -> None:
    """Make `folder` and what is missing above it up to `root`, each durable."""
    missing = [path for path in (folder, *folder.parents) if path.is_relative_to(root) and not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        flush_folder(path.parent)


def move(source: Path, target: Path) -> None:
    """Rename within one file system; both folders are flushed."""
    source.rename(target)
    flush_folder(target.parent)
    flush_folder(source.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    swap = getattr(libc, "renameat2", None)
    if swap is None:
        return False
    if swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        if code in _NOT_SUPPORTED:
            return False
        raise OSError(code, os.strerror(code), str(one))
    flush_folder(one.parent)
    flush_folder(other.parent)
    return True


def replace_file(path: Path, content: bytes, at: Callable[[str], None] = lambda point: None) -> None:
    """
    Give `path` new content: written beside it, flushed, and renamed over it. Owner and mode stay as they
    were.

    `at` is told "temporary" between the two.
    """
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        file.write(content)
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            os.fchmod(file.fileno(), status.st_mode & 0o7777)
            if os.geteuid() == 0:
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
        file.flush()
        os.fsync(file.fileno())
    at("temporary")
    temporary.replace(path)
    flush_folder(path.parent)


def discard_temporary(path: Path) -> None:
    """Take away what a crash in `replace_file` left beside `path`."""
    _temporary(path).unlink(missing_ok=True)


def copy_tree(source: Path, target: Path, *, link: bool) -> None:
    """
    Copy a file or a folder: by hard links where asked and possible, else by reflink, else byte by byte.

    Symbolic links are copied as links. Nothing is left behind when the disk is full.

    Raises:
        NoSpaceError: the disk is full, or a quota is reached.
        OSError: anything else; what had been copied is taken away as well.
    """
    try:
        if source.is_dir() and not source.is_symlink():
            target.mkdir()
            for folder, directories, files in os.walk(source, followlinks=False):
                here = target / Path(folder).relative_to(source)
                for name in directories:
                    _copy_folder_entry(Path(folder) / name, here / name)
                for name in files:
                    _copy_file(Path(folder) / name, here / name, link=link)
                flush_folder(here)
            shutil.copystat(source, target)
        else:
            _copy_file(source, target, link=link)
    except OSError as error:
        remove_tree(target)
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpaceError(f"no room to copy {source} to {target}") from error
        raise


def remove_tree(path: Path) -> None:
    """Take away a copy of Stepguard's own."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fingerprint(path: Path) -> str:
    """Names, sizes and times of everything under `path`, as one short text; the same for a faithful copy."""
    digest = hashlib.sha256()
    places = [path]
    if path.is_dir() and not path.is_symlink():
        places = sorted(Path(folder) / name for folder, _, files in os.walk(path) for name in files)
    for place in places:
        status = place.lstat()
        line = f"{place.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\0"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[bool]:
    """Hold the folder against another Stepguard, without a lock file; False when another one holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            # A file system without locks: one Stepguard at a time is then the user's promise.
            yield True
            return
        yield True
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.stepguard")


def _copy_folder_entry(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
    else:
        target.mkdir()


def _copy_file(source: Path, target: Path, *, link: bool) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    if link:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in {*_NOT_SUPPORTED, errno.EMLINK}:
                raise
        else:
            return
    with source.open("rb") as reading, target.open("xb") as writing:
        try:
            fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
        except OSError:
            shutil.copyfileobj(reading, writing, 1 << 20)
        writing.flush()
        os.fsync(writing.fileno())
    shutil.copystat(source, target)
