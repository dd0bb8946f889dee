"""Logs, kills for memory and GPUs reach the daemon's decisions; and a source that fails stays unknown."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from daemon_parts.little_run import little_run
from daemon_parts.small_run import small_run
from requirements import require
from senses.memory_cgroups import limited_memory_cgroup
from stepguard.cgroups import memory_cgroup
from stepguard.reports import Memory
from stepguardd import proc
from stepguardd.config import Config, load_config
from stepguardd.core.events import (
    Event,
    GpuTrouble,
    GpuTroubled,
    LogRead,
    LogSeen,
    OomKind,
    OomSeen,
    Proc,
    Role,
)
from stepguardd.core.signs import Sign
from stepguardd.core.state import Mode, Server, Settings, State, initial
from stepguardd.sources.cgroups import names_are_the_kernels
from stepguardd.sources.gpu import GpuSense
from stepguardd.sources.kmsg import KernelLog, KernelLogError, KernelMessage, open_kernel_log
from stepguardd.sources.nvml import Gpu, GpuError, GpuLook, GpuProcess, Xid
from stepguardd.surroundings import Surroundings
from stepguardd.surroundings.followed import ABSENT_MAX_S, FollowedLog
from stepguardd.surroundings.gpus import GpuTroubles
from stepguardd.surroundings.owners import Owners

pytestmark = pytest.mark.e2e

GIB = 1 << 30
CRASH = "Subprocess scheduler_0 (pid=4242) crashed with exit code -9. Triggering SIGQUIT for cleanup...\n"
CUDA_OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total\n"
KILLED = (
    "Memory cgroup out of memory: Killed process {pid} (python3) total-vm:4194304kB, "
    "anon-rss:1048576kB, file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:60kB oom_score_adj:0"
)


class Kernel:
    """A kernel's log that says what the test wants."""

    lost = 0

    def __init__(self) -> None:
        self.says: list[str] = []
        self.over = False
        self.closed = 0

    def poll(self) -> tuple[KernelMessage, ...]:
        if self.over:
            raise KernelLogError("the kernel's log is over")
        said, self.says = self.says, []
        return tuple(KernelMessage(text=text, time_s=1.0) for text in said)

    def fileno(self) -> int:
        raise AssertionError("nobody waits for it")

    def close(self) -> None:
        self.closed += 1


@dataclass
class Driver:
    """A driver whose next look is the test's."""

    looks: GpuLook | GpuError

    def look(self) -> GpuLook:
        if isinstance(self.looks, GpuError):
            raise self.looks
        return self.looks


class Run:
    """A run's surroundings, without a daemon: its state is the test's, and what is told is kept."""

    def __init__(self, root: Path) -> None:
        path = root / "config.toml"
        path.write_text(
            f'[run]\nrun_dir = "{root}/run"\nstate_dir = "{root}/state"\n'
            f'[server]\nname = "left"\nbackend = "none"\nurl = "http://127.0.0.1:9"\n'
            f'log = "{root}/left.log"\n'
            f'[trainer]\nlog = "{root}/trainer.log"\n'
        )
        self.config: Config = load_config(path)
        self.log, self.trainer_log = root / "left.log", root / "trainer.log"
        self.told: list[Event] = []
        self.kernel = Kernel()
        self.driver = Driver(GpuError("GPUs are not watched: no driver"))
        self.state: State = initial(Settings(), Mode.HOLD, (Server(name="left", managed=False, since=0.0),))

    def tell(self, event: Event) -> None:
        """Keep it; where a log stands is nothing that was seen."""
        if not isinstance(event, LogRead):
            self.told.append(event)

    def own(self, *pids: int) -> None:
        found = [one for pid in pids if (one := proc.stat(pid)) is not None]
        procs = tuple(Proc(pid=one.pid, start_ticks=one.start_ticks, role="server") for one in found)
        self.state = replace(self.state, servers=(replace(self.state.servers[0], procs=procs),))

    def watch(
        self,
        act: Callable[[Surroundings], None],
        until: Callable[[Surroundings], object],
        kernel_log: Callable[[], KernelLog] | None = None,
    ) -> Surroundings:
        """Watch; when everything was looked at once, act; go on until it holds."""

        async def live() -> Surroundings:
            seen = Surroundings(
                self.config,
                lambda: self.state,
                self.tell,
                gpus=GpuSense(self.driver),
                kernel_log=kernel_log or (lambda: self.kernel),
            )
            watching = asyncio.create_task(seen.watch())
            async with asyncio.timeout(30):
                await asyncio.sleep(0.7)
                act(seen)
                while not until(seen):
                    assert not watching.done(), watching
                    await asyncio.sleep(0.02)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            return seen

        return asyncio.run(live())


