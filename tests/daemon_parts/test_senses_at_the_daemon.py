"""Memory, the kernel's kills and GPUs, from what the machine says to the daemon's status and its warnings."""

from __future__ import annotations

import contextlib
import os
import shlex
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_parts.own_daemons import OwnDaemons
from senses.nvml_library import compiled_library, write_script
from stepguard import Guard
from stepguardd import proc

pytestmark = pytest.mark.e2e

GIB = 1 << 30
PRESSURE = (
    "some avg10={some:.2f} avg60=4.00 avg300=1.00 total=9\n"
    "full avg10={full:.2f} avg60=0.10 avg300=0.00 total=3\n"
)
EVENTS = "low 0\nhigh 7\nmax 9\noom 3\noom_kill {kills}\noom_group_kill 0\n"
# As journalctl of systemd 257 prints an entry of the kernel, with its fields of no interest.
ENTRY = (
    '{"__CURSOR":"s=a;i=1","__REALTIME_TIMESTAMP":"1764115200000000","_BOOT_ID":"0123456789abcdef",'
    '"_TRANSPORT":"kernel","PRIORITY":"3","SYSLOG_FACILITY":"0","SYSLOG_IDENTIFIER":"kernel",'
    '"_SOURCE_MONOTONIC_TIMESTAMP":"4132400095","MESSAGE":"Out of memory: Killed process %d (python3) '
    "total-vm:9000kB, anon-rss:1048576kB, file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:20kB "
    'oom_score_adj:0"}'
)


class SensedRun(OwnDaemons):
    """A run on a machine that is a folder: its kernel's log is the journal's, its GPUs are scripted."""

    def __init__(self, root: Path, library: Path | None) -> None:
        self.machine, self.library, self.gpus = root / "machine", library, root / "gpus"
        self.pressure = self.machine / "proc" / "pressure" / "memory"
        self.events = self.machine / "cgroup" / "job" / "memory.events"
        self.journal = root / "journal"
        self.program = root / "bin" / "journalctl"
        for file in (self.pressure, self.events, self.program):
            file.parent.mkdir(parents=True)
        (self.machine / "journald").touch()
        self.says(some=1.0, full=0.0)
        self.events.write_text(EVENTS.format(kills=2))
        mount = f"35 1 0:32 / {self.machine}/cgroup rw - cgroup2 cgroup2 rw\n"
        for name, text in ((f"{os.getpid()}/cgroup", "0::/job\n"), ("self/mountinfo", mount)):
            file = self.machine / "proc" / name
            file.parent.mkdir()
            file.write_text(text)
        self.journal.touch()
        self.program.write_text(
            "#!/bin/sh\n"
            'test "$*" = "--dmesg --output=json --follow --lines=0 --no-pager --quiet" || exit 9\n'
            f"exec tail -n +1 -F {shlex.quote(str(self.journal))} 2>/dev/null\n"
        )
        self.program.chmod(0o755)
        super().__init__(
            root,
            {
                "run": {"mode": "hold"},
                "web": {"enabled": False},
            },
        )

    def started(self) -> tuple[proc.Proc, ...]:
        return ()

    def command(self) -> list[str]:
        program = Path(__file__).with_name("daemon_on_files.py")
        return [sys.executable, str(program), str(self.config), str(self.machine)]

    def environment(self) -> dict[str, str]:
        found = super().environment()
        found["PATH"] = f"{self.program.parent}{os.pathsep}{found['PATH']}"
        if self.library is not None:
            found |= {"LD_LIBRARY_PATH": str(self.library), "FAKE_NVML": str(self.gpus)}
        return found

    def says(self, *, some: float, full: float) -> None:
        """Let processes wait for memory this much, in percent of the last 10 s."""
        beside = self.pressure.with_suffix(".new")
        beside.write_text(PRESSURE.format(some=some, full=full))
        beside.replace(self.pressure)

    def warned(self, reason: str) -> list[str]:
        """What people are told of this reason, as the alerts get it."""
        with contextlib.closing(sqlite3.connect(f"file:{self.state_dir}/journal.db?mode=ro", uri=True)) as db:
            rows = db.execute("SELECT text FROM notices WHERE reason = ? ORDER BY id", (reason,)).fetchall()
        return [text for (text,) in rows]

    def unseen(self) -> dict[str, Any]:
        return dict(self.status().get("unseen", {}))


