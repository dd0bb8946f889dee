"""GPUs: pynvml itself, on a driver library of the tests' own or on the real one, and the pure part."""

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requirements import require
from senses.nvml_library import compiled_library, write_script
from stepguardd.sources.gpu import GpuSense, Headroom, forecast, strangers, used_by
from stepguardd.sources.nvml import Gpu, GpuError, GpuLook, GpuProcess, NoGpuDriverError

HERE = Path(__file__).parent
GIB = 1 << 30


class Looks:
    """The program that looks, and the file that its driver library reads."""

    def __init__(self, program: "subprocess.Popen[str]", script: Path) -> None:
        self._program = program
        self._script = script

    def says(self, **lines: int) -> None:
        """Let the driver say this from now on: `gpu0_used` is `0.used` there, and `_` is written twice."""
        write_script(self._script, **lines)

    def ask(self, word: str, now: float) -> dict[str, object]:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(f"{word} {now}\n")
        self._program.stdin.flush()
        reading = json.loads(self._program.stdout.readline())
        assert isinstance(reading, dict)
        return reading


@contextmanager
def looking(script: Path, **environment: str) -> Iterator[Looks]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FAKE_NVML": str(script), **environment}
    with subprocess.Popen(
        [sys.executable, HERE / "gpu_looks.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    ) as program:
        try:
            yield Looks(program, script)
        finally:
            program.kill()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the fake driver library, compiled here and now."""
    return compiled_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def fake(library: Path, tmp_path: Path) -> Iterator[Looks]:
    script = tmp_path / "says"
    script.write_text("count 1\n")
    with looking(script, LD_LIBRARY_PATH=str(library)) as looks:
        yield looks


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Looks]:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as missing:
        require("gpu", f"no NVIDIA driver: {missing}")
    with looking(tmp_path / "nothing") as looks:
        yield looks


@pytest.mark.parametrize("which", ["fake", "real"])
def test_a_look_has_the_same_shape_whatever_the_driver(which: str, request: pytest.FixtureRequest):
    """The contract that the fake library and a real driver keep alike."""
    looks: Looks = request.getfixturevalue(which)
    if which == "fake":
        looks.says(count=2, gpu1_used=7 * GIB, gpu0_processes=1, gpu0_pid0=42, gpu0_pid0_used=5 * GIB)
    reading = looks.ask("settle", 1.0)
    assert reading["cause"] is None
    assert reading["asked"] == 1.0
    gpus = reading["gpus"]
    assert isinstance(gpus, list)
    assert [gpu["index"] for gpu in gpus] == list(range(len(gpus)))
    for gpu in gpus:
        assert not gpu["lost"]
        assert gpu["uuid"].startswith("GPU-")
        assert 0 <= gpu["used_bytes"] <= gpu["total_bytes"]
        assert gpu["busy_percent"] is None or 0 <= gpu["busy_percent"] <= 100
        assert gpu["temperature_c"] is None or 0 < gpu["temperature_c"] < 130
        assert gpu["power_w"] is None or 0 <= gpu["power_w"] < 5000
        assert gpu["processes"] is None or all(process["pid"] > 0 for process in gpu["processes"])


def test_every_value_comes_through(fake: Looks):
    fake.says(
        count=2,
        gpu0_total=80 * GIB,
        gpu0_used=60 * GIB,
        gpu0_busy=97,
        gpu0_temperature=81,
        gpu0_power=512345,
        gpu0_reasons=0x44 | 0x01,
        gpu0_ecc=3,
        gpu0_processes=2,
        gpu0_pid0=42,
        gpu0_pid0_used=59 * GIB,
        gpu0_pid1=43,
        gpu1_mig=1,
        xid=79,
        xid_gpu=1,
    )
    reading = fake.ask("settle", 1.0)
    assert reading["gpus"][0] == {  # type: ignore[index]
        "index": 0,
        "uuid": "GPU-fake-0",
        "lost": False,
        "mig": False,
        "used_bytes": 60 * GIB,
        "total_bytes": 80 * GIB,
        "busy_percent": 97,
        "temperature_c": 81,
        "power_w": 512.345,
        "throttled_by": ["software power cap", "hardware thermal slowdown"],
        "ecc_uncorrected": 3,
        "processes": [{"pid": 42, "used_bytes": 59 * GIB}, {"pid": 43, "used_bytes": None}],
    }
    assert reading["gpus"][1]["mig"] is True  # type: ignore[index]
    assert reading["xids"] == [{"uuid": "GPU-fake-1", "number": 79}]
    assert fake.ask("settle", 2.0)["xids"] == []


def test_what_a_gpu_does_not_offer_is_unknown_and_the_rest_is_known(fake: Looks):
    """MIG parts and virtual GPUs answer "not supported" (3) to most questions."""
    fake.says(
        count=1,
        gpu0_used=GIB,
        nvmlDeviceGetMigMode_error=3,
        nvmlDeviceGetUtilizationRates_error=3,
        nvmlDeviceGetTemperature_error=3,
        nvmlDeviceGetPowerUsage_error=3,
        nvmlDeviceGetCurrentClocksEventReasons_error=13,
        nvmlDeviceGetTotalEccErrors_error=3,
        nvmlDeviceGetComputeRunningProcesses__v3_error=4,
        nvmlEventSetCreate_error=3,
    )
    [gpu] = fake.ask("settle", 1.0)["gpus"]  # type: ignore[misc]
    assert gpu["used_bytes"] == GIB
    for name in [
        "mig",
        "busy_percent",
        "temperature_c",
        "power_w",
        "throttled_by",
        "ecc_uncorrected",
        "processes",
    ]:
        assert gpu[name] is None
    fake.says(count=1, nvmlDeviceGetMemoryInfo_error=3)
    [gpu] = fake.ask("settle", 2.0)["gpus"]  # type: ignore[misc]
    assert gpu["used_bytes"] is None
    assert not gpu["lost"]


def test_a_gpu_that_fell_off_the_bus_is_lost_and_the_others_are_not(fake: Looks):
    fake.says(count=2, gpu0_nvmlDeviceGetMemoryInfo=15, gpu1_used=GIB)
    first, second = fake.ask("settle", 1.0)["gpus"]  # type: ignore[misc]
    assert first["lost"]
    assert first["used_bytes"] is None
    assert second["used_bytes"] == GIB


def test_a_driver_that_fails_as_a_whole_is_unknown_with_one_line_and_is_tried_again(fake: Looks):
    fake.says(nvmlInitWithFlags_error=9)
    reading = fake.ask("settle", 1.0)
    assert reading["gpus"] is None
    assert reading["cause"] == "GPUs are not watched: Driver Not Loaded"
    fake.says(count=1)
    assert _in_time(fake, 2, lambda reading: reading["cause"] is None)
    fake.says(count=1, nvmlDeviceGetMemoryInfo_error=999)
    assert _in_time(fake, 100, lambda reading: reading["cause"] == "NVML: Unknown Error")
    # It is opened anew; no look that was under way can have opened it for good before.
    fake.says(count=1, nvmlDeviceGetMemoryInfo_error=999, nvmlInitWithFlags_error=9)
    assert _in_time(fake, 200, lambda reading: reading["cause"] == "GPUs are not watched: Driver Not Loaded")
    fake.says(count=3)
    assert _in_time(fake, 300, lambda reading: len(reading["gpus"] or ()) == 3)


def _in_time(fake: Looks, first: int, seen: Callable[[Any], bool]) -> bool:
    """Whether one of the next looks sees it: one that began before the driver changed may come first."""
    return any(seen(fake.ask("settle", float(now))) for now in range(first, first + 90))


def test_a_call_that_blocks_is_cut_off_and_comes_back(fake: Looks):
    """Unknown after the timeout, by the caller's clock; known again when the driver answers."""
    fake.says(count=1, gpu0_used=GIB)
    assert fake.ask("settle", 1.0)["cause"] is None
    fake.says(count=1, nvmlDeviceGetMemoryInfo_block=1)
    fake.ask("poll", 2.0)
    for now in (3.0, 6.0):
        assert fake.ask("poll", now)["cause"] is None, "younger than the timeout: the last look still stands"
    late = fake.ask("poll", 60.0)
    assert late["gpus"] is None
    assert "has not answered for" in str(late["cause"])
    fake.says(count=1, gpu0_used=2 * GIB)
    reading = {}
    for now in range(61, 400):
        reading = fake.ask("settle", float(now))
        if reading["cause"] is None:
            break
    assert reading["gpus"][0]["used_bytes"] == 2 * GIB


def test_a_machine_without_a_driver_is_unknown_in_one_line(tmp_path):
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        with looking(tmp_path / "nothing") as looks:
            reading = looks.ask("settle", 1.0)
        assert reading["gpus"] is None
        assert reading["cause"] == "GPUs are not watched: NVML Shared Library Not Found"
    else:
        pytest.skip("this machine has a driver")


class ScriptedDriver:
    """A driver whose looks wait for the test."""

    def __init__(self) -> None:
        self.allowed = threading.Semaphore(0)
        self.answers: list[Callable[[], GpuLook]] = []
        self.done = threading.Semaphore(0)

    def look(self) -> GpuLook:
        assert self.allowed.acquire(timeout=30)
        try:
            return self.answers.pop(0)()
        finally:
            self.done.release()


def unknown() -> GpuLook:
    raise GpuError("the driver is being replaced")


def test_time_is_the_callers_and_there_is_never_a_second_question(tmp_path):
    driver = ScriptedDriver()
    sense = GpuSense(driver, timeout_s=5.0)
    gpu = Gpu(index=0, used_bytes=1, total_bytes=2)
    driver.answers = [lambda: GpuLook(gpus=(gpu,)), unknown]
    assert sense.poll(0.0).cause == "the GPUs were not asked yet"
    assert sense.poll(5.0).gpus is None
    assert sense.poll(5.1).cause == "the GPU driver has not answered for 5 s"
    assert len(driver.answers) == 2
    readings = []
    for answer in range(2):
        driver.allowed.release()
        assert driver.done.acquire(timeout=30)
        for _ in range(100_000):
            readings.append(sense.poll(10.0 + answer))
            if readings[-1].asked == (0.0, 10.0)[answer] and (readings[-1].gpus is None) == bool(answer):
                break
    assert readings[-1].cause == "the driver is being replaced"
    assert (gpu,) in [reading.gpus for reading in readings]
    driver.allowed.release()
    driver.answers = [unknown]


def test_a_driver_that_is_not_installed_is_looked_for_once_a_minute():
    """Each look for it searches the whole library path."""
    looked = threading.Semaphore(0)

    class NoDriver:
        def look(self) -> GpuLook:
            looked.release()
            raise NoGpuDriverError("GPUs are not watched: no library")

    def settled(sense: GpuSense, now: float, asked: float) -> bool:
        return any(sense.poll(now).asked == asked for _ in range(1_000_000))

    sense = GpuSense(NoDriver())
    sense.poll(0.0)
    assert looked.acquire(timeout=30)
    assert settled(sense, 1.0, asked=0.0)
    for now in (2.5, 30.0, 59.9):
        assert sense.poll(now).cause == "GPUs are not watched: no library"
    assert not looked.acquire(timeout=0.05), "nobody looked again"
    sense.poll(60.0)
    assert looked.acquire(timeout=30)
    assert settled(sense, 61.0, asked=60.0)


def test_a_steady_growth_is_foretold_and_noise_a_pool_and_a_sawtooth_are_not():
    def warned(used: Callable[[int], int]) -> list[str]:
        headroom = Headroom(window_s=600, warn_within_s=1800)
        gpus = (Gpu(index=3, used_bytes=used(t), total_bytes=80 * GIB) for t in range(0, 3000, 10))
        return [said for t, gpu in enumerate(gpus) if (said := headroom.observe(t * 10.0, gpu)) is not None]

    growing = warned(lambda t: 40 * GIB + t * GIB // 100)
    assert growing
    assert growing[0].startswith("GPU 3: memory is ")
    assert growing[0].endswith("minutes")
    minutes = [int(said.split()[-2]) for said in growing]
    assert minutes == sorted(minutes, reverse=True)
    assert warned(lambda t: 70 * GIB + (t * 7919 % 97) * GIB // 100) == []
    assert warned(lambda t: 0 if t < 60 else 70 * GIB) == []
    assert warned(lambda t: 20 * GIB + (t % 120) * GIB // 4) == []
    assert warned(lambda t: 60 * GIB - t * GIB // 1000) == []
    assert Headroom().observe(0, Gpu(index=0)) is None


@given(
    start=st.integers(0, 10 * GIB),
    slope=st.integers(1, GIB),
    steps=st.lists(st.floats(0.1, 100), min_size=3, max_size=50),
    begin=st.floats(0, 1e9),
)
def test_a_straight_line_is_found_exactly(start: int, slope: int, steps: list[float], begin: float):
    times = [begin + sum(steps[:i]) for i in range(len(steps))]
    points = [(t, start + int(slope * (t - begin))) for t in times]
    line = forecast(points, points[-1][1] + 100 * slope)
    assert line is not None
    assert line.bytes_per_s == pytest.approx(slope, rel=1e-2, abs=30)
    if slope > 1000:
        assert line.full_in_s == pytest.approx(100, rel=0.05)
        assert line.fit > 0.99


@given(points=st.lists(st.tuples(st.floats(-1e12, 1e12), st.integers(0, 1 << 50)), max_size=20))
def test_no_points_are_trouble(points: list[tuple[float, int]]):
    line = forecast(points, 80 * GIB)
    assert line is None or line.full_in_s is None or line.full_in_s >= 0


def test_strangers_and_what_the_run_holds():
    gpus = [
        Gpu(index=0, processes=(GpuProcess(pid=1, used_bytes=GIB), GpuProcess(pid=9, used_bytes=5))),
        Gpu(index=1, processes=(GpuProcess(pid=1, used_bytes=GIB),)),
    ]
    assert strangers(gpus, {1}) == ((0, GpuProcess(pid=9, used_bytes=5)),)
    assert used_by(gpus, {1}) == 2 * GIB
    assert used_by([*gpus, Gpu(index=2)], {1}) is None
    assert used_by([Gpu(index=0, processes=(GpuProcess(pid=1, used_bytes=None),))], {1}) is None
