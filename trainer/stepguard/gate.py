"""
The gate page: one page of shared memory through which the daemon orders and the trainer answers.

Promise: a reader sees one whole half as it was written, or None; never a mixture, never an exception. Each
half keeps two slots: a writer fills the slot out of use and then turns one sequence word to it, so a writer
killed at any instruction leaves the state before it intact. Every slot carries its sequence number and a
CRC32 seeded with the header, because pure Python has no memory barriers: a slot that arrives late, torn, or
from another layout version or boot does not check out and is read as unknown.

Not promised: order between the two halves; protection from a file that is truncated while it is mapped (the
kernel answers that with SIGBUS), or from a second writer of the same half.

Layout (4096 bytes, little-endian), each half at 0 (daemon) and 2048 (trainer):

    +0   8s magic   +8 u32 version   +12 u32 side   +16 16s boot id
    +32  u64 sequence; its lowest bit names the slot in use, 0 = nothing written yet
    +40  u64 beats, +48 u64 progress, +56 u64 (step + 1) << 8 | phase; single words, trainer's half only
    +64  slot 0, +1056 slot 1; each: u32 crc, u32 length, u64 sequence, body of at most 976 bytes
"""

# ruff: noqa: N818 - a gate error is named after what is wrong

from __future__ import annotations

import contextlib
import mmap
import os
import re
import struct
import sys
import zlib
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Final

PAGE_BYTES: Final = 4096
VERSION: Final = 1

_MAGIC: Final = b"STEPGATE"
_HEADER: Final = struct.Struct("<8sII16s")
_SLOT: Final = struct.Struct("<IIQ")
_DAEMON_BODY: Final = struct.Struct("<BBHHxxQQQQQ")
_TRAINER_BODY: Final = struct.Struct("<IIQQQdHBx")
_HALF_BYTES: Final = PAGE_BYTES // 2
_SLOT_BYTES: Final = 992
_SLOTS_AT: Final = 64
_BODY_BYTES_MAX: Final = _SLOT_BYTES - _SLOT.size
_READ_TRIES_MAX: Final = 64

REASON_BYTES_MAX: Final = 160
PATH_BYTES_MAX: Final = _BODY_BYTES_MAX - _DAEMON_BODY.size - REASON_BYTES_MAX
WEIGHT_VERSION_BYTES_MAX: Final = 256

# Indices into the page seen as 512 words; what the trainer's hot path reads and writes by itself.
SEQUENCE_WORD: Final = 4
BEATS_WORD: Final = 256 + 5
PROGRESS_WORD: Final = 256 + 6
STEP_PHASE_WORD: Final = 256 + 7

_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "lustre", "cifs", "smb3", "smbfs", "ceph", "gpfs", "beegfs", "afs", "pvfs2", "orangefs"}
    | {
        "glusterfs",
        "fuse.glusterfs",
        "fuse.sshfs",
        "fuse.juicefs",
        "fuse.s3fs",
        "fuse.gcsfuse",
        "fuse.beegfs",
    }
)


class Order(IntEnum):
    """What the daemon wants; a higher value outranks a lower one."""

    GO = 0
    HOLD = 1
    RESYNC = 2
    ROLLBACK = 3
    SAVE = 4
    STOP = 5


class Phase(IntEnum):
    """What the trainer is doing."""

    UNKNOWN = 0
    ROLLOUT = 1
    REWARD = 2
    TRAIN = 3
    SYNC = 4
    CHECKPOINT = 5
    EVAL = 6
    HELD = 7


class GateError(Exception):
    """The gate page cannot be used; the message names the file and the remedy."""


class NoPage(GateError):
    """There is no page at this path (yet)."""


class NotAPage(GateError):
    """The file is there and is not a gate page."""


class WrongVersion(GateError):
    """The page was laid out by another version of Stepguard."""


class WrongBoot(GateError):
    """The page is from another boot or another machine, so its clock means nothing here."""