def test_a_log_that_is_not_there_is_looked_for_ever_more_rarely_and_then_read_from_its_start(
    tmp_path: Path,
) -> None:
    followed = FollowedLog("left", tmp_path / "left.log")
    looks: list[float] = []
    for now in (half_second / 2 for half_second in range(120)):
        if now >= followed.due:
            looks.append(now)
            assert followed.poll(None, now).matches == ()
    assert looks == [0.0, 0.5, 1.5, 3.5, *(7.5 + n * ABSENT_MAX_S for n in range(14))]
    (tmp_path / "left.log").write_text(CRASH)
    (match,) = followed.poll(None, 60.0).matches
    assert match.sign is Sign.SCHEDULER_CRASHED
    assert followed.due == 60.0
    followed.close()


def test_lines_of_both_logs_are_told_with_whose_they_are(tmp_path: Path) -> None:
    """What stood there before is history; memory that ran out is an event of its own."""
    run = Run(tmp_path)
    run.log.write_text(CRASH)

    def more(_: Surroundings) -> None:
        with run.log.open("a") as log:
            log.write(CUDA_OOM)
        run.trainer_log.write_text(CUDA_OOM)

    run.watch(more, lambda _: len(run.told) >= 4)
    lines = [event for event in run.told if isinstance(event, LogSeen)]
    assert [(line.sign, line.server) for line in lines] == [(Sign.CUDA_OOM, "left"), (Sign.CUDA_OOM, None)]
    ooms = [event for event in run.told if isinstance(event, OomSeen)]
    assert [(oom.kind, oom.role, oom.server, oom.gpu) for oom in ooms] == [
        (OomKind.CUDA_UNKNOWN, Role.SERVER, "left", 3),
        (OomKind.CUDA_UNKNOWN, Role.TRAINER, None, 3),
    ]
    assert ooms[0].used_bytes == 2 * GIB


def test_a_dead_servers_last_words_are_known_when_a_look_is_over(tmp_path: Path) -> None:
    """Before it is started again somebody asks why it died; a look that was given up loses nothing."""
    run = Run(tmp_path)
    run.log.write_text("")

    async def live() -> None:
        seen = Surroundings(
            run.config,
            lambda: run.state,
            run.tell,
            gpus=GpuSense(run.driver),
            kernel_log=lambda: run.kernel,
        )
        await seen.look()
        for words, patient in ((CUDA_OOM, True), (CRASH, False)):
            run.told.clear()
            with run.log.open("a") as log:
                log.write(words)
            look = asyncio.create_task(seen.look())
            if not patient:
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                look.cancel()
                await asyncio.gather(look, return_exceptions=True)
                assert not run.told
                look = asyncio.create_task(seen.look())
            await look
            assert any(isinstance(event, LogSeen) for event in run.told)

    asyncio.run(live())


