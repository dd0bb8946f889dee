"""Memory, the kernel's kills and GPUs, from what the machine says to the daemon's status and its warnings."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_parts.own_daemons import OwnDaemons
from senses.nvml_library import compiled_library, write_script
from stepguard import Guard
from stepguardd import proc
from stepguardd.surroundings.host import INTERVAL_S

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
        self.metrics, self.trainer_log = root / "metrics.csv", root / "trainer.log"
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
                "trainer": {"log": str(self.trainer_log)},
                "stream": {"path": str(self.metrics)},
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

    def lines(self) -> dict[str, str]:
        """What `stepguard status` prints, by the first word of each line."""
        command = [sys.executable, "-m", "stepguardd", "status", "--run-dir", str(self.run_dir)]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert printed.stdout, printed.stderr
        return {
            line.split()[0]: " ".join(line.split()[1:])
            for line in printed.stdout.splitlines()
            if line.strip()
        }

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
            kernel = run.status()["oom"]["kernel"]
            assert kernel["count"] == 1, "by the kernel's log where there is one: each kill once"
            assert (kernel["newest"]["role"], kernel["newest"]["cgroup"]) == ("trainer", "/job")
            assert run.status()["host"]["pressure"] == {"some_10s": 37.5, "full_10s": 6.25, "short": True}
            run.says(some=0.0, full=0.0)
            run.pressure.unlink()
            run.until(lambda: "memory pressure" in run.unseen(), "what is not there is unknown")
            assert run.order() == "GO"
        finally:
            guard.close()


def test_logs_out_of_memory_and_the_stream_have_their_lines_in_the_status(tmp_path: Path) -> None:
    """As the command prints it: four sources of memory that ran out, the logs, the pressure, the stream."""
    with sensed_run(tmp_path) as run:
        run.trainer_log.touch()
        run.daemon()
        run.until(lambda: run.status().get("logs", [{}])[0].get("trouble", "") is None, "the log is read")
        assert run.lines()["Stream"] == "metrics.csv: No such file or directory"
        assert run.lines()["OOM"] == "kernel 0, Ray 0, CUDA 0, KV pool 0"
        with run.trainer_log.open("a") as log:
            log.write("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a\n")
        run.metrics.write_text("step,reward\n1,0.25\n2,0.5\n")
        run.until(lambda: (run.status().get("stream") or {}).get("step") == 2, "the stream is read")
        run.until(lambda: run.status()["oom"]["cuda"]["count"] == 1, "memory that ran out is counted")
        newest = run.status()["oom"]["cuda"]["newest"]
        assert (newest["role"], newest["used_bytes"], newest["gpu"]) == ("trainer", 2 * GIB, 1)
        lines = run.lines()
        assert lines["Stream"].startswith("reward, step 2: 0.5, ")
        assert lines["OOM"].startswith("kernel 0, Ray 0, CUDA 1, KV pool 0; CUDA ")
        assert lines["OOM"].endswith(" ago: trainer")
        assert lines["Logs"].startswith("1 of 1 followed; ")
        assert lines["Logs"].endswith(" ago trainer: cuda oom")
        assert lines["Host"].endswith("waited for 1 % of the last 10 s")


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


# A trainer of its own: the guard, a step, and its end when stdin closes.
OTHER_TRAINER = """
import sys
from pathlib import Path
from stepguard import Guard
guard = Guard(Path(sys.argv[1]), heartbeat_s=0.2)
sys.stdin.read()
guard.close()
"""


def test_a_gpu_that_fills_up_and_a_leftover_that_holds_its_memory_are_told(
    nvml_library: Path, tmp_path: Path
) -> None:
    """Through the real pynvml: memory that grows look by look; an earlier trainer that lives on."""
    with sensed_run(tmp_path, nvml_library) as run:
        write_script(run.gpus, count=2, gpu0_used=40 * GIB, gpu1_used=GIB)
        run.daemon()
        run.until(lambda: run.status().get("gpus"), "the GPUs are seen")
        used = 40 * GIB

        def filling() -> list[str]:
            nonlocal used
            used += GIB // 8
            write_script(run.gpus, count=2, gpu0_used=used, gpu1_used=GIB)
            return run.warned("gpu_filling")

        run.until(filling, "the growth is told")
        (told,) = run.warned("gpu_filling")
        assert re.fullmatch(r"GPU 0: memory is \d\d % full and will be full in \d+ minutes", told), told

        first = Guard(run.run_dir, heartbeat_s=0.2)
        run.until(lambda: run.status()["trainer"]["pid"] == os.getpid(), "the first trainer is known")
        known_at = run.status()["uptime_s"]
        run.until(lambda: run.status()["uptime_s"] > known_at + 10 * INTERVAL_S, "what it owns was looked at")
        first.close()
        mine = {"gpu1_processes": 2, "gpu1_pid0": os.getpid(), "gpu1_pid0_used": GIB, "gpu1_pid1": 1}
        write_script(run.gpus, count=2, gpu0_used=used, gpu1_used=GIB, **mine)
        with subprocess.Popen(
            [sys.executable, "-c", OTHER_TRAINER, str(run.run_dir)], stdin=subprocess.PIPE
        ) as other:
            run.until(lambda: run.status()["trainer"]["pid"] == other.pid, "another trainer is there")
            run.until(lambda: run.warned("gpu_orphan"), "the leftover is told")
            other.communicate()
        whose = f"GPU 1: pid {os.getpid()}, a leftover of this run, still holds memory"
        assert run.warned("gpu_orphan") == [whose], "and pid 1, which is nobody of ours, is not"
        assert run.order() == "GO"