@contextlib.contextmanager
def sensed_run(root: Path, library: Path | None = None) -> Iterator[SensedRun]:
    run = SensedRun(root, library)
    try:
        yield run
    finally:
        run.close()


def test_memory_that_is_short_and_kills_are_told_where_kmsg_cannot_be_read(tmp_path: Path) -> None:
    """PSI, the journal in place of /dev/kmsg, and the trainer's version 2 cgroup, at a living daemon."""
    with sensed_run(tmp_path) as run:
        run.daemon()
        run.until(run.status, "the daemon answers")
        guard = Guard(run.run_dir, heartbeat_s=0.2)
        try:
            run.until(lambda: run.status()["trainer"]["pid"] == os.getpid(), "the trainer is known")
            run.until(lambda: run.status()["host"]["oom_kills"] == 0, "kills are counted from here on")
            assert not {"kernel log", "memory pressure"} & run.unseen().keys(), run.unseen()
            assert run.warned("memory_pressure") == []

            run.says(some=37.5, full=6.25)
            run.until(lambda: run.warned("memory_pressure"), "memory is short")
            assert run.warned("memory_pressure") == [
                "memory is short: some processes waited for it 38 % of the last 10 s, all of them 6 %"
            ]
            with run.journal.open("a") as journal:
                journal.write("no entry\n" + ENTRY % os.getpid() + "\n")
            run.until(lambda: run.warned("host_oom"), "the journal tells of a kill")
            assert "the machine ran out of memory, and the kernel killed python3" in run.warned("host_oom")[0]
            assert f"(pid {os.getpid()}), 1.0 GiB" in run.warned("host_oom")[0]

            run.events.write_text(EVENTS.format(kills=5))
            run.until(lambda: len(run.warned("host_oom")) == 2, "the cgroup's counter tells of kills")
            assert "killed a process of the trainer, cgroup /job" in run.warned("host_oom")[1]
            run.says(some=0.0, full=0.0)
            run.pressure.unlink()
            run.until(lambda: "memory pressure" in run.unseen(), "what is not there is unknown")
            assert run.order() == "GO"
        finally:
            guard.close()


@pytest.fixture
def nvml_library(tmp_path: Path) -> Path:
    folder = tmp_path / "nvml"
    folder.mkdir()
    return compiled_library(folder)


def test_gpus_are_in_the_status_and_their_troubles_are_told(nvml_library: Path, tmp_path: Path) -> None:
    """Through the real pynvml: memory, MIG, an Xid, ECC errors, a lost GPU, and a driver that fails."""
    with sensed_run(tmp_path, nvml_library) as run:
        write_script(run.gpus, count=2, gpu0_used=60 * GIB, gpu1_used=GIB, gpu1_mig=1, gpu0_ecc=1)
        run.daemon()
        run.until(lambda: run.status().get("gpus"), "the GPUs are seen")
        first, second = run.status()["gpus"]
        assert (first["used_bytes"], first["total_bytes"], first["mig"]) == (60 * GIB, 80 * GIB, False)
        assert (second["used_bytes"], second["mig"], second["lost"]) == (GIB, True, False)
        assert "GPUs" not in run.unseen()
        assert run.warned("gpu_fault") == []

        write_script(run.gpus, count=2, gpu0_ecc=3, gpu1_nvmlDeviceGetMemoryInfo=15, xid=79, xid_gpu=1)
        run.until(lambda: len(run.warned("gpu_fault")) >= 3, "three troubles are told")
        assert set(run.warned("gpu_fault")) == {
            "GPU 1 reported Xid 79",
            "GPU 0: 2 new uncorrected memory errors (ECC)",
            "GPU 1 is lost: it has fallen off the bus",
        }
        assert run.status()["gpus"][1]["lost"]
        write_script(run.gpus, count=2, nvmlDeviceGetMemoryInfo_error=999)
        run.until(lambda: "GPUs" in run.unseen(), "a driver that fails is unknown")
        assert run.unseen()["GPUs"] == "NVML: Unknown Error"
        assert run.status()["gpus"] is None
        assert run.order() == "GO"
