"""
Whether one file of a checkpoint is sound: its structure against its size, its checksums, and its numbers.

It promises to read in bounded pieces whatever the file's size, to run nothing that a file contains, and to
say why in one sentence. What it does not promise: that weights are any good. They are finite and whole, that
is all.

A float is not finite exactly when its exponent bits are all ones. Read as a signed integer such a pattern is
at or above a threshold (positive), read as an unsigned one at or above the threshold with the sign bit
(negative), so that two maxima over the raw integers find NaN and infinity in every format at the speed of
memory, without converting anything.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from stepguardd.checkpoints.pickles import Contents, PickleError, Range, dangerous, read_pickle

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Small enough to stay in a core's second-level cache between the read and the two passes over it.
CHUNK_BYTES = 1 << 18
# One pass proves most pieces finite. Where it could not, that many pieces are read without asking it again.
FILTER_EVERY = 64
# safetensors' own limit on its header.
HEADER_BYTES_MAX = 100_000_000
# A pickle inside a checkpoint beside the tensors: names, shapes, optimizer groups, data-loader state.
PICKLE_BYTES_MAX = 256 << 20
ZIP_ENTRIES_MAX = 2_000_000


class BadFileError(Exception):
    """The file is damaged, holds numbers that are not finite, or would run code: do not load it."""


class CutShortError(Exception):
    """The file ends before its own structure says: the save never finished."""


class UnknownFileError(Exception):
    """The file cannot be judged here; the message says what stands in the way."""


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """
    A float format as raw integers of `width` bytes.

    `positive` is the smallest pattern, read as a signed integer, that is not finite; None for formats whose
    only NaN is the pattern of minus zero (the `fnuz` family).
    """

    width: int
    positive: int | None
    signed: bool = True


# Patterns at or above these are NaN or infinity. Formats that cannot hold either (fp4, fp6) are not listed.
FLOATS: dict[str, FloatFormat] = {
    "float64": FloatFormat(8, 0x7FF0_0000_0000_0000),
    "float32": FloatFormat(4, 0x7F80_0000),
    "float16": FloatFormat(2, 0x7C00),
    "bfloat16": FloatFormat(2, 0x7F80),
    "float8_e5m2": FloatFormat(1, 0x7C),
    "float8_e4m3fn": FloatFormat(1, 0x7F),
    "float8_e5m2fnuz": FloatFormat(1, None),
    "float8_e4m3fnuz": FloatFormat(1, None),
    "float8_e8m0fnu": FloatFormat(1, 0xFF, signed=False),
    "complex64": FloatFormat(4, 0x7F80_0000),
    "complex128": FloatFormat(8, 0x7FF0_0000_0000_0000),
}

# safetensors' names: (our name, or None where the numbers cannot be NaN; bits of one element).
_SAFETENSORS: dict[str, tuple[str | None, int]] = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "C64": ("complex64", 64),
    "F6_E2M3": (None, 6),
    "F6_E3M2": (None, 6),
    "F4": (None, 4),
    "I64": (None, 64),
    "U64": (None, 64),
    "I32": (None, 32),
    "U32": (None, 32),
    "I16": (None, 16),
    "U16": (None, 16),
    "I8": (None, 8),
    "U8": (None, 8),
    "BOOL": (None, 8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """
    How files are to be read.

    values  scan every float and check every checksum; otherwise structure alone.
    spent   told how many bytes were just read: progress, the bandwidth limit and cancelling hang on it.
    """

    values: bool
    spent: Callable[[int], None] = lambda count: None


class Tensor(NamedTuple):
    """A named run of numbers, bytes [start, end) of a file; a tuple, for there may be a hundred thousand."""

    name: str
    start: int
    end: int
    dtype: str | None


# --- safetensors --------------------------------------------------------------------------------------------


def check_safetensors(path: Path, reading: Reading) -> None:
    """
    The header against the file's size, and every float finite.

    Raises:
        BadFileError, CutShortError, UnknownFileError: as their names say.
        OSError: the file cannot be read.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        tensors, data_start = _read_header(file, size)
        if reading.values:
            runs = [t for t in tensors if t.dtype is not None and t.end > t.start]
            _scan(file, runs, data_start, reading)


