"""
The GPU senses on a real driver, with processes of the tests' own that take its memory and break its rules.

They use the first GPU. Nothing of it is reset or set; a kernel that writes where it may not ends its own
process alone.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from requirements import require
from stepguardd import proc
from stepguardd.config import load_config
from stepguardd.core.events import Event, GpuTrouble, GpuTroubled, OomKind, OomSeen, Proc
from stepguardd.core.state import Mode, Server, Settings, State, initial
from stepguardd.sources.gpu import Headroom, used_by
from stepguardd.sources.nvml import Gpu, GpuLook, NvmlDriver
from stepguardd.surroundings import Surroundings

pytestmark = pytest.mark.e2e

GIB = 1 << 30
ILLEGAL_ADDRESS = 700
OUT_OF_MEMORY = 2
OUT_OF_TORCHS = """
import torch
held = []
while True:
    held.append(torch.empty(1 << 33, dtype=torch.uint8, device="cuda"))
"""

T = TypeVar("T")


class OnGpu:
    """A process on the GPU that does as it is told."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("cuda_process.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    @property
    def pid(self) -> int:
        return self.process.pid

    def does(self, *words: object) -> int:
        """Let it do this; the driver's answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def dies(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def driver() -> NvmlDriver:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
        ctypes.CDLL("libcuda.so.1")
    except OSError as missing:
        require("gpu", f"no NVIDIA driver: {missing}")
    return NvmlDriver()


@pytest.fixture
def on_gpu(driver: NvmlDriver) -> Iterator[OnGpu]:
    driver.look()
    process = OnGpu()
    try:
        yield process
    finally:
        process.dies()


def first(look: GpuLook) -> Gpu:
    return look.gpus[0]


def soon(look: Callable[[], T], seen: Callable[[T], object], what: str) -> T:
    """Look until it is seen."""
    deadline = time.monotonic() + 30
    while True:
        found = look()
        if seen(found):
            return found
        assert time.monotonic() < deadline, (what, found)
        time.sleep(0.02)


def test_memory_is_told_whose_it_is_and_is_back_where_it_was_once_the_process_is_dead(driver: NvmlDriver):
    before = first(driver.look()).used_bytes
    assert before is not None
    process = OnGpu()
    try:
        assert process.does("take", 4 * GIB) == 0
        held = soon(driver.look, lambda look: used_by(look.gpus, {process.pid}), "its memory is told")
        own = used_by(held.gpus, {process.pid})
        used = first(held).used_bytes
        assert own is not None
        assert own >= 4 * GIB
        assert used is not None
        assert used - before >= 4 * GIB
    finally:
        process.dies()
    after = soon(driver.look, lambda look: used_by(look.gpus, {process.pid}) == 0, "its memory is nobody's")
    soon(driver.look, lambda look: (first(look).used_bytes or 0) <= before + GIB // 8, "the total is back")
    assert first(after).total_bytes == first(held).total_bytes


def test_a_kernel_that_writes_where_nothing_is_mapped_is_told_as_an_xid(driver: NvmlDriver, on_gpu: OnGpu):
    """Xid 31 is the memory management unit's fault, 13 the engine's, by NVIDIA's list of Xids."""
    uuid = first(driver.look()).uuid
    assert on_gpu.does("poke") == ILLEGAL_ADDRESS, "the fault fired"
    look = soon(driver.look, lambda look: look.xids, "the driver reports it")
    assert {(xid.uuid, xid.number) for xid in look.xids} <= {(uuid, 31), (uuid, 13)}
    assert driver.look().xids == (), "each is told once"


def test_memory_that_really_grows_is_foretold_and_a_full_gpu_is_seen_full(driver: NvmlDriver, on_gpu: OnGpu):
    """The growth is the GPU's; the ten minutes that it takes are the test's own count of them."""
    headroom, said = Headroom(), []
    start = first(driver.look())
    assert start.total_bytes is not None
    piece = start.total_bytes // 100
    for look in range(40):
        assert on_gpu.does("take", piece) == 0
        said.append(headroom.observe(15.0 * look, first(driver.look())))
    assert said[0] is None
    assert said[-1] is not None
    assert said[-1].startswith("GPU 0: memory is ")
    minutes = int(said[-1].split()[-2])
    assert 10 <= minutes <= 20, "60 parts of 100 are left at one each quarter of a minute"
    assert on_gpu.does("fill") == OUT_OF_MEMORY, "the fault fired"
    full = first(driver.look())
    assert full.used_bytes is not None
    assert full.used_bytes > 0.97 * start.total_bytes


