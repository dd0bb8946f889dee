"""The machine itself: GPUs, memory, kills, disks, clock, and what this user may see and do."""

import ctypes
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from stepguard.cgroups import MemoryCgroup, kill_count, memory_cgroup

from ..incidents.recorder import py_spy
from ..places import default_state_dir, run_roots
from ..sources.cgroups import memory_pressure, pressure_warning
from ..sources.kmsg import KMSG
from ..sources.nvml import Gpu, GpuError, GpuLook, NvmlDriver
from .findings import Finding, bad, ok, warn
from .machine import Machine
from .servers import size

_GPU_TIMEOUT_S: Final = 5.0
_GIB: Final = 1 << 30
_STA_UNSYNC: Final = 0x0040
_TIMEX_STATUS_AT: Final = 40  # offset of `status` in struct timex on 64-bit Linux (adjtimex(2))
_TIMEX_MAXERROR_AT: Final = 24


# --- GPUs


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """Each GPU: is it there, how full, is it held back, has it counted errors, who else is on it."""
    answers: list[GpuLook | str] = []

    def ask() -> None:
        try:
            answers.append(NvmlDriver().look())
        except GpuError as error:
            answers.append(str(error))

    asking = threading.Thread(target=ask, name="gpu-driver", daemon=True)
    asking.start()
    asking.join(_GPU_TIMEOUT_S)
    look = answers[0] if answers else None
    if look is None:
        yield bad(
            "gpu",
            "driver",
            f"has not answered for {_GPU_TIMEOUT_S:g} s",
            "see dmesg; the node may need a reboot",
        )
    elif isinstance(look, str):
        yield warn("gpu", "none", look, "on a machine with GPUs: install the driver, and nvidia-ml-py")
    else:
        ours = {process.pid for process in machine.processes}
        for gpu in look.gpus:
            yield from _gpu(gpu, ours)


def _gpu(gpu: Gpu, known: set[int]) -> Iterator[Finding]:
    subject = str(gpu.index)
    if gpu.lost:
        yield bad("gpu", subject, "has fallen off the bus", "drain the node; a reset or a repair is needed")
        return
    if gpu.ecc_uncorrected:
        yield bad(
            "gpu",
            subject,
            f"{gpu.ecc_uncorrected} uncorrected memory errors",
            "drain the node; nvidia-smi -q -d ECC",
        )
    told = []
    if gpu.used_bytes is not None and gpu.total_bytes:
        told.append(
            f"{size(gpu.used_bytes)} of {size(gpu.total_bytes)} ({gpu.used_bytes / gpu.total_bytes:.0%})"
        )
    if gpu.busy_percent is not None:
        told.append(f"{gpu.busy_percent} % busy")
    if gpu.temperature_c is not None:
        told.append(f"{gpu.temperature_c} °C")
    words = ", ".join(told) or "the driver says nothing of it"
    strangers = [process.pid for process in gpu.processes or () if process.pid not in known]
    if gpu.throttled_by:
        yield warn(
            "gpu",
            subject,
            f"{words}; held back by {', '.join(gpu.throttled_by)}",
            "check cooling and power limits",
        )
    elif gpu.used_bytes is not None and gpu.total_bytes and gpu.used_bytes > 0.98 * gpu.total_bytes:
        yield warn("gpu", subject, f"{words}: the next allocation may fail", "lower --mem-fraction-static")
    else:
        yield ok("gpu", subject, words)
    if strangers:
        yield warn(
            "gpu",
            subject,
            f"held by processes that are not visible here: {', '.join(map(str, strangers))}",
            "look from the host: they may be orphans, or another container's",
        )


# --- Memory


