"""`stepguard init`: a commented config.toml for what runs on this machine."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from stepguardd.cli.output import console, fail, print_json, say
from stepguardd.cli.runs import AsJson

_FRAMEWORKS = (
    "verl", "slime", "miles", "areal", "trl", "openrlhf", "prime-rl", "skyrl", "nemo-rl", "roll", "dcp",
)  # fmt: skip
_UNIT = re.compile(r"/([A-Za-z0-9:_.\\@-]+\.service)(?:/|$)")
# Units that hold a whole session of a person, and not one server.
_SESSIONS = re.compile(r"^(?:user@\d+|session|sshd?|docker|containerd|kubelet|slurmd|ray)\b")


def init(
    *,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="Where to write it; - prints it.")
    ] = "config.toml",
    framework: Annotated[
        str | None,
        typer.Option(
            "--framework", metavar="NAME", help=f"Who trains: {', '.join(_FRAMEWORKS)}. By default found."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="The run's name. By default the trainer's folder."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    json: AsJson = False,
) -> None:
    """
    Find servers, trainer, W&B runs and checkpoints here, and write a commented config for them.

    Nothing is started or stopped. The result passes `stepguard config check`; read it before you use it.
    """
    if framework is not None and framework not in _FRAMEWORKS:
        fail(f"--framework {framework} is not known: use one of {', '.join(_FRAMEWORKS)}")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        fail(f"--name {name}: letters, digits, dots, dashes and underscores, at most 64 of them")
    path = None if out == "-" else Path(out)
    if path is not None and path.is_dir():
        fail(f"--out {path} is a folder; name a file in it")
    if path is not None and path.exists() and not force:
        fail(f"{path} is there already; --force writes over it, --out FILE writes another")
    from stepguardd.config import ConfigError, read_config, warnings  # noqa: PLC0415 - pydantic, late
    from stepguardd.doctor.machine import look  # noqa: PLC0415 - as above
    from stepguardd.doctor.proposal import propose  # noqa: PLC0415 - as above
    from stepguardd.doctor.runs import saved_in  # noqa: PLC0415 - as above

    with console(as_json=True).status("looking at what runs here"):
        machine = look()
        saved = saved_in(machine)
    pids = [server.process.pid for server in machine.servers]
    text = propose(
        machine,
        framework=framework,
        checkpoints=[one.folder.root for one in saved],
        units={pid: unit for pid in pids if (unit := _unit(pid)) is not None},
        name=name,
    )
    if path is None:
        typer.echo(text, nl=False)
        return
    _write(path, text)
    try:
        told = warnings(read_config(path).config)
    except ConfigError as wrong:  # a path or a name of this machine that no config can hold
        fail(f"what was found cannot be used as it is: {wrong}; correct it in the file")
    found: dict[str, list[str]] = {
        "servers": [server.url for server in machine.servers],
        "trainers": [f"pid {trainer.process.pid}" for trainer in machine.trainers],
        "wandb": [str(log) for log in machine.wandb],
        "checkpoints": [str(one.folder.root) for one in saved],
    }
    if json:
        print_json({"file": str(path), **found, "warnings": told})
        return
    for what, items in found.items():
        typer.echo(f"{what:<12} {', '.join(items) or 'none found'}")
    for warning in told:
        typer.echo(f"warning: {warning}")
    typer.echo(f"wrote {path}: read it, then: stepguard run --config {path}")


def _write(path: Path, text: str) -> None:
    try:
        half = path.with_name(f".{path.name}.{os.getpid()}")
        half.write_text(text, encoding="utf-8")
        half.replace(path)
    except OSError as error:
        fail(f"{path}: cannot be written: {error.strerror}")


def _unit(pid: int) -> str | None:
    """The systemd unit that a process runs in, if it is one of its own."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    units = [unit for unit in _UNIT.findall(text) if not _SESSIONS.match(unit)]
    if not units:
        return None
    say(f"pid {pid} runs in the unit {units[-1]}")
    return str(units[-1])
