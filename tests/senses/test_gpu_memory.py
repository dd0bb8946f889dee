"""Whether GPU memory came back after a stop: the dead are listed no more, and the rest is counted."""

import asyncio
import contextlib
import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from requirements import require
from stepguardd import clock
from stepguardd.core.events import GpuBaseline
from stepguardd.effects.gpu_memory import LEFT_BYTES_MAX, SETTLED_S, Release, baseline, given_back
from stepguardd.sources.nvml import Gpu, GpuProcess, NvmlDriver

HOLDER = Path(__file__).with_name("gpu_holder.py")
GIB = 1 << 30
SERVER, TRAINER = 10, 20


def gpu(used: int | None, index: int = 0, **holders: int | None) -> Gpu:
    pids = {"server": SERVER, "trainer": TRAINER}
    processes = tuple(GpuProcess(pid=pids[name], used_bytes=size) for name, size in holders.items())
    return Gpu(index=index, used_bytes=used, total_bytes=80 * GIB, processes=processes)


def living(pid: int) -> bool:
    return pid in {SERVER, TRAINER}


BEFORE = baseline([gpu(GIB)])
RUNNING = [gpu(61 * GIB, server=60 * GIB)]


def test_memory_is_back_when_the_dead_are_gone_and_the_total_is_what_it_was() -> None:
    release = Release({SERVER}, BEFORE, RUNNING, living)
    listed = release.held([gpu(61 * GIB, server=60 * GIB)], 0.0)
    assert listed == "GPU 0 still holds memory of pid 10, which was ended"
    assert release.held([gpu(31 * GIB)], 9.0) == (
        "GPU 0 holds 30.0 GiB more than before its start, of no living process"
    )
    assert release.held([gpu(31 * GIB)], 49.0) is not None, "it may stand still: this GPU was the server's"
    assert release.held([gpu(GIB + LEFT_BYTES_MAX)], 50.0) is None


def test_a_trainer_on_the_same_gpu_holds_its_own_share() -> None:
    """It has grown since the server started; that is none of the server's memory."""
    before = baseline([gpu(6 * GIB, trainer=5 * GIB)], living)
    release = Release({SERVER}, before, [gpu(71 * GIB, server=40 * GIB, trainer=30 * GIB)], living)
    assert release.held([gpu(51 * GIB, trainer=30 * GIB)], 0.0) is not None
    assert release.held([gpu(31 * GIB, trainer=30 * GIB)], 1.0) is None


def test_other_peoples_gpus_are_none_of_its_business() -> None:
    before = baseline([gpu(GIB), gpu(GIB, index=1)])
    release = Release({SERVER}, before, [*RUNNING, gpu(9 * GIB, index=1, trainer=8 * GIB)], living)
    assert release.held([gpu(GIB), gpu(70 * GIB, index=1, trainer=69 * GIB)], 0.0) is None


def test_without_a_baseline_the_dead_alone_tell() -> None:
    """A server that was there before the daemon."""
    release = Release({SERVER}, (), RUNNING, living)
    assert release.held([gpu(61 * GIB, server=60 * GIB)], 0.0) is not None
    assert release.held([gpu(61 * GIB)], 1.0) is None


@pytest.mark.parametrize(
    "unknown",
    [gpu(None), Gpu(index=0, used_bytes=40 * GIB), gpu(40 * GIB, trainer=None), Gpu(index=0, lost=True)],
)
def test_what_the_driver_does_not_tell_is_waited_for_by_nobody(unknown: Gpu) -> None:
    assert Release({SERVER}, BEFORE, RUNNING, living).held([unknown], 0.0) is None
    assert baseline([unknown], living) == ()
    assert baseline(None) == ()


@pytest.mark.parametrize("listed", [{}, {"server": 5 * GIB}], ids=["none", "of_the_host"])
def test_where_pids_match_nothing_memory_is_waited_for_while_it_falls(listed: dict[str, int]) -> None:
    """In a container NVML lists nobody, or the host's pids: what stays may be the trainer's."""
    before = (GpuBaseline(gpu=0, unclaimed_bytes=GIB),)
    release = Release({99}, before, [gpu(61 * GIB, **listed)], lambda pid: False)
    at = 0.0
    for used in (61, 50, 40, 30):
        assert release.held([gpu(used * GIB, **listed)], at) is not None
        at += SETTLED_S - 1.0
    assert release.held([gpu(30 * GIB, **listed)], at) is not None
    assert release.held([gpu(30 * GIB, **listed)], at + SETTLED_S) is None


def test_the_wait_ends_with_what_is_held_or_as_soon_as_nothing_is() -> None:
    looks = iter([RUNNING, RUNNING, [gpu(GIB)]])

    async def look() -> list[Gpu] | None:
        return next(looks, None)

    release = Release({SERVER}, BEFORE, RUNNING, living)
    assert asyncio.run(given_back(release, look, timeout_s=60.0)) is None
    assert next(looks, None) is None, "looked at until it was back"
    assert asyncio.run(given_back(release, look, timeout_s=60.0)) is None, "the driver went away"

    async def still() -> list[Gpu]:
        return RUNNING

    held = asyncio.run(given_back(release, still, timeout_s=0.01))
    assert held == "GPU 0 still holds memory of pid 10, which was ended, 0.01 s after it was ended"


@contextlib.contextmanager
def holding(mib: int) -> Iterator["subprocess.Popen[str]"]:
    """A process with so much memory on the first GPU."""
    command = [sys.executable, str(HOLDER), str(mib)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            said = holder.stdout.readline()
            assert said == "holds\n", holder.stderr.read() if holder.stderr is not None else said
            yield holder
        finally:
            holder.kill()


@pytest.mark.timeout(240)
def test_a_real_gpu_gives_the_memory_of_the_dead_back_beside_a_living_one() -> None:
    """On a real driver: a server's 8 GiB are seen, its death gives them back, a trainer keeps its own 2."""
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    try:
        ctypes.CDLL("libcuda.so.1")
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as missing:
        require("gpu", f"no NVIDIA driver: {missing}")
    driver = NvmlDriver()

    async def look() -> tuple[Gpu, ...]:
        return (await asyncio.to_thread(driver.look)).gpus

    first = driver.look().gpus[0]
    with holding(2048):
        before = baseline(driver.look().gpus)
        assert before, "this driver tells neither memory nor processes"
        with holding(8192) as server:
            running = driver.look().gpus
            assert (running[0].used_bytes or 0) - (first.used_bytes or 0) > 9 * GIB
            release = Release({server.pid}, before, running)
            assert release.held(running, clock.monotonic()) is not None, running[0].processes
            server.kill()
            server.wait(timeout=60)
            began = clock.monotonic()
            held = asyncio.run(given_back(release, look, timeout_s=50.0))
            took_s = clock.monotonic() - began
        after = driver.look().gpus[0]
        listed = sorted(process.pid for process in running[0].processes or ())
        print(f"back {took_s:.2f} s after the death; NVML listed pids {listed}, the server's {server.pid}")
        assert held is None
        assert (after.used_bytes or 0) < (running[0].used_bytes or 0) - 7 * GIB
        assert (after.used_bytes or 0) > (first.used_bytes or 0) + GIB, "the trainer keeps its own"
