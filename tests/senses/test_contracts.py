"""What a source's stand-in promises as the real part does: one test for both."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from requirements import require
from senses.event_writer import scalar_event, write_events
from senses.memory_cgroups import limited_memory_cgroup
from stepguard.cgroups import MemoryCgroup
from stepguardd.sources.cgroups import KillCounter, memory_pressure, pressure_warning
from stepguardd.sources.kmsg import Journal, KernelLog, KernelLogError, Kmsg
from stepguardd.sources.reward.tensorboard import EventFiles

pytestmark = pytest.mark.e2e


EATER = "import sys; sys.stdin.read(1); eaten = []\nwhile True: eaten.append(bytearray(1 << 20))"


def killed_in(cgroup: MemoryCgroup) -> int:
    """Have the kernel kill a process for this cgroup's limit; its pid."""
    with subprocess.Popen([sys.executable, "-c", EATER], stdin=subprocess.PIPE) as eater:
        (cgroup.folder / "cgroup.procs").write_text(str(eater.pid))
        eater.communicate(b"x", timeout=60)
        assert eater.returncode == -9
        return eater.pid


# ---- the kernel's log ------------------------------------------------------------------------------


class Talker(Protocol):
    """A machine whose kernel can be made to say something."""

    log: KernelLog

    def kernel(self) -> str:
        """Have the kernel say something; a part of it."""
        ...

    def process(self) -> str:
        """Have a process write something into the log; a part of it."""
        ...


class ByKmsg:
    """This machine's own kernel, which tells of each process that it kills for its cgroup's memory."""

    def __init__(self) -> None:
        try:
            self.log: KernelLog = Kmsg()
        except KernelLogError as closed:
            require("oom", str(closed))

    def kernel(self) -> str:
        with limited_memory_cgroup(32 << 20) as cgroup:
            return f"Killed process {killed_in(cgroup)} "

    def process(self) -> str:
        Path("/dev/kmsg").write_text("<12>stepguard: a test writes into the log\n")
        return "a test writes"


class ByJournal:
    """A stand-in for journalctl, which leaves out what is not the kernel's, as `--dmesg` does."""

    def __init__(self, folder: Path) -> None:
        self._entries, program = folder / "entries", folder / "journalctl"
        self._entries.touch()
        program.write_text(f'#!/bin/sh\nexec tail -n +1 -f "{self._entries}"\n')
        program.chmod(0o755)
        self.log: KernelLog = Journal(str(program))
        self._said = 0

    def kernel(self) -> str:
        self._said += 1
        words = f"Out of memory: Killed process {self._said} (python3) total-vm:9kB"
        entry = {"MESSAGE": words, "_SOURCE_MONOTONIC_TIMESTAMP": f"{self._said}000000"}
        with self._entries.open("a") as entries:
            entries.write(json.dumps(entry) + "\n")
        return f"Killed process {self._said} "

    def process(self) -> str:
        return "a test writes"


@pytest.fixture(params=["kmsg", "journal"])
def talker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Talker]:
    one: Talker = ByKmsg() if request.param == "kmsg" else ByJournal(tmp_path)
    yield one
    one.log.close()


def heard(log: KernelLog, words: str) -> list[float | None]:
    """When it said that, as often as it did; waits for the first."""
    for _ in range(300):
        select.select([log.fileno()], [], [], 0.1)
        times = [said.time_s for said in log.poll() if words in said.text]
        if times:
            return times
    raise AssertionError(f"the kernel never said {words!r}")


def test_what_the_kernel_says_is_told_once_with_its_time_and_nobody_can_feign_it(talker: Talker) -> None:
    feigned = talker.process()
    first = heard(talker.log, talker.kernel())
    assert len(first) == 1
    again = heard(talker.log, talker.kernel())
    assert len(again) == 1
    assert first[0] is not None
    assert again[0] is not None
    assert again[0] >= first[0], "time goes on"
    left = talker.log.poll()
    assert all(feigned not in said.text and "\n" not in said.text for said in left)
    assert talker.log.lost == 0


# ---- kills that a cgroup counts --------------------------------------------------------------------

