"""
A commented config for what runs on this machine. Pure: what was found in, text out.

It promises to pass `stepguard config check`, to start and stop nothing by itself (mode "hold", and servers
that somebody else started stay theirs), and to hold no secret.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from ..config.text import toml_value
from ..redaction import redacted_command
from .machine import FoundServer, FoundTrainer, Machine

# How each framework hands weights to its servers.
_SYNC: Final[Mapping[str, str]] = {
    "verl": "ipc",
    "slime": "nccl",
    "miles": "nccl",
    "areal": "nccl",
    "openrlhf": "nccl",
    "skyrl": "nccl",
    "nemo-rl": "nccl",
    "roll": "nccl",
    "trl": "nccl",
    "prime-rl": "disk",
}


def propose(
    machine: Machine,
    *,
    framework: str | None,
    checkpoints: Sequence[Path],
    units: Mapping[int, str],
    name: str | None,
) -> str:
    """
    The text of a config.toml.

    Args:
        machine: what was found.
        framework: the trainer's, where a person said it; None: as found.
        checkpoints: folders in which checkpoints were found, the best first.
        units: the systemd unit of a process, by pid, where it has one.
        name: the run's name, where a person said it.

    """
    trainer = machine.trainers[0] if machine.trainers else None
    framework = framework or (None if trainer is None else trainer.framework)
    lines = [
        *_words("A config for Stepguard, made by `stepguard init` from what runs on this machine."),
        *_words(
            "Every key that is not here has its default; `stepguard config schema` explains them all. Check "
            "it with `stepguard config check --config FILE`, start it with `stepguard run --config FILE`."
        ),
        "",
        "[run]",
        f"name = {toml_value(name or _name(trainer))}",
        *_words(
            '"hold" holds the run before a bad optimizer step and tells people. Set "act" once you trust it: '
            "then servers are restarted and checkpoints gone back to as well."
        ),
        'mode = "hold"',
        *_run_dir(trainer),
        *_servers(machine.servers, units),
        *_weights(framework),
        *_checkpoints(checkpoints, framework),
        *_stream(machine, trainer),
    ]
    return "\n".join(lines) + "\n"


def _name(trainer: FoundTrainer | None) -> str:
    """The run's name out of the trainer's folder."""
    cwd = None if trainer is None else trainer.process.cwd
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", "" if cwd is None else cwd.name).strip("-._")[:64]
    return plain or "run"


def _run_dir(trainer: FoundTrainer | None) -> Iterator[str]:
    if trainer is not None and trainer.run_dir is not None:
        yield from _words("The running trainer was started with this STEPGUARD_RUN_DIR.")
        yield f"run_dir = {toml_value(str(trainer.run_dir))}"
    else:
        yield from _words(
            "The trainer is guarded once it is started with STEPGUARD_RUN_DIR set to what `stepguard run` "
            "prints, and the guard is in its loop (docs/guard.md)."
        )


def _servers(servers: Sequence[FoundServer], units: Mapping[int, str]) -> Iterator[str]:
    if not servers:
        yield ""
        yield from _words(
            "No server was found. Without one, the reward and the trainer alone are watched. For one that "
            'somebody else starts: backend "none"; for one that Stepguard restarts: "process" or "systemd".'
        )
        yield from (
            "# [[servers]]",
            '# name = "sglang"',
            '# url = "http://127.0.0.1:30000"',
            '# backend = "none"',
        )
    for number, server in enumerate(servers):
        yield from _server(server, units.get(server.process.pid), number if len(servers) > 1 else None)


def _server(server: FoundServer, unit: str | None, number: int | None) -> Iterator[str]:
    yield ""
    yield f"# Found as pid {server.process.pid}."
    yield "[[servers]]"
    yield f"name = {toml_value('sglang' if number is None else f'sglang-{number}')}"
    yield f"url = {toml_value(server.url)}"
    if unit is not None:
        yield from _words("It is a unit of systemd, which starts and stops it when Stepguard asks.")
        yield 'backend = "systemd"'
        yield f"unit = {toml_value(unit)}"
    else:
        yield from _words(
            "Somebody else started it: Stepguard watches it and holds the run when it fails, and does not "
            'restart it. To let Stepguard start and restart it, stop it, set backend = "process" and take '
            "the command, which runs in this folder:"
        )
        yield 'backend = "none"'
        if server.process.cwd is not None:
            yield f"# cwd = {toml_value(str(server.process.cwd))}"
        yield f"# command = {toml_value(redacted_command(server.process.command))}"
    if server.process.output is not None:
        yield f"log = {toml_value(str(server.process.output))}"


def _weights(framework: str | None) -> Iterator[str]:
    sync = _SYNC.get(framework or "")
    yield ""
    yield "[weights]"
    if sync is None:
        yield from _words(
            'How the trainer hands its weights to the servers: "disk", "nccl", "ipc", or "none" where they '
            "never change. The trainer's framework was not recognised."
        )
        yield '# sync = "disk"'
    else:
        yield from _words(
            f"How {framework} hands its weights to the servers by default; check that it is so here."
        )
        yield f'sync = "{sync}"'


def _checkpoints(folders: Sequence[Path], framework: str | None) -> Iterator[str]:
    yield ""
    yield "[checkpoints]"
    if folders:
        yield f"dir = {toml_value(str(folders[0]))}"
        for other in folders[1:]:
            yield f"# also found: {toml_value(str(other))}"
    else:
        yield from _words("None was found so far. A rollback needs to know where they are.")
        yield '# dir = "checkpoints"'
    if framework is not None:
        yield f"framework = {toml_value(framework)}"


def _stream(machine: Machine, trainer: FoundTrainer | None) -> Iterator[str]:
    guarded = trainer is not None and trainer.run_dir is not None
    yield ""
    yield "[stream]"
    if not machine.wandb:
        yield from _words("Where W&B writes on this disk, for a trainer without the guard.")
        yield '# wandb_dir = "wandb"'
        return
    runs = machine.wandb[0].parent.parent
    why = (
        "The trainer has the guard, whose reports come first." if guarded else "The reward is read from here."
    )
    yield from _words(
        why
        if guarded
        else f"{why} Start the trainer with WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL=0.2: rows "
        "are 15 s late otherwise."
    )
    yield f"wandb_dir = {toml_value(str(runs))}"


def _words(text: str) -> list[str]:
    """A comment."""
    return [f"# {line}" for line in textwrap.wrap(text, 96)]