class Run:
    """Surroundings of a run of one server, on this machine as it is."""

    def __init__(self, root: Path) -> None:
        config = root / "config.toml"
        config.write_text(
            f'[run]\nname = "r"\nmode = "hold"\nrun_dir = "{root}/run"\nstate_dir = "{root}/state"\n'
            f'[server]\nname = "left"\nbackend = "none"\nurl = "http://127.0.0.1:9"\n'
            f'log = "{root}/left.log"\n'
        )
        self.log = root / "left.log"
        self.log.touch()
        self.config = load_config(config)
        self.told: list[Event] = []
        self.state: State = initial(Settings(), Mode.HOLD, (Server(name="left", managed=False, since=0.0),))

    def owns(self, *pids: int) -> None:
        found = [one for pid in pids if (one := proc.stat(pid)) is not None]
        procs = tuple(Proc(pid=one.pid, start_ticks=one.start_ticks, role="server") for one in found)
        self.state = replace(self.state, servers=(replace(self.state.servers[0], procs=procs),))

    async def until(self, surroundings: Surroundings, seen: Callable[[], object]) -> None:
        watching = asyncio.create_task(surroundings.watch())
        try:
            async with asyncio.timeout(60):
                while not seen():
                    assert not watching.done(), watching
                    await asyncio.sleep(0.02)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def watch(self, *steps: Callable[[Surroundings], object]) -> Surroundings:
        """Watch until each of these came true, one after the other."""

        async def live() -> Surroundings:
            surroundings = Surroundings(self.config, lambda: self.state, self.told.append)
            pending = list(steps)

            def over() -> bool:
                while pending and pending[0](surroundings):
                    pending.pop(0)
                return not pending

            await self.until(surroundings, over)
            return surroundings

        return asyncio.run(live())


def test_a_leftover_of_the_run_that_holds_memory_is_told_and_other_peoples_jobs_are_not(
    tmp_path: Path, on_gpu: OnGpu
) -> None:
    run, other = Run(tmp_path), OnGpu()
    try:
        assert [process.does("take", GIB) for process in (on_gpu, other)] == [0, 0]
        run.owns(on_gpu.pid)

        def lost_from_the_tree(surroundings: Surroundings) -> bool:
            if surroundings.status()["gpus"] is None:
                return False
            run.owns()
            return True

        run.watch(lost_from_the_tree, lambda _: [e for e in run.told if isinstance(e, GpuTroubled)])
        orphans = [e for e in run.told if isinstance(e, GpuTroubled)]
        assert [(e.trouble, e.gpu, e.number) for e in orphans] == [(GpuTrouble.ORPHAN, 0, on_gpu.pid)]
    finally:
        other.dies()


def test_torchs_own_words_for_a_full_gpu_are_understood(tmp_path: Path, driver: NvmlDriver) -> None:
    """A real process runs the real GPU out of memory, and its log is what the run's server says."""
    probe = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", probe], check=False, capture_output=True).returncode != 0:
        require("gpu-torch", "torch sees no GPU")
    run, started = Run(tmp_path), []

    def starts(surroundings: Surroundings) -> bool:
        if surroundings.status()["gpus"] is None:
            return False
        with run.log.open("ab") as log:
            started.append(subprocess.Popen([sys.executable, "-c", OUT_OF_TORCHS], stderr=log))
        return True

    try:
        run.watch(
            starts,
            lambda _: started[0].poll() is not None,
            lambda _: [e for e in run.told if isinstance(e, OomSeen)],
        )
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert started[0].returncode == 1, "the fault fired"
    (oom,) = [e for e in run.told if isinstance(e, OomSeen)]
    assert oom.kind in {OomKind.CUDA_RUN, OomKind.CUDA_UNKNOWN}
    assert (oom.server, oom.gpu, oom.used_bytes) == ("left", 0, 8 * GIB)


def test_a_process_that_is_stopped_keeps_its_memory_and_is_still_the_runs(
    driver: NvmlDriver, on_gpu: OnGpu
) -> None:
    """What makes a stopped scheduler costly: nothing of it is given back."""
    assert on_gpu.does("take", 2 * GIB) == 0
    os.kill(on_gpu.pid, signal.SIGSTOP)
    found = proc.stat(on_gpu.pid)
    assert found is not None
    assert found.state == "T", "the fault fired"
    held = used_by(driver.look().gpus, {on_gpu.pid})
    assert held is not None
    assert held >= 2 * GIB