def _read_header(file: IO[bytes], size: int) -> tuple[list[Tensor], int]:
    if size < 8:
        raise CutShortError(f"has only {size} bytes")
    length = int.from_bytes(_read_at(file, 0, 8), "little")
    if length > HEADER_BYTES_MAX:
        raise BadFileError(f"claims a header of {length} bytes")
    if 8 + length > size:
        raise CutShortError("ends inside its header")
    try:
        header = json.loads(_read_at(file, 8, length))
        tensors = [_tensor(name, entry) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadFileError(f"has a malformed header: {error}") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_coverage(tensors, size - 8 - length)
    return tensors, 8 + length


def _tensor(name: str, entry: dict[str, Any]) -> Tensor:
    start, end = entry["data_offsets"]
    code = entry["dtype"]
    count = 1
    for extent in entry["shape"]:
        if not isinstance(extent, int) or extent < 0:
            raise ValueError(f"tensor {name} has an impossible shape")
        count *= extent
    if code not in _SAFETENSORS:
        raise UnknownFileError(f"holds tensor {name} of type {code}, which is not known here")
    dtype, bits = _SAFETENSORS[code]
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end):
        raise ValueError(f"tensor {name} has impossible offsets")
    if count * bits != (end - start) * 8:
        raise ValueError(f"the shape of tensor {name} does not fit its bytes")
    return Tensor(name=name, start=start, end=end, dtype=dtype)


def _check_coverage(tensors: Sequence[Tensor], data_bytes: int) -> None:
    """The tensors must tile the data without a gap or an overlap, as the format demands."""
    at = 0
    for tensor in tensors:
        if tensor.start != at:
            raise BadFileError(f"has a gap or an overlap before tensor {tensor.name}")
        at = tensor.end
    if at > data_bytes:
        raise CutShortError(f"is {at - data_bytes} bytes shorter than its header says")
    if at < data_bytes:
        raise BadFileError(f"is {data_bytes - at} bytes longer than its header says")


def check_index(path: Path) -> None:
    """A Hugging Face index: every shard it names must lie beside it, and hold the tensors assigned to it."""
    try:
        weights = json.loads(path.read_bytes())["weight_map"]
        shards = {str(shard) for shard in weights.values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadFileError(f"is no index of shards: {error}") from error
    for shard in sorted(shards):
        if PurePosixPath(shard).name != shard or shard in {"", ".", ".."}:
            raise BadFileError(f"names the shard '{shard}', which lies outside the folder")
        if not (path.parent / shard).is_file():
            raise CutShortError(f"names the shard {shard}, which is missing")
        if shard.endswith(".safetensors"):
            _check_assigned(path.parent / shard, {name for name, of in weights.items() if of == shard})


def _check_assigned(shard: Path, names: set[str]) -> None:
    with _open(shard) as file:
        tensors, _ = _read_header(file, os.fstat(file.fileno()).st_size)
    lost = sorted(names - {tensor.name for tensor in tensors})
    if lost:
        raise BadFileError(f"assigns tensor {lost[0]} to {shard.name}, which does not hold it")


# --- torch.save ---------------------------------------------------------------------------------------------


def check_torch(path: Path, reading: Reading) -> None:
    """
    A file written by `torch.save`: a zip of uncompressed storages beside one pickle, which is read but never
    run.

    Raises:
        BadFileError, CutShortError, UnknownFileError: as their names say.
        OSError: the file cannot be read.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        _check_torch_zip(_Slice(file, 0, size), reading)


class _Slice:
    """A part of a file, as zipfile wants it: readable, seekable, and never read beyond."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self.file, self.offset, self.length = file, offset, length
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.length}[whence]
        if base + to < 0:
            raise OSError("a seek before the start")
        self._at = base + to
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.length - self._at)
        count = left if count < 0 else min(count, left)
        data = _read_at(self.file, self.offset + self._at, count) if count else b""
        self._at += len(data)
        return data


