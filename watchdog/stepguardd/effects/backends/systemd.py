"""
The server as a systemd unit of its own.

Changed arguments come after the unit's own; SGLang takes the last word on a flag. A unit whose ExecStart
reads `%t/stepguard-arguments/%i`, as the packaged one does, gets them in that file, which takes no privilege.
For any other a drop-in repeats its ExecStart with them, which takes root. Both lie under /run (a user's:
$XDG_RUNTIME_DIR), so a reboot forgets them.
"""

import asyncio
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ... import proc
from ...config import ServerSettings
from ...core.events import Proc
from .. import programs
from ..outcome import Outcome, failed
from ..processes import end
from .contract import COMMAND_TIMEOUT_S, PORT_FREE_S, Arguments, port_freed, port_of, rooted, taken

DROP_IN: Final = "60-stepguard-arguments.conf"
ARGUMENTS: Final = "stepguard-arguments"


class SystemdBackend:
    """
    A unit; the daemon needs leave to start and stop it.

    Args:
        settings: the server's table of the config.
        systemctl: the command; by default to the manager that runs the daemon.
        runtime: the manager's folder for what a reboot may forget, `%t` of its units.

    """

    def __init__(
        self, settings: ServerSettings, systemctl: Sequence[str] = (), runtime: Path | None = None
    ) -> None:
        assert settings.unit is not None
        self._unit = settings.unit
        self._port = port_of(settings.url)
        self._systemctl = tuple(systemctl) or programs.systemctl()
        runtime = runtime or _runtime()
        self._drop_in = runtime / "systemd" / _manager() / f"{self._unit}.d" / DROP_IN
        instance = self._unit.partition("@")[2].removesuffix(".service")
        self._file = runtime / ARGUMENTS / instance if instance else None
        self._known: tuple[Proc, ...] = ()

    @property
    def quick(self) -> bool:
        """While its main process lives."""
        return rooted(self._known)

    def find(self) -> tuple[Proc, ...]:
        """The processes of the unit's main process; systemd is asked for it only once it is gone."""
        self._known = proc.family(self._known) or self._shown()
        return self._known

    def _shown(self) -> tuple[Proc, ...]:
        command = [*self._systemctl, "show", "--property=MainPID", "--value", self._unit]
        try:
            shown = subprocess.run(
                command, capture_output=True, timeout=5.0, check=False, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired):
            return ()
        text = shown.stdout.strip()
        return proc.tree(int(text)) if text.isdigit() and int(text) > 0 else ()

    async def start(self, intent: str, arguments: Arguments = MappingProxyType({})) -> Outcome:
        """`systemctl start` is an ensure by itself: a unit that runs is left running."""
        del intent
        kept = await self._set_arguments(arguments)
        done = await self._ask("start")
        if not done.ok:
            return failed(done.trouble)
        procs = await asyncio.to_thread(self.find)
        return Outcome(
            ok=True, detail=f"systemctl start {self._unit}", procs=procs, kept_arguments=kept or None
        )

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """Stop the unit, then see that no process of the old tree is left and the port free."""
        done = await self._ask("stop")
        if not done.ok:
            return failed(done.trouble)
        left = await end(procs, grace_s=0.0, timeout_s=PORT_FREE_S)
        if left:
            return failed(f"{len(left)} processes survive SIGKILL")
        if not await port_freed(self._port):
            return failed(taken(self._port or 0))
        return Outcome(ok=True, detail=f"systemctl stop {self._unit}")

    async def _set_arguments(self, arguments: Arguments) -> str:
        """Leave them where the unit finds them; returns why that could not be done, "" when it was."""
        added = " ".join(f"{flag} {value}" for flag, value in arguments.items())
        if not added and not self._drop_in.exists() and not (self._file and self._file.exists()):
            return ""
        shown = await programs.ask(*self._systemctl, "cat", self._unit, timeout_s=COMMAND_TIMEOUT_S)
        line = _exec_start(shown.out)
        if line is None:
            return shown.trouble or f"{self._unit} has no ExecStart of one command"
        reads = self._file is not None and f"%t/{ARGUMENTS}/%i" in line
        text = f"[Service]\nExecStart=\nExecStart={line} {added}\n"
        try:
            if self._file is not None:
                _written(self._file, f"{added}\n" if reads and added else "")
            if not _written(self._drop_in, "" if reads or not added else text):
                return ""
        except OSError as error:
            return f"cannot write {error.filename}: {error.strerror}"
        command = (*self._systemctl, "--no-ask-password", "daemon-reload")
        return (await programs.ask(*command, timeout_s=COMMAND_TIMEOUT_S)).trouble

    async def _ask(self, verb: str) -> programs.Answered:
        answered = await programs.ask(
            *self._systemctl,
            "--no-ask-password",
            verb,
            self._unit,
            timeout_s=COMMAND_TIMEOUT_S,
            shown=f"systemctl {verb} {self._unit}",
        )
        return programs.with_leave(answered, self._unit)


def _exec_start(units: str) -> str | None:
    """
    The ExecStart that holds, out of `systemctl cat`; None where there is none, or more than one.

    Stepguard's own drop-in does not count, and an empty ExecStart takes back those before it.
    """
    lines: list[str] = []
    ours = False
    for line in units.replace("\\\n", " ").splitlines():
        if line.startswith("# /"):
            ours = line.rstrip().endswith(f"/{DROP_IN}")
        key, equals, value = line.strip().partition("=")
        if not ours and equals and key.strip() == "ExecStart":
            lines = [*lines, value.strip()] if value.strip() else []
    return lines[0] if len(lines) == 1 else None


def _written(path: Path, text: str) -> bool:
    """See that a file says this, or is not there for ""; whether that changed anything. Raises OSError."""
    before = path.read_text() if path.exists() else ""
    if before == text:
        return False
    if not text:
        path.unlink()
        return True
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return True


def _manager() -> str:
    return "user" if os.environ.get(programs.MANAGER) == "user" else "system"


def _runtime() -> Path:
    if _manager() == "user":
        return Path(os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}"))
    return Path("/run")