Kill = Callable[[], object]


@contextmanager
def cgroup_of_files(folder: Path, version: int) -> Iterator[tuple[MemoryCgroup, Kill]]:
    name, text = {
        1: ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"),
        2: ("memory.events", "low 0\nhigh 7\nmax 9\noom 3\noom_kill {}\noom_group_kill 0\n"),
    }[version]
    kills = 2
    (folder / name).write_text(text.format(kills))

    def kill() -> None:
        nonlocal kills
        kills += 1
        (folder / name).write_text(text.format(kills))

    yield MemoryCgroup(name="/job", folder=folder, version=version), kill
    (folder / name).unlink()


@contextmanager
def real_cgroup() -> Iterator[tuple[MemoryCgroup, Kill]]:
    with limited_memory_cgroup(32 << 20) as cgroup:
        yield cgroup, lambda: killed_in(cgroup)


@pytest.mark.parametrize("which", ["files of version 1", "files of version 2", "the kernel's own"])
def test_a_cgroups_kills_are_counted_from_now_on_once_and_not_when_it_is_gone(
    which: str, tmp_path: Path
) -> None:
    made = real_cgroup() if which == "the kernel's own" else cgroup_of_files(tmp_path, int(which[-1]))
    with made as (cgroup, kill):
        kill()
        counter = KillCounter(cgroup)
        assert counter.new_kills() == 0, "what was before is history"
        kill()
        assert [counter.new_kills(), counter.new_kills()] == [1, 0]
        kill()
        kill()
        assert counter.new_kills() == 2
    assert counter.new_kills() == 0


# ---- memory pressure -------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["files", "the kernel's own"])
def test_pressure_is_a_share_of_time_and_all_wait_no_longer_than_some(which: str, tmp_path: Path) -> None:
    proc = tmp_path if which == "files" else Path("/proc")
    if which == "files":
        (tmp_path / "pressure").mkdir()
        (tmp_path / "pressure" / "memory").write_text(
            "some avg10=31.50 avg60=4.00 avg300=1.00 total=9\n"
            "full avg10=0.25 avg60=0.10 avg300=0.00 total=3\n"
        )
    elif not (proc / "pressure" / "memory").exists():
        require("psi", "this kernel keeps no /proc/pressure/memory")
    found = memory_pressure(proc=proc)
    assert found is not None
    assert 0.0 <= found.full_10s <= found.some_10s <= 100.0
    assert 0.0 <= found.full_60s <= found.some_60s <= 100.0
    short = found.some_10s > 20.0 or found.full_10s > 5.0
    assert (pressure_warning(found) is not None) == short


# ---- TensorBoard -----------------------------------------------------------------------------------


def events_of_our_own(folder: Path, values: list[float]) -> None:
    events = [
        scalar_event(step, "train/reward", value, time=time.time()) for step, value in enumerate(values)
    ]
    write_events(folder / "events.out.tfevents.1500000000.host", events)


def events_of_tensorboard(folder: Path, values: list[float]) -> None:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as missing:
        require("tensorboard", str(missing))
    with SummaryWriter(str(folder)) as writer:
        for step, value in enumerate(values):
            writer.add_scalar("train/reward", value, step)


@pytest.mark.parametrize("write", [events_of_our_own, events_of_tensorboard])
def test_scalars_are_read_alike_whoever_wrote_them(
    write: Callable[[Path, list[float]], None], tmp_path: Path
) -> None:
    """Every value once, in order, with its step and the time of its writing; NaN is a value."""
    before = time.time()
    write(tmp_path, [0.25, float("nan"), -1.0, float("inf")])
    reader = EventFiles(tmp_path)
    rows = []
    while True:
        rows += reader.poll()
        if reader.caught_up:
            break
    assert [row.step for row in rows] == [0, 1, 2, 3]
    assert [repr(row.value) for row in rows] == ["0.25", "nan", "-1.0", "inf"]
    assert {row.metric for row in rows} == {"train/reward"}
    assert all(row.time is not None and before - 1 <= row.time <= time.time() + 1 for row in rows)
    assert reader.notes() == ()