def _check_torch_zip(part: _Slice, reading: Reading) -> None:
    if part.length == 0:
        raise CutShortError("is empty")
    start = part.read(4)
    part.seek(0)
    if start != b"PK\x03\x04":
        if start[:1] == b"\x80":
            _check_legacy(part)
        raise BadFileError("is no zip file")
    try:
        archive = zipfile.ZipFile(part)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
        raise CutShortError("has no end of a zip: it was cut off while being written") from error
    entries = archive.infolist()
    if len(entries) > ZIP_ENTRIES_MAX:
        raise BadFileError(f"holds {len(entries)} entries")
    contents = _read_torch_pickle(part, entries, reading)
    # torch can be told to write no checksums: it then writes zero everywhere.
    checksums = any(entry.CRC for entry in entries)
    for entry in entries:
        if not entry.is_dir():
            _check_entry(part, entry, contents, checksums, reading)


def _check_legacy(part: _Slice) -> None:
    """
    Before torch 1.6: bare pickles in a row. They are looked through for what they would run, and left
    unjudged.
    """
    stream = io.BytesIO(part.read(PICKLE_BYTES_MAX))
    # A magic number, a version, the system, the object, and the keys of its storages.
    for _ in range(5):
        _refuse_dangerous(_read_contents(stream, ""))
    raise UnknownFileError("is in torch's old format (not a zip), which cannot be checked without running it")


def _read_torch_pickle(part: _Slice, entries: list[zipfile.ZipInfo], reading: Reading) -> Contents:
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UnknownFileError("is a TorchScript archive, not a checkpoint")
    if len(pickles) != 1:
        raise BadFileError("is a zip without exactly one data.pkl: torch.save did not write it")
    entry = pickles[0]
    if entry.file_size > PICKLE_BYTES_MAX:
        raise UnknownFileError(f"has a pickle of {entry.file_size} bytes, too large to look through")
    data_start = _entry_start(part, entry)
    part.seek(data_start)
    data = part.read(entry.file_size)
    reading.spent(len(data))
    if entry.CRC and zlib.crc32(data) != entry.CRC:
        raise BadFileError(f"fails its checksum in {entry.filename}")
    contents = _read_contents(data, f"{entry.filename} ")
    _refuse_dangerous(contents)
    return contents


def _read_contents(data: bytes | IO[bytes], prefix: str) -> Contents:
    try:
        return read_pickle(data)
    except PickleError as error:
        raise BadFileError(f"{prefix}{error}") from error


def _refuse_dangerous(contents: Contents) -> None:
    name = dangerous(contents)
    if name is not None:
        raise BadFileError(f"would run {name} when loaded")