def test_the_kernels_kill_names_the_server_whose_process_is_gone(tmp_path: Path) -> None:
    """The tree is empty by the time that the kernel's line is read."""
    run = Run(tmp_path)
    run.own(os.getpid())

    def kill(_: Surroundings) -> None:
        run.own()
        run.kernel.says = [KILLED.format(pid=os.getpid()), KILLED.format(pid=999_999)]

    seen = run.watch(kill, lambda _: len(run.told) >= 2)
    ooms = [event for event in run.told if isinstance(event, OomSeen)]
    assert [(oom.kind, oom.role, oom.server) for oom in ooms] == [
        (OomKind.KERNEL_CGROUP, Role.SERVER, "left"),
        (OomKind.KERNEL_CGROUP, Role.UNKNOWN, None),
    ]
    host = seen.status()["host"]
    assert isinstance(host, dict)
    assert host["oom_kills"] == 2
    assert host["available_bytes"] < host["total_bytes"]
    assert run.kernel.closed == 1


def test_a_source_that_fails_is_unknown_and_the_others_go_on(tmp_path: Path) -> None:
    """A log that is a folder, a kernel's log that ends, a driver that is not there."""
    run = Run(tmp_path)
    run.log.mkdir()

    def fail(_: Surroundings) -> None:
        run.kernel.over = True
        run.trainer_log.write_text(CUDA_OOM)

    seen = run.watch(fail, lambda seen: run.told and {"kernel log", "GPUs"} <= seen.unseen.keys())
    assert str(run.log) in seen.unseen["log of left"]
    assert seen.unseen["kernel log"] == "the kernel's log is over"
    assert seen.unseen["GPUs"] == "GPUs are not watched: no driver"
    assert all("\n" not in cause for cause in seen.unseen.values())
    assert seen.status()["gpus"] is None
    assert [type(event) for event in run.told] == [OomSeen, LogSeen]


def test_a_kernel_log_that_may_not_be_read_is_no_count_of_zero(tmp_path: Path) -> None:
    """Unknown is not 0."""

    def refused() -> Kernel:
        raise KernelLogError("/dev/kmsg: Operation not permitted")

    run = Run(tmp_path)
    seen = run.watch(lambda _: None, lambda seen: "kernel log" in seen.unseen, refused)
    host = seen.status()["host"]
    assert isinstance(host, dict)
    assert host["oom_kills"] is None


def test_gpus_are_in_the_status_and_their_xids_are_told(tmp_path: Path) -> None:
    """The reading is whole; the fault names its GPU."""
    run = Run(tmp_path)
    gpu = Gpu(index=0, uuid="GPU-a", used_bytes=60 * GIB, total_bytes=80 * GIB)
    run.driver.looks = GpuLook(gpus=(gpu,), xids=(Xid(uuid="GPU-a", number=79),))
    seen = run.watch(lambda _: None, lambda _: run.told)
    assert run.told[0] == GpuTroubled(trouble=GpuTrouble.XID, gpu=0, number=79, text="GPU 0 reported Xid 79")
    gpus = seen.status()["gpus"]
    assert isinstance(gpus, list)
    assert (gpus[0]["used_bytes"], gpus[0]["total_bytes"], gpus[0]["lost"]) == (60 * GIB, 80 * GIB, False)
    assert gpus[0]["temperature_c"] is None


def test_a_gpus_trouble_is_told_when_it_begins_and_not_again() -> None:
    """Lost, and new ECC errors above what was there at the first look."""
    troubles = GpuTroubles(Owners())
    told = []
    for now, (lost, ecc) in enumerate([(False, 5), (False, 5), (False, 7), (True, 7), (True, 7), (False, 7)]):
        gpus = (Gpu(index=0, ecc_uncorrected=ecc), Gpu(index=1, lost=lost))
        told += [(now, one.trouble, one.gpu, one.number) for one in troubles.look(float(now), gpus, ())]
    assert told == [(2, GpuTrouble.ECC, 0, 2), (3, GpuTrouble.LOST, 1, None)]