class NetworkFileSystem(GateError):
    """The path lies on a file system whose mapped pages are not shared with other machines' writers."""


class Unreachable(GateError):
    """The operating system refused to create or map the page."""


class PathTooLong(GateError):
    """A rollback target does not fit on the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonHalf:
    """
    What the daemon says.

    Args:
        order: what it wants.
        generation: grows with every new order; the trainer acknowledges by it.
        reason: stable reason code, cut at 160 bytes.
        lease_deadline_ns: CLOCK_MONOTONIC until which the daemon vouches for this half.
        target_step: step to roll back to.
        target_path: checkpoint to roll back to.
        judged_batch: number of the newest batch judged, 0 for none.
        judged_step: the step that this batch is for.
        judged_ok: the verdict on it; the reason for a False is in `reason`.

    """

    order: Order
    generation: int
    reason: str = ""
    lease_deadline_ns: int
    target_step: int | None = None
    target_path: str | None = None
    judged_batch: int = 0
    judged_step: int | None = None
    judged_ok: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerHalf:
    """
    What the trainer says.

    `beats`, `progress`, `step` and `phase` are single words that may be newer than the rest of the half.

    Args:
        pid: the trainer's process.
        acked_generation: the newest order carried out (or tried: the datagram `ack` says how it ended).
        attempt: counts rollbacks and relaunches.
        step: the newest step that the trainer named.
        phase: what it is doing.
        beats: grows by a thread: the process lives.
        progress: grows by the training loop: it works.
        last_reward: mean reward of the newest step or batch; may be NaN, None is unknown.
        rollouts_ok: live rollouts of this process.
        rollouts_failed: failed rollouts of this process.
        weight_version: newest version announced, cut at 256 bytes.
        handles_resync: a handler for RESYNC is registered.
        handles_rollback: the same for ROLLBACK.
        handles_save: the same for SAVE.

    """

    pid: int
    acked_generation: int = 0
    attempt: int = 0
    step: int | None = None
    phase: Phase = Phase.UNKNOWN
    beats: int = 0
    progress: int = 0
    last_reward: float | None = None
    rollouts_ok: int = 0
    rollouts_failed: int = 0
    weight_version: str | None = None
    handles_resync: bool = False
    handles_rollback: bool = False
    handles_save: bool = False


class GatePage:
    """
    The mapped page. Made by `create` (daemon), `open` (trainer) or `open(..., writable=False)` (an onlooker).

    `words` is the page as 512 native words, for a hot path that must not pay for a call: as long as
    `words[SEQUENCE_WORD]` stands still, `daemon()` would return what it returned last.
    """

    __slots__ = ("_identity", "_map", "_published", "_seeds", "_view", "path", "words", "writable")

    def __init__(self, path: Path, descriptor: int, *, writable: bool, boot_id: bytes) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self.path = path
        self.writable = writable
        self._map = mmap.mmap(descriptor, PAGE_BYTES, access=access)
        self._view = memoryview(self._map)
        self.words: memoryview = self._view.cast("Q")
        found = os.fstat(descriptor)
        self._identity = (found.st_dev, found.st_ino)
        self._seeds = tuple(zlib.crc32(_header(side, boot_id)) for side in (_DAEMON, _TRAINER))
        self._published = self.daemon()

    @classmethod
    def create(cls, path: Path | str, *, mode: int = 0o660, boot_id: bytes | None = None) -> GatePage:
        """
        Make the page, or adopt a valid one as it stands, orders and answers included (daemon's side).

        A page of another version, boot or size is replaced by a new file; the trainer notices and opens it.

        Args:
            path: where; the directory must exist.
            mode: permission bits of a new page.
            boot_id: 16 bytes, for tests; the kernel's by default.

        Raises:
            NetworkFileSystem: the directory is on NFS, Lustre or the like.
            Unreachable: the directory is missing, full or not writable.

        """
        path, boot_id = Path(path), _boot_id() if boot_id is None else boot_id
        _refuse_network(path)
        with contextlib.suppress(NoPage, NotAPage, WrongVersion, WrongBoot):
            return cls.open(path, boot_id=boot_id)
        try:
            _write_empty(path, mode, boot_id)
        except OSError as error:
            raise Unreachable(
                f"cannot create the gate page {path}: {error.strerror};"
                " choose a writable local run_dir with space"
            ) from error
        return cls.open(path, boot_id=boot_id)

    @classmethod
    def open(cls, path: Path | str, *, writable: bool = True, boot_id: bytes | None = None) -> GatePage:
        """
        Map an existing page.

        Args:
            path: the page.
            writable: False for an onlooker, or where the trainer may read and not write.
            boot_id: 16 bytes, for tests; the kernel's by default.

        Raises:
            NoPage: nothing there.
            NotAPage: something else there.
            WrongVersion: laid out by another version.
            WrongBoot: from before a reboot, or from another machine.
            NetworkFileSystem: on NFS, Lustre or the like.
            Unreachable: the system refused.

        """
        path, boot_id = Path(path), _boot_id() if boot_id is None else boot_id
        if sys.byteorder != "little":
            raise Unreachable(
                f"the gate page {path} needs a little-endian machine; run without STEPGUARD_RUN_DIR"
            )
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            raise NoPage(f"no gate page at {path}; start the daemon: stepguard run") from None
        except OSError as error:
            raise Unreachable(
                f"cannot open the gate page {path}: {error.strerror}; check its owner and mode"
            ) from error
        try:
            _refuse_network(path)
            _check(path, descriptor, boot_id)
            return cls(path, descriptor, writable=writable, boot_id=boot_id)
        except OSError as error:
            raise Unreachable(f"cannot map the gate page {path}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def publish(self, half: DaemonHalf) -> None:
        """
        Put the daemon's half on the page, whole or not at all.

        Raises:
            PathTooLong: `target_path` is longer than `PATH_BYTES_MAX`; nothing was changed.

        """
        reason = _cut(half.reason, REASON_BYTES_MAX)
        path = b"" if half.target_path is None else os.fsencode(half.target_path)
        if len(path) > PATH_BYTES_MAX:
            raise PathTooLong(
                f"the checkpoint path {half.target_path!r} has {len(path)} bytes and the gate page"
                f" {self.path} holds {PATH_BYTES_MAX}; use a shorter path or a symbolic link"
            )
        flags = (
            (half.target_step is not None)
            | (half.target_path is not None) << 1
            | (half.judged_step is not None) << 2
            | half.judged_ok << 3
        )
        fixed = _DAEMON_BODY.pack(
            half.order,
            flags,
            len(reason),
            len(path),
            half.generation,
            half.lease_deadline_ns,
            half.target_step or 0,
            half.judged_batch,
            half.judged_step or 0,
        )
        self._write(_DAEMON, fixed + reason + path)
        self._published = half

    def renew_lease(self, deadline_ns: int) -> None:
        """
        Vouch for what was published last until `deadline_ns` (CLOCK_MONOTONIC).

        Raises:
            GateError: nothing was published yet.

        """
        if self._published is None:
            raise GateError(
                f"nothing is published on the gate page {self.path}: publish an order before the lease"
            )
        self.publish(replace(self._published, lease_deadline_ns=deadline_ns))

    def daemon(self) -> DaemonHalf | None:
        """The daemon's half, or None: nothing there, torn, or of another version or boot."""
        body = self._read(_DAEMON)
        try:
            return None if body is None else _daemon_half(body)
        except (struct.error, ValueError):
            return None

    def report(self, half: TrainerHalf) -> None:
        """Put the trainer's half on the page; the single words first."""
        self.words[BEATS_WORD] = half.beats
        self.words[PROGRESS_WORD] = half.progress
        self.words[STEP_PHASE_WORD] = step_phase_word(half.step, half.phase)
        version = b"" if half.weight_version is None else _cut(half.weight_version, WEIGHT_VERSION_BYTES_MAX)
        flags = (
            (half.last_reward is not None)
            | (half.weight_version is not None) << 1
            | half.handles_resync << 2
            | half.handles_rollback << 3
            | half.handles_save << 4
        )
        fixed = _TRAINER_BODY.pack(
            half.pid,
            half.attempt,
            half.acked_generation,
            half.rollouts_ok,
            half.rollouts_failed,
            half.last_reward if half.last_reward is not None else 0.0,
            len(version),
            flags,
        )
        self._write(_TRAINER, fixed + version)

    def trainer(self) -> TrainerHalf | None:
        """The trainer's half, or None: no trainer yet, torn, or of another version or boot."""
        body = self._read(_TRAINER)
        try:
            return None if body is None else _trainer_half(body, self.words)
        except (struct.error, ValueError):
            return None

    def replaced(self) -> bool:
        """Whether the path now holds another file than the one mapped, or none."""
        try:
            found = self.path.stat(follow_symlinks=False)
        except OSError:
            return True
        return (found.st_dev, found.st_ino) != self._identity

    def close(self) -> None:
        """Unmap; the page stays on disk. Reading a closed page raises ValueError."""
        self.words.release()
        self._view.release()
        self._map.close()

    def _write(self, side: int, body: bytes) -> None:
        """Fill the slot out of use, then turn the sequence word to it."""
        at = side * _HALF_BYTES
        sequence = self.words[at // 8 + SEQUENCE_WORD] + 1
        start = at + _SLOTS_AT + (sequence & 1) * _SLOT_BYTES
        tail = struct.pack("<IQ", len(body), sequence) + body
        self._view[start : start + 4 + len(tail)] = (
            struct.pack("<I", zlib.crc32(tail, self._seeds[side])) + tail
        )
        self.words[at // 8 + SEQUENCE_WORD] = sequence

    def _read(self, side: int) -> bytes | None:
        """The body in use, checked; None after bounded tries."""
        at = side * _HALF_BYTES
        for _ in range(_READ_TRIES_MAX):
            sequence = self.words[at // 8 + SEQUENCE_WORD]
            if sequence == 0:
                return None
            start = at + _SLOTS_AT + (sequence & 1) * _SLOT_BYTES
            slot = bytes(self._view[start : start + _SLOT_BYTES])
            crc, length, written = _SLOT.unpack_from(slot)
            end = _SLOT.size + length
            if (
                written == sequence
                and end <= _SLOT_BYTES
                and zlib.crc32(slot[4:end], self._seeds[side]) == crc
            ):
                return slot[_SLOT.size : end]
        return None


def step_phase_word(step: int | None, phase: Phase) -> int:
    """The word that carries step and phase together; a step below 0 or beyond 55 bits counts as unknown."""
    known = 0 if step is None or not 0 <= step < 1 << 55 else step + 1
    return known << 8 | phase


_DAEMON: Final = 0
_TRAINER: Final = 1


def _header(side: int, boot_id: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, VERSION, side, boot_id)


def _daemon_half(body: bytes) -> DaemonHalf:
    order, flags, reason_len, path_len, generation, lease, target_step, judged_batch, judged_step = (
        _DAEMON_BODY.unpack_from(body)
    )
    reason_end = _DAEMON_BODY.size + reason_len
    return DaemonHalf(
        order=Order(order),
        generation=generation,
        reason=body[_DAEMON_BODY.size : reason_end].decode(),
        lease_deadline_ns=lease,
        target_step=target_step if flags & 1 else None,
        target_path=os.fsdecode(body[reason_end : reason_end + path_len]) if flags & 2 else None,
        judged_batch=judged_batch,
        judged_step=judged_step if flags & 4 else None,
        judged_ok=bool(flags & 8),
    )


def _trainer_half(body: bytes, words: memoryview) -> TrainerHalf:
    pid, attempt, acked, rollouts_ok, rollouts_failed, last_reward, version_len, flags = (
        _TRAINER_BODY.unpack_from(body)
    )
    step_phase = words[STEP_PHASE_WORD]
    version = body[_TRAINER_BODY.size : _TRAINER_BODY.size + version_len]
    return TrainerHalf(
        pid=pid,
        acked_generation=acked,
        attempt=attempt,
        step=(step_phase >> 8) - 1 if step_phase >> 8 else None,
        phase=Phase(step_phase & 0xFF),
        beats=words[BEATS_WORD],
        progress=words[PROGRESS_WORD],
        last_reward=last_reward if flags & 1 else None,
        rollouts_ok=rollouts_ok,
        rollouts_failed=rollouts_failed,
        weight_version=version.decode() if flags & 2 else None,
        handles_resync=bool(flags & 4),
        handles_rollback=bool(flags & 8),
        handles_save=bool(flags & 16),
    )


def _cut(text: str, bytes_max: int) -> bytes:
    """The text as UTF-8, cut at a character's border."""
    return text.encode("utf-8", "replace")[:bytes_max].decode("utf-8", "ignore").encode()


def _write_empty(path: Path, mode: int, boot_id: bytes) -> None:
    """A new page under a name of its own, its blocks allocated, then moved into place."""
    page = bytearray(PAGE_BYTES)
    for side in (_DAEMON, _TRAINER):
        page[side * _HALF_BYTES : side * _HALF_BYTES + _HEADER.size] = _header(side, boot_id)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        try:
            os.fchmod(descriptor, mode)
            # Allocated now: a hole would be found out later, by SIGBUS in the trainer, when the disk is full.
            os.posix_fallocate(descriptor, 0, PAGE_BYTES)
            os.pwrite(descriptor, page, 0)
        finally:
            os.close(descriptor)
        fresh.rename(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _check(path: Path, descriptor: int, boot_id: bytes) -> None:
    """Raise unless the file is a page of this version and boot."""
    header = os.pread(descriptor, _HEADER.size, 0)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise NotAPage(f"{path} is not a gate page; remove it and start the daemon again")
    _, version, _, boot = _HEADER.unpack(header)
    if version != VERSION:
        raise WrongVersion(
            f"the gate page {path} has layout version {version} and this stepguard speaks {VERSION};"
            " install the same stepguard beside the trainer and the daemon"
        )
    if os.fstat(descriptor).st_size != PAGE_BYTES:
        raise NotAPage(
            f"the gate page {path} is not {PAGE_BYTES} bytes long; remove it and start the daemon again"
        )
    if boot != boot_id:
        raise WrongBoot(
            f"the gate page {path} is from another boot or machine;"
            " start the daemon on this machine, it makes a new one"
        )


def _boot_id() -> bytes:
    """The kernel's id of this boot; zeros where the kernel has none."""
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


def _refuse_network(path: Path) -> None:
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        return
    refuse_network(path, mounts)


def refuse_network(path: Path, mountinfo: str) -> None:
    """Raise NetworkFileSystem where a page at `path` would lie on one; `mountinfo` as the kernel tells it."""
    kind = file_system_of(Path(os.path.realpath(path.parent)), mountinfo)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise NetworkFileSystem(
            f"the gate page {path} would lie on {kind}, where a mapped page is not shared;"
            " use a local run_dir, such as /run/stepguard or /dev/shm"
        )


def file_system_of(directory: Path, mountinfo: str) -> str | None:
    """
    The type of the file system that `directory` (resolved) lies on, from the text of `/proc/self/mountinfo`.

    The longest mount point wins, of equal ones the last: it hides the others. None when none is found.
    """
    parts = directory.parts
    found: tuple[int, str] | None = None
    for line in mountinfo.splitlines():
        front, separator, back = line.partition(" - ")
        fields = front.split(" ")
        if not separator or len(fields) < 5 or not back:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])).parts
        if parts[: len(point)] == point and (found is None or len(point) >= found[0]):
            found = (len(point), back.split(" ")[0])
    return None if found is None else found[1]