def _entry_start(part: _Slice, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin, behind its local header."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise BadFileError(f"holds the compressed entry {entry.filename}: torch.save stores them plain")
    # A damaged directory of the zip can place entries before the file's first byte.
    header = b""
    if entry.header_offset >= 0:
        part.seek(entry.header_offset)
        header = part.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise BadFileError(f"has no header for {entry.filename}")
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = entry.header_offset + 30 + name_bytes + extra_bytes
    if start + entry.file_size > part.length:
        raise BadFileError(f"ends inside {entry.filename}")
    return start


def _check_entry(
    part: _Slice, entry: zipfile.ZipInfo, contents: Contents, checksums: bool, reading: Reading
) -> None:
    start = _entry_start(part, entry)
    folder, _, key = entry.filename.rpartition("/")
    storage = contents.storages.get(key) if folder.endswith("/data") or folder == "data" else None
    if entry.filename.endswith("/data.pkl") or not reading.values:
        return
    dtype = storage.dtype if storage is not None else None
    scanner = _Scanner(FLOATS[dtype]) if dtype in FLOATS else None
    crc = 0
    for chunk in _chunks(part.file, part.offset + start, entry.file_size, reading):
        if checksums:
            crc = zlib.crc32(chunk, crc)
        if scanner is not None and scanner.not_finite(chunk):
            raise BadFileError(f"holds NaN or infinity ({dtype}, storage {key})")
    if checksums and crc != entry.CRC:
        raise BadFileError(f"fails its checksum in {entry.filename}")


# --- torch distributed checkpoints and bare pickles ---------------------------------------------------------


def check_dcp(metadata: Path, reading: Reading) -> None:
    """
    A torch distributed checkpoint: every byte range that `.metadata` refers to must be there, and be sound.

    Raises:
        BadFileError, CutShortError, UnknownFileError: as their names say; the message names the .distcp file.
        OSError: a file cannot be read.
    """
    contents = check_pickle(metadata)
    ranges = sorted(contents.ranges, key=lambda r: (r.path, r.offset))
    if not ranges:
        raise UnknownFileError("names no byte ranges that can be understood here")
    for name, items in groupby(ranges, key=lambda r: r.path):
        path = _beside(metadata, name)
        try:
            _check_shard(path, list(items), reading)
        except (BadFileError, CutShortError, UnknownFileError) as error:
            raise type(error)(f"refers to {name}, which {error}") from error


def _beside(metadata: Path, name: str) -> Path:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not name:
        raise BadFileError(f"refers to '{name}', which lies outside the folder")
    path = metadata.parent / name
    if path.is_symlink() and not path.resolve().is_relative_to(metadata.parent.resolve()):
        raise UnknownFileError(f"refers to {name}, a symbolic link that leaves the folder: not followed")
    return path


def _check_shard(path: Path, items: list[Range], reading: Reading) -> None:
    if not path.is_file():
        raise CutShortError("is missing")
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        for item in items:
            if item.offset < 0 or item.length < 0:
                raise BadFileError("is given an impossible byte range")
            if item.offset + item.length > size:
                raise CutShortError(f"has only {size} bytes")
            if reading.values and item.length:
                _check_item(file, item, reading)


def _check_item(file: IO[bytes], item: Range, reading: Reading) -> None:
    part = _Slice(file, item.offset, item.length)
    start = part.read(4)
    part.seek(0)
    if start == b"PK\x03\x04":
        _check_torch_zip(part, reading)
    elif start[:1] == b"\x80":
        _refuse_dangerous(_read_contents(part.read(PICKLE_BYTES_MAX), ""))
        reading.spent(item.length)
    else:
        # Some writers (safetensors shards, raw bytes) put no frame around an item: its presence is all there
        # is.
        reading.spent(item.length)


def check_pickle(path: Path) -> Contents:
    """A bare pickle: well-formed, whole, and naming nothing that would run code. It is not run."""
    size = path.stat().st_size
    if size == 0:
        raise CutShortError("is empty")
    if size > PICKLE_BYTES_MAX:
        raise UnknownFileError(f"is a pickle of {size} bytes, too large to look through")
    data = path.read_bytes()
    if data[-1:] != b".":
        raise CutShortError("is a pickle without an end: it was cut off while being written")
    contents = _read_contents(data, "")
    _refuse_dangerous(contents)
    return contents


def check_json(path: Path) -> Any:
    """A JSON file: whole and well-formed."""
    data = path.read_bytes()
    if not data.strip():
        raise CutShortError("is empty")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CutShortError(f"is no whole JSON document: {error}") from error


def check_manifest(path: Path) -> None:
    """Check verl's `ckpt_contents.json`: every path in it must be there, under its own folder."""
    manifest = check_json(path)
    contents = manifest.get("contents") if isinstance(manifest, dict) else None
    if not isinstance(contents, dict):
        raise BadFileError("lists no contents")
    for name, entry in sorted(contents.items()):
        place = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(place, str):
            continue
        pure = PurePosixPath(place)
        if pure.is_absolute() or ".." in pure.parts:
            raise BadFileError(f"puts {name} at '{place}', outside the folder")
        if not (path.parent / place).exists():
            raise CutShortError(f"names {place}, which is missing")


# --- numbers ------------------------------------------------------------------------------------------------


def _scan(file: IO[bytes], tensors: list[Tensor], base: int, reading: Reading) -> None:
    """Every float of the tensors; neighbours of one type are read as one run."""
    for dtype, group in groupby(tensors, key=lambda tensor: tensor.dtype):
        if dtype is None:
            continue
        scanner = _Scanner(FLOATS[dtype])
        for run in _runs(list(group)):
            at = run[0].start
            for chunk in _chunks(file, base + at, run[-1].end - at, reading):
                if scanner.not_finite(chunk):
                    first = at + scanner.first(chunk)
                    tensor = run[bisect_right([t.start for t in run], first) - 1]
                    raise BadFileError(f"holds NaN or infinity in tensor {tensor.name} ({dtype})")
                at += len(chunk)


def _runs(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    run = [tensors[0]]
    for tensor in tensors[1:]:
        if tensor.start != run[-1].end:
            yield run
            run = []
        run.append(tensor)
    yield run


class _Scanner:
    """Finds NaN and infinity in raw bytes of one format."""

    def __init__(self, form: FloatFormat) -> None:
        # numpy comes in only where numbers are read: a look at the structure alone starts in a third of the
        # time.
        import numpy  # noqa: PLC0415 - heavy, and only needed here

        self._np = numpy
        self._form = form
        bits = form.width * 8
        self._signed: np.dtype[Any] = numpy.dtype(f"<i{form.width}")
        self._unsigned: np.dtype[Any] = numpy.dtype(f"<u{form.width}")
        self._sign = 1 << (bits - 1)
        self._without_filter = 0

    def not_finite(self, chunk: memoryview) -> bool:
        form, positive = self._form, self._form.positive
        unsigned = self._np.frombuffer(chunk, dtype=self._unsigned)
        if positive is None:
            return bool((unsigned == self._sign).any())
        if self._without_filter:
            self._without_filter -= 1
        else:
            # Every number that is not finite has all of these bits; weights below two, nearly all there are,
            # never do.
            if int(self._np.bitwise_or.reduce(unsigned)) & positive != positive:
                return False
            self._without_filter = FILTER_EVERY
        if not form.signed:
            return bool(unsigned.max() >= positive)
        if self._np.frombuffer(chunk, dtype=self._signed).max() >= positive:
            return True
        return bool(unsigned.max() >= (positive | self._sign))

    def first(self, chunk: memoryview) -> int:
        """Byte offset in the chunk of the first number that is not finite."""
        values: NDArray[Any] = self._np.frombuffer(chunk, dtype=self._unsigned)
        positive = self._form.positive
        if positive is None:
            found = values == self._sign
        elif not self._form.signed:
            found = values >= positive
        else:
            found = (values & self._np.array(self._sign - 1, dtype=self._unsigned)) >= positive
        return int(found.argmax()) * self._form.width


def _chunks(file: IO[bytes], offset: int, length: int, reading: Reading) -> Iterator[memoryview]:
    """The bytes in pieces, each in the same buffer: a piece is valid until the next one is asked for."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, length)))
    done = 0
    while done < length:
        # Filled to the brim: a short read must not split a number.
        piece = buffer[: min(CHUNK_BYTES, length - done)]
        filled = 0
        while filled < len(piece):
            count = os.preadv(file.fileno(), [piece[filled:]], offset + done + filled)
            if count == 0:
                raise CutShortError("became shorter while it was read")
            filled += count
        done += filled
        reading.spent(filled)
        yield piece


def _read_at(file: IO[bytes], offset: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = os.pread(file.fileno(), min(count - len(data), 1 << 24), offset + len(data))
        if not piece:
            break
        data += piece
    return bytes(data)


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    # A name that was swapped for a pipe or a device after it was listed must neither block nor be read.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        yield file