def check_memory(machine: Machine) -> Iterator[Finding]:
    """The host's memory, the limits of the cgroups that matter, and what the kernel has killed."""
    total, available = _meminfo()
    if total is None or available is None:
        yield warn("memory", "host", "/proc/meminfo cannot be read", "mount /proc")
    else:
        words = f"{size(available)} of {size(total)} available"
        if available < 0.05 * total:
            yield bad(
                "memory",
                "host",
                words,
                "free memory now, or the kernel will kill: fewer rollouts, less caching",
            )
        elif available < 0.10 * total:
            yield warn("memory", "host", words, "lower the concurrency of rollouts or the host's caches")
        else:
            yield ok("memory", "host", words)
    pressure = pressure_warning(memory_pressure())
    if pressure is not None:
        yield warn("memory", "pressure", pressure, "lower the concurrency of rollouts or the host's caches")
    yield from _cgroups(machine)
    yield from _kills()


def _meminfo() -> tuple[int | None, int | None]:
    values: dict[str, int] = {}
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) * 1024
    return values.get("MemTotal"), values.get("MemAvailable")


def _cgroups(machine: Machine) -> Iterator[Finding]:
    seen: set[Path] = set()
    watched = [("server", one.process.pid) for one in machine.servers]
    watched += [("trainer", one.process.pid) for one in machine.trainers]
    for role, pid in watched:
        group = memory_cgroup(pid)
        if group is None or group.folder in seen:
            continue
        seen.add(group.folder)
        subject = f"cgroup {group.name or '/'}"
        killed = kill_count(group)
        if killed:
            yield warn(
                "oom",
                subject,
                f"the kernel has killed {killed} processes for memory in the {role}'s cgroup",
                "raise its limit or lower the load; `stepguard diagnose` on its logs tells the rest",
            )
        limit, used = _limit(group)
        if limit is not None and used is not None:
            words = f"{size(used)} of the {role}'s limit of {size(limit)}"
            if used > 0.95 * limit:
                yield bad("memory", subject, words, "raise the limit before the kernel kills in it")
            else:
                yield ok("memory", subject, words)


def _limit(group: MemoryCgroup) -> tuple[int | None, int | None]:
    names = ("memory.max", "memory.current") if group.version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes",
    )  # fmt: skip
    values: list[int | None] = []
    for name in names:
        text = ""
        with suppress(OSError):
            text = (group.folder / name).read_text(encoding="ascii").strip()
        values.append(int(text) if text.isdigit() and int(text) < 1 << 60 else None)
    return values[0], values[1]


def _kills() -> Iterator[Finding]:
    """The kernel's own count since boot; its log names the victims."""
    count = None
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                count = int(line.split()[1])
    if count is None:
        yield warn("oom", "host", "the kernel does not count its kills here", "read dmesg on the host")
    elif count:
        yield warn(
            "oom",
            "host",
            f"the kernel has killed {count} processes for memory since the machine started",
            "dmesg -T | grep -i 'killed process' names them",
        )
    else:
        yield ok("oom", "host", "no process was killed for memory since the machine started")


# --- Disks


def check_disks(machine: Machine, checkpoint_bytes: int | None) -> Iterator[Finding]:
    """
    Room where the run writes.

    Args:
        machine: what was found.
        checkpoint_bytes: how large the newest checkpoint is; None: not known.

    """
    places: dict[str, Path] = {"state": _existing(default_state_dir("run"))}
    places |= {f"checkpoints {path}": path for path in machine.saves}
    places |= {f"W&B {path.parent}": path.parent for path in machine.wandb}
    seen: set[int] = set()
    for subject, path in places.items():
        try:
            device = path.stat().st_dev
            usage = shutil.disk_usage(path)
            inodes = os.statvfs(path)
        except OSError as error:
            yield warn("disk", subject, f"{path}: {error.strerror}", "check the mount")
            continue
        if device in seen:
            continue
        seen.add(device)
        yield _room(subject, path, usage.free, usage.total, checkpoint_bytes)
        if inodes.f_files and inodes.f_favail < 0.01 * inodes.f_files:
            yield bad("disk", subject, f"{path}: {inodes.f_favail} inodes left", "delete small files")
    with suppress(OSError):
        shared = shutil.disk_usage("/dev/shm")  # noqa: S108 - its size is asked for
        if shared.total < _GIB and machine.trainers:
            yield warn(
                "disk",
                "/dev/shm",  # noqa: S108 - its name is told
                f"only {size(shared.total)}: NCCL and data loaders need more",
                "docker run --shm-size=16g",
            )


