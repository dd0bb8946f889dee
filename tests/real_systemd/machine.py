"""
A real systemd as PID 1 of its own namespaces, for tests: nothing it does reaches the host.

It has its own processes, mounts, host name and cgroups, and writes to folders in memory. The network is the
host's. All of it ends with the process that `unshare` started, whatever was running in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TARGET = "stepguard-test.target"
BOOT_TIMEOUT_S = 30.0
WATCHDOG_S = 3
PROGRAMS = (
    "setpriv",
    "unshare",
    "nsenter",
    "systemctl",
    "systemd-sysusers",
    "systemd-tmpfiles",
    "dbus-daemon",
    "pkaction",
)
UNIFIED = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
# Where memory is counted by cgroups of version 1, systemd keeps its own hierarchy of that version beside it.
LEGACY = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/systemd"))

# Without their default dependencies, which would draw in a whole machine's boot.
BARE = "[Unit]\nDefaultDependencies=no\n"
UNITS = {
    TARGET: f"{BARE}Wants=dbus.service polkit.service\nAfter=dbus.service polkit.service\n",
    "dbus.socket": f"{BARE}[Socket]\nListenStream=/run/dbus/system_bus_socket\n",
    "dbus.service": f"{BARE}Requires=dbus.socket\nAfter=dbus.socket\n[Service]\nType=notify\n"
    "ExecStart=/usr/bin/dbus-daemon --system --address=systemd: --nofork --nopidfile --systemd-activation\n",
    "polkit.service": f"{BARE}After=dbus.service\nRequires=dbus.service\n[Service]\nType=dbus\n"
    "BusName=org.freedesktop.PolicyKit1\nExecStart=/usr/lib/polkit-1/polkitd --no-debug\n",
    # There is no journal: what our units say is a file of the host. And a hung loop need not take long.
    **{
        f"{name}@.service.d/test.conf": f"{BARE}[Service]\nStandardOutput=append:/run/shared/{name}.log\n"
        "StandardError=inherit\n"
        for name in ("stepguard-pause", "stepguard-rollback")
    },
    **{f"{name}@.service.d/test.conf": BARE for name in ("stepguard-server", "stepguard-trainer")},
    "stepguardd@.service.d/test.conf": f"{BARE}[Service]\nStandardOutput=append:/run/shared/stepguardd.log\n"
    f"StandardError=inherit\nWatchdogSec={WATCHDOG_S}\n",
}


def why_not() -> str | None:
    """Why a systemd cannot be started here; None where it can."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces and mounts"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or not Path("/lib/systemd/systemd").exists():
        return f"not installed: {', '.join(missing) or 'systemd'} (see .ci/packages)"
    if unified() is None:
        return "no cgroup v2 hierarchy is mounted under /sys/fs/cgroup"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlay file system"
    tried = subprocess.run(
        ["unshare", "-fpmuC", "--mount-proc", "--kill-child=KILL", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if tried.returncode != 0:
        return f"no namespaces or mounts here: {tried.stderr.strip()}"
    for folder in (ROOT, Path(sys.prefix)):
        closed = [above for above in (folder, *folder.parents) if not above.stat().st_mode & stat.S_IXOTH]
        if closed and Path("/root") not in closed:
            return f"{closed[0]} is closed to other users, and the daemon runs as one"
    return None


def unified() -> Path | None:
    """Where cgroup v2 is mounted."""
    return next((path for path in UNIFIED if (path / "cgroup.subtree_control").exists()), None)


def memory_cgroups() -> str | None:
    """The cgroups with which a machine booted here can limit memory; None where it has to do without."""
    root = unified()
    if root is not None and "memory" in (root / "cgroup.controllers").read_text().split():
        return "unified"
    return "hybrid" if all((path / "cgroup.procs").exists() for path in LEGACY) else None


class Machine:
    """
    A booted systemd.

    Args:
        folder: a folder of the host, shared with it as /run/shared.
        cgroups: "unified", or "hybrid": memory in a hierarchy of version 1 beside the unified one.

    """

    def __init__(self, folder: Path, cgroups: str = "unified") -> None:
        self.shared = folder / "shared"
        self.cgroups = cgroups
        self._log = folder / "systemd.log"
        root = unified()
        assert root is not None
        name = f"stepguard-test-{os.getpid()}-{time.monotonic_ns()}"
        self._cgroups = [path / name for path in (root, *(LEGACY if cgroups == "hybrid" else ()))]
        self._outer: subprocess.Popen[bytes] | None = None
        self.init = 0

    def __enter__(self) -> Self:
        for name, text in UNITS.items():
            path = self.shared / "units" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for folder in (self.shared, *self.shared.rglob("*")):
            folder.chmod(0o755 if folder.is_dir() else 0o644)
        for folder in self._cgroups:
            folder.mkdir()
        # The namespace is rooted where it is made.
        into = 'for folder in $0; do echo $$ >"$folder/cgroup.procs" || exit; done; exec "$@"'
        command = [
            "sh",
            "-c",
            into,
            " ".join(map(str, self._cgroups)),
            *("setpriv", "--pdeathsig", "KILL"),  # were this process killed, all of it would end as well
            "unshare",
            "-fpmuC",
            "--mount-proc",
            "--kill-child=KILL",
        ]
        command += [str(HERE / "boot.sh"), str(self.shared), self.cgroups]
        command += [str(ROOT), sys.prefix, sys.base_prefix]
        with self._log.open("wb") as log:
            self._outer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.until(self._booted, "systemd has booted", timeout_s=BOOT_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, and all that runs in it."""
        if self._outer is not None:
            self._outer.kill()
            self._outer.wait(timeout=10)
        deadline = time.monotonic() + 20
        made = [folder for root in self._cgroups for folder in (root, *root.rglob("*/"))]
        for folder in sorted(made, reverse=True):
            while folder.is_dir():
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    break
                assert time.monotonic() < deadline, f"something still runs in {folder}"
                time.sleep(0.05)

    def run(self, *command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """A command inside, as root."""
        entered = ["nsenter", "-t", str(self.init), "-m", "-p", "-u", "-C", "-w/", *command]
        # No bus of the host's user, no run of the host's: inside there are others.
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
        }
        return subprocess.run(
            entered,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            env=environment,
            check=False,
        )

    def do(self, *command: str, timeout_s: float = 60.0) -> str:
        """A command inside, as root, that has to succeed; returns what it said."""
        done = self.run(*command, timeout_s=timeout_s)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}\n{self.log()}"
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.do("systemctl", "show", f"--property={name}", "--value", unit).strip()

    def kill(self, pid: int, what: str) -> None:
        """Signal a process by its pid inside."""
        self.do("kill", f"-{what}", str(pid))

    def path(self, inside: str) -> Path:
        """A file of the inside, as the host sees it."""
        return Path(f"/proc/{self.init}/root{inside}")

    def until(self, what: Callable[[], bool], words: str, timeout_s: float = 60.0) -> None:
        """Wait for it; what systemd logged is told where it does not come."""
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, f"within {timeout_s:.0f} s not: {words}\n{self.log()}"
            time.sleep(0.1)

    def log(self) -> str:
        """What the boot and the daemon's unit said, and how the units are."""
        logs = (self._log, self.shared / "stepguardd.log")
        said = [path.read_text(errors="replace")[-4000:] for path in logs if path.exists()]
        said.append(self.run("systemctl", "--no-pager", "status", "stepguard*", "dbus*", "polkit*").stdout)
        return "\n".join(said)

    def _booted(self) -> bool:
        assert self._outer is not None
        assert self._outer.poll() is None, self._log.read_text()
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        if not children:
            return False
        self.init = int(children[0])
        if not self.path("/run/systemd/private").exists():
            return False
        done = self.run("systemctl", "is-active", TARGET, "dbus.service", "polkit.service")
        return done.stdout.split() == ["active"] * 3


@contextlib.contextmanager
def booted(folder: Path, cgroups: str = "unified") -> Iterator[Machine]:
    """A machine that is gone when the block is left."""
    with Machine(folder, cgroups) as machine:
        yield machine
