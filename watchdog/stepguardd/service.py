"""
What `stepguard install-service` puts on a machine: the packaged units, made to fit it.

The units are written for the system's manager, the user `stepguard` and /usr/local/bin/stepguard; here they
are changed where this machine differs. Nothing is written here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .effects.programs import POLKIT_RULE

PROGRAM: Final = "/usr/local/bin/stepguard"
USER: Final = "stepguard"
UNITS: Final = (
    "stepguardd@.service",
    "stepguard-pause@.service",
    "stepguard-rollback@.service",
    "stepguard-server@.service",
    "stepguard-trainer@.service",
)

# What a user's manager may do without privileges. The rest is for the system's, which enforces it.
_USERS_SERVICE_KEYS: Final = frozenset(
    {
        "Type",
        "NotifyAccess",
        "ExecStart",
        "Environment",
        "EnvironmentFile",
        "Restart",
        "RestartSec",
        "TimeoutStartSec",
        "WatchdogSec",
        "TimeoutAbortSec",
        "TimeoutStopSec",
        "KillMode",
        "OOMPolicy",
        "LimitCORE",
        "RuntimeDirectory",
        "RuntimeDirectoryMode",
        "RuntimeDirectoryPreserve",
        "StateDirectory",
        "StateDirectoryMode",
        "UMask",
        "NoNewPrivileges",
        "RestrictRealtime",
        "LockPersonality",
        "MemoryDenyWriteExecute",
        "SystemCallArchitectures",
        "StandardOutput",
        "StandardError",
    }
)


class ServiceError(Exception):
    """It cannot be installed; the message is one line with the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceFile:
    """One file to write."""

    path: Path
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """
    What is to be done, in this order.

    Args:
        folders: made where they are absent.
        files: written, over what an earlier version left.
        commands: run, the last one making systemd read its units again.

    """

    folders: tuple[Path, ...] = ()
    files: tuple[ServiceFile, ...]
    commands: tuple[tuple[str, ...], ...]


def packaged() -> Path:
    """
    The folder of the units: inside the wheel, or of the checkout.

    Raises:
        ServiceError: neither is there.

    """
    for folder in (Path(__file__).parent / "systemd", Path(__file__).parents[2] / "systemd"):
        if (folder / UNITS[0]).is_file():
            return folder
    raise ServiceError(f"{Path(__file__).parent}: the units are missing; install stepguard from its wheel")


def for_system(program: str, *, user: str, group: str, writes: Sequence[Path]) -> Installation:
    """
    For the system's manager, as root.

    Args:
        program: the command that the units run.
        user: who trains, and so who watches.
        group: the same user's group.
        writes: folders that a rollback may change, beside the run's own.

    Raises:
        ServiceError: a path that no unit can name.

    """
    source, units = packaged(), Path("/etc/systemd/system")
    files = [
        ServiceFile(path=units / name, text=_owned(_unit(source, name, program), user, group))
        for name in UNITS
    ]
    if writes:
        lines = "".join(f"ReadWritePaths={_named(str(folder))}\n" for folder in writes)
        path = units / "stepguardd@.service.d" / "10-writes.conf"
        files.append(ServiceFile(path=path, text=f"[Service]\n{lines}"))
    folders = ServiceFile(
        path=Path("/etc/tmpfiles.d/stepguard.conf"),
        text=re.sub(
            r"(?m)\bstepguard( +)stepguard$", rf"{user}\1{group}", _text(source, "stepguard.tmpfiles.conf")
        ),
    )
    rule = ServiceFile(
        path=Path(POLKIT_RULE),
        text=_text(source, "50-stepguard.rules").replace(
            'subject.user !== "stepguard"', f'subject.user !== "{user}"'
        ),
    )
    commands = [("systemd-tmpfiles", "--create", str(folders.path)), ("systemctl", "daemon-reload")]
    files += [folders, rule]
    if user == USER:
        path = Path("/etc/sysusers.d/stepguard.conf")
        files.append(ServiceFile(path=path, text=_text(source, "stepguard.sysusers.conf")))
        commands.insert(0, ("systemd-sysusers", str(path)))
    return Installation(files=tuple(files), commands=tuple(commands))


def for_user(program: str, *, config_home: Path) -> Installation:
    """
    For a user's own manager: no other user, no polkit, and as much of the sandbox as needs no privilege.

    Raises:
        ServiceError: a path that no unit can name.

    """
    source, units = packaged(), config_home / "systemd" / "user"
    files = tuple(
        ServiceFile(path=units / name, text=_unprivileged(_unit(source, name, program))) for name in UNITS
    )
    ours = config_home / "stepguard"
    folders = (ours / "servers", ours / "trainers", config_home / "log" / "stepguard")
    return Installation(folders=folders, files=files, commands=(("systemctl", "--user", "daemon-reload"),))


def _unit(source: Path, name: str, program: str) -> str:
    return _text(source, name).replace(f"ExecStart={PROGRAM} ", f"ExecStart={_named(program)} ")


def _owned(text: str, user: str, group: str) -> str:
    return text.replace("User=stepguard\n", f"User={user}\n").replace("Group=stepguard\n", f"Group={group}\n")


def _unprivileged(text: str) -> str:
    """Sections other than [Service] stay; of that one, what a plain user's manager can do."""
    kept, section = [], ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line
            kept.append(line)
            if section == "[Service]":
                kept.append("Environment=STEPGUARD_SYSTEMD=user")
        elif section == "[Service]" and not line.startswith("#"):
            key = line.partition("=")[0]
            if not line or key in _USERS_SERVICE_KEYS:
                kept.append(line)
        elif section != "[Service]":
            kept.append(line)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)) + "\n"
    return text.replace("WantedBy=multi-user.target", "WantedBy=default.target")


def _named(path: str) -> str:
    if re.search(r"""[\s"'\\%$]""", path):
        raise ServiceError(f"{path}: a unit cannot name a path with blanks, quotes, %, $ or backslashes")
    return path


def _text(source: Path, name: str) -> str:
    return (source / name).read_text(encoding="utf-8")