def _room(subject: str, path: Path, free: int, total: int, checkpoint_bytes: int | None) -> Finding:
    words = f"{size(free)} of {size(total)} free at {path}"
    needed = checkpoint_bytes or 0
    if checkpoint_bytes:
        words += f", room for {free // checkpoint_bytes} more checkpoints of {size(checkpoint_bytes)}"
    if free < max(_GIB, needed):
        return bad("disk", subject, words, "free space: a checkpoint that does not fit is cut short")
    if free < 0.05 * total or free < 3 * needed:
        return warn("disk", subject, words, "free space, or lower how many checkpoints are kept")
    return ok("disk", subject, words)


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


# --- Clock


def check_clock() -> Finding:
    """Whether the kernel holds the clock to be kept in step: times of several logs are compared by people."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(512)
    if not hasattr(libc, "adjtimex") or ctypes.sizeof(ctypes.c_void_p) != 8 or libc.adjtimex(buffer) < 0:
        return warn("clock", "host", "the kernel does not say whether it is in step", "chronyc tracking")
    status = int.from_bytes(buffer.raw[_TIMEX_STATUS_AT : _TIMEX_STATUS_AT + 4], "little")
    error_us = int.from_bytes(buffer.raw[_TIMEX_MAXERROR_AT : _TIMEX_MAXERROR_AT + 8], "little", signed=True)
    if status & _STA_UNSYNC:
        return warn(
            "clock",
            "host",
            "is not kept in step (Stepguard itself does not need it; logs of several nodes do)",
            "start chrony or systemd-timesyncd",
        )
    return ok("clock", "host", f"in step, at most {error_us / 1000:.0f} ms off")


# --- Permissions


def check_permissions(machine: Machine) -> Iterator[Finding]:
    """What a daemon of this user could see and do here."""
    uid = os.geteuid()
    root = uid == 0
    for server in machine.servers:
        if not root and server.process.uid != uid:
            yield warn(
                "permission",
                f"pid {server.process.pid}",
                f"the server is of user {server.process.uid}: it cannot be stopped or restarted from here",
                'run the daemon as that user, or the server as a unit of its own (backend = "systemd")',
            )
    if os.access(KMSG, os.R_OK) and _opens(KMSG):
        yield ok("permission", "kernel log", "can be read")
    else:
        yield warn(
            "permission",
            "kernel log",
            "cannot be read: who was killed for memory is not known",
            "give the daemon CAP_SYSLOG, or put its user into the group adm or systemd-journal",
        )
    folder = next((path for path in run_roots() if os.access(_existing(path), os.W_OK)), None)
    if folder is None:
        yield bad("permission", "run_dir", "no folder for the gate page can be made", "set run.run_dir")
    else:
        yield ok("permission", "run_dir", f"a run's folder can be made in {folder}")
    limit = resource.getrlimit(resource.RLIMIT_RTPRIO)[0]
    if root or limit:
        yield ok("permission", "priority", "the daemon may run before ordinary processes")
    else:
        yield warn(
            "permission",
            "priority",
            "no real-time priority: on busy cores a hold takes milliseconds more",
            "LimitRTPRIO=1 in the unit, or @group - rtprio 1 in limits.conf",
        )
    yield _stacks(root=root)


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _stacks(*, root: bool) -> Finding:
    program = py_spy()
    scope = "0"
    with suppress(OSError):
        scope = Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii").strip()
    if program is None:
        return warn(
            "permission",
            "stacks",
            "py-spy is not installed: a hang is reported without stacks",
            "pip install py-spy into the daemon's environment",
        )
    if not root and scope not in {"0", ""}:
        return warn(
            "permission",
            "stacks",
            f"py-spy may not look into other processes (ptrace_scope {scope})",
            "give the daemon CAP_SYS_PTRACE, or sysctl kernel.yama.ptrace_scope=0",
        )
    return ok("permission", "stacks", f"{program} can tell where a process hangs")
