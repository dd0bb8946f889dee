"""
What vetting costs: `python -m benchmarks.checkpoints`.

Each figure is a ratio to the plain reading of the same file into one buffer, in the same run, page cache
warm, one core. Alternating rounds and medians, because another program's noise falls on both alike. The goal
is 0.6 for safetensors; for `.pt` zlib's CRC sets the pace, which is measured beside it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from stepguardd.checkpoints import files
from stepguardd.checkpoints.layouts import Framework, find_checkpoints, open_folder, surroundings
from stepguardd.checkpoints.vetting import Depth, Vetter, VettingLimits

MIB = 1 << 20
SIZE_BYTES = 512 * MIB
ROUNDS = 7
READING = files.Reading(values=True)


def read_into_one_buffer(path: Path) -> None:
    """The floor: the whole file once through one buffer of the size that vetting uses too."""
    buffer = memoryview(bytearray(files.CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def naive(path: Path) -> None:
    """What a first attempt does: numpy's isfinite over a mapped file."""
    values = np.memmap(path, dtype=np.float32, mode="r", offset=4096, shape=(SIZE_BYTES // 4 - 4096,))
    assert np.isfinite(values).all()


def crc_alone(path: Path) -> None:
    """What zlib gives: the pace that a `.pt` file allows."""
    buffer = memoryview(bytearray(files.CHUNK_BYTES))
    crc = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)


def speeds(path: Path, *acts: Callable[[Path], None]) -> list[float]:
    """GB/s of each at its best of several alternating rounds; the first round warms up and does not count."""
    spans: list[list[float]] = [[] for _ in acts]
    for number in range(ROUNDS + 1):
        for act, taken in zip(acts, spans, strict=True):
            started = time.process_time()
            act(path)
            if number:
                taken.append(time.process_time() - started)
    size = path.stat().st_size
    return [size / min(taken) / 1e9 for taken in spans]


def numbers(size_bytes: int, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Normally distributed around zero, so many bytes of them."""
    count = size_bytes // torch.empty(0, dtype=dtype).element_size()
    some = torch.randn(min(count, MIB), generator=torch.Generator().manual_seed(3)) * scale
    limit = torch.finfo(dtype).max  # beyond it, whether fp8 is its largest number or NaN is torch's to say
    return some.clamp(-limit, limit).to(dtype).repeat(count // len(some))


def safetensors_figures(home: Path) -> None:
    """Every float format, with numbers as weights have them and with large ones, and many small tensors."""
    print(f"safetensors, {SIZE_BYTES // MIB} MiB           vetting    read    ratio (goal >= 0.6)")
    path = home / "model.safetensors"
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn):
        for scale, label in ((0.02, "as weights are"), (100.0, "large ones")):
            save_file({"w": numbers(SIZE_BYTES, dtype, scale)}, path)
            _print_ratio(f"{str(dtype).removeprefix('torch.')}, {label}", path)
    small = {f"layer.{n}": numbers(MIB, torch.bfloat16, 0.02) for n in range(SIZE_BYTES // MIB)}
    save_file(small, path)
    _print_ratio(f"bfloat16, {len(small)} tensors", path)
    save_file({"w": numbers(SIZE_BYTES, torch.float32, 0.02)}, path)
    floor, slow = speeds(path, read_into_one_buffer, naive)
    print(f"  isfinite over a mapped file (float32) {slow:5.1f} GB/s, {slow / floor:4.2f} of read")


def _print_ratio(label: str, path: Path) -> None:
    floor, vetting = speeds(path, read_into_one_buffer, lambda p: files.check_safetensors(p, READING))
    print(f"  {label:30} {vetting:5.1f} {floor:7.1f} GB/s   {vetting / floor:4.2f}")


def torch_figures(home: Path) -> None:
    """A .pt file: checksums and numbers in one pass, beside zlib alone and torch's own way."""
    path = home / "model.pt"
    torch.save({"w": numbers(SIZE_BYTES, torch.bfloat16, 0.02)}, path)

    def torchs_way(of: Path) -> None:
        for value in torch.load(of, weights_only=True, mmap=True).values():
            assert torch.isfinite(value).all()

    floor, crc, vetting, theirs = speeds(
        path, read_into_one_buffer, crc_alone, lambda p: files.check_torch(p, READING), torchs_way
    )
    print(
        f".pt, {SIZE_BYTES // MIB} MiB: {vetting:.1f} GB/s, {vetting / floor:.2f} of read, "
        f"{vetting / crc:.2f} of zlib's CRC; torch.load + isfinite {theirs:.1f} GB/s without checksums"
    )


def process_figures(home: Path) -> None:
    """What the process around it costs, for a checkpoint of a few bytes."""
    run = home / "checkpoint-1"
    run.mkdir()
    save_file({"w": torch.zeros(4)}, run / "model.safetensors")
    (run / "trainer_state.json").write_text("{}")
    folder = open_folder(home, Framework.TRL)
    checkpoints = find_checkpoints(folder)
    around = surroundings(folder, checkpoints)
    for depth in Depth:
        firsts, nexts = [], []
        for _ in range(ROUNDS):
            with Vetter(VettingLimits(depth=depth)) as vetter:
                for spans in (firsts, nexts):
                    started = time.perf_counter()
                    assert vetter.vet(folder, checkpoints[0], around[0]).verdict == "good"
                    spans.append(time.perf_counter() - started)
        first, after = statistics.median(firsts) * 1e3, statistics.median(nexts) * 1e3
        print(f"vetting {depth:9} a tiny checkpoint: {first:6.1f} ms the first, {after:5.2f} ms each more")


def main() -> None:
    """All of them."""
    torch.set_num_threads(1)
    memory = Path("/dev/shm")
    room = memory.is_dir() and os.statvfs(memory).f_bavail * os.statvfs(memory).f_frsize > 4 * SIZE_BYTES
    with tempfile.TemporaryDirectory(dir=memory if room else None) as folder:
        home = Path(folder)
        safetensors_figures(home)
        torch_figures(home)
        process_figures(home)


if __name__ == "__main__":
    main()