def test_a_gpu_that_fills_up_is_told_of_once() -> None:
    """Steady growth for ten minutes, looked at each 2.5 s."""
    troubles = GpuTroubles(Owners())
    told = []
    for look in range(240):
        gpus = (Gpu(index=0, used_bytes=40 * GIB + look * GIB // 12, total_bytes=80 * GIB),)
        told += troubles.look(2.5 * look, gpus, ())
    assert [one.trouble for one in told] == [GpuTrouble.FILLING]
    assert "will be full in" in told[0].text


def test_only_a_leftover_of_the_run_is_an_orphan() -> None:
    """Our own process left the tree and lives; another's memory is none of our business."""
    owners, state = Owners(), initial(Settings(), Mode.HOLD, (Server(name="s", managed=True, since=0.0),))
    found = proc.stat(os.getpid())
    assert found is not None
    mine = Proc(pid=found.pid, start_ticks=found.start_ticks, role="scheduler")
    owners.look(replace(state, servers=(replace(state.servers[0], procs=(mine,)),)), 0.0)
    troubles, told = GpuTroubles(owners), []
    for now in (1.0, 5.0, 20.0, 25.0):
        owners.look(state, now)
        holders = (GpuProcess(pid=mine.pid, used_bytes=GIB), GpuProcess(pid=1, used_bytes=GIB))
        told += [(now, one.number) for one in troubles.look(now, (Gpu(index=0, processes=holders),), ())]
    assert told == [(20.0, mine.pid)]


def test_a_live_daemon_tells_of_a_crash_and_of_memory_in_a_servers_log(
    tmp_path: Path, base_model: Path
) -> None:
    """The process lives on: it is suspected and looked at, and serves again without a restart."""
    with small_run(tmp_path, base_model, push=True) as run:
        run.daemon()
        run.until(run.serving, "the first start")
        log = run.state_dir / "servers" / "server.log"
        with log.open("a") as end:
            end.write(CUDA_OOM)
        run.until(lambda: "CUDA ran out of memory" in run.log.read_text(), "memory is told of")
        with log.open("a") as end:
            end.write(CRASH)
        run.until(lambda: "server_exception" in run.log.read_text(), "the crash line is told of")
        run.until(run.serving, "it serves again")
        assert len(run.starts()) == 1
        host = run.status()["host"]
        assert host["total_bytes"] > host["available_bytes"] > 0
        run.until(lambda: "GPUs" in run.status()["unseen"] or run.status()["gpus"], "the GPUs were asked")


def guard_says(identity: int, total: int, new: int) -> Memory:
    report: Memory = {
        "v": 1,
        "kind": "memory",
        "attempt": 0,
        "cgroup": "/",
        "identity": identity,
        "total": total,
        "new": new,
    }
    return report


def test_kills_that_only_the_guard_can_count_are_told_and_counted(tmp_path: Path) -> None:
    """As in a sidecar: the trainer's cgroup cannot be looked at from here, and is called "/" as all are."""
    run = Run(tmp_path)

    def say(seen: Surroundings) -> None:
        seen.guard_counts(guard_says(identity=7, total=2, new=0))  # from before it began
        seen.guard_counts(guard_says(identity=7, total=3, new=1))
        # Another guard, of the trainer's next life: what it counts first tells of the end of the one before.
        seen.guard_counts(guard_says(identity=7, total=5, new=0))
        seen.guard_counts(guard_says(identity=8, total=9, new=0))  # another container

    seen = run.watch(say, lambda _: len(run.told) >= 2)
    ooms = [event for event in run.told if isinstance(event, OomSeen)]
    assert [(oom.kind, oom.role, oom.cgroup, oom.count) for oom in ooms] == [
        (OomKind.CGROUP_COUNTER, Role.TRAINER, "/", 1),
        (OomKind.CGROUP_COUNTER, Role.TRAINER, "/", 2),
    ]
    host = seen.status()["host"]
    assert isinstance(host, dict)
    assert host["oom_kills"] == 3


def test_a_cgroup_that_is_counted_here_is_not_counted_by_the_guard_as_well(tmp_path: Path) -> None:
    """The same folder, whatever it is called on the other side."""
    run = Run(tmp_path)
    run.own(os.getpid())
    own = memory_cgroup(os.getpid())
    if own is None:
        require("oom", "this process is in no memory cgroup that can be seen")
    identity = own.folder.stat().st_ino

    def say(seen: Surroundings) -> None:
        seen.guard_counts(guard_says(identity=identity, total=1, new=1))
        seen.guard_counts(guard_says(identity=identity + 1, total=1, new=1))

    run.watch(say, lambda _: run.told)
    assert [event.count for event in run.told if isinstance(event, OomSeen)] == [1]


def test_a_real_kernel_kill_names_the_server_by_the_log_and_by_the_cgroup(tmp_path: Path) -> None:
    """A process of the tree eats more than its cgroup has; needs root and a memory cgroup."""
    run = Run(tmp_path)
    eat = "import sys; sys.stdin.read(1); eaten = []\nwhile True: eaten.append(bytearray(1 << 20))"
    with (
        limited_memory_cgroup(64 << 20) as cgroup,
        subprocess.Popen([sys.executable, "-c", eat], stdin=subprocess.PIPE) as eater,
    ):
        (cgroup.folder / "cgroup.procs").write_text(str(eater.pid))
        run.own(eater.pid)
        run.watch(
            lambda _: eater.communicate(b"x", timeout=20),
            lambda _: (
                {e.kind for e in run.told if isinstance(e, OomSeen)}
                >= {OomKind.KERNEL_CGROUP, OomKind.CGROUP_COUNTER}
            ),
            open_kernel_log,
        )
        assert eater.returncode == -signal.SIGKILL
    ooms = [event for event in run.told if isinstance(event, OomSeen) and event.server is not None]
    assert {(oom.kind, oom.role, oom.server) for oom in ooms} == {
        (OomKind.KERNEL_CGROUP, Role.SERVER, "left"),
        (OomKind.CGROUP_COUNTER, Role.SERVER, "left"),
    }


def test_a_real_kernel_kill_of_a_stranger_is_known_as_a_strangers(tmp_path: Path) -> None:
    """Another's process meets another's limit: counted, and nothing that this run would be told of."""
    run = Run(tmp_path)
    run.own(os.getpid())
    eat = "import sys; sys.stdin.read(1); eaten = []\nwhile True: eaten.append(bytearray(1 << 20))"
    with (
        limited_memory_cgroup(64 << 20) as cgroup,
        subprocess.Popen([sys.executable, "-c", eat], stdin=subprocess.PIPE) as eater,
    ):
        (cgroup.folder / "cgroup.procs").write_text(str(eater.pid))

        def killed() -> list[OomSeen]:
            return [one for one in run.told if isinstance(one, OomSeen) and one.pid == eater.pid]

        run.watch(lambda _: eater.communicate(b"x", timeout=20), lambda _: killed(), open_kernel_log)
    # A container may see its cgroups by other names than the kernel's log has.
    role = Role.OTHER if names_are_the_kernels(Path("/proc")) else Role.UNKNOWN
    assert [(kill.kind, kill.role, kill.server) for kill in killed()] == [(OomKind.KERNEL_CGROUP, role, None)]


def test_a_trainer_that_is_stopped_for_good_is_started_again(tmp_path: Path) -> None:
    """SIGSTOP, with a floor of a second: it stalls, is ended and comes back by itself."""
    with little_run(tmp_path, in_place=False) as run:
        text = run.config.read_text()
        run.config.write_text(
            text.replace("[trainer]\n", "[trainer]\nstall_floor_s = 1\nstall_ceiling_s = 15\n")
        )
        run.daemon()
        run.until(lambda: len(run.steps()) > 80, "it trains")
        assert len(run.starts()) == 1
        (known,) = run.started()
        os.kill(known.pid, signal.SIGSTOP)
        run.until(lambda: "makes no progress" in run.log.read_text(), "the stall is told of")
        run.until(lambda: len(run.starts()) == 2, "it is started again")
        steps = len(run.steps())
        run.until(lambda: len(run.steps()) > steps + 20, "it trains on")
