"""All checks in one go, in the order in which a person would look."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..config import Config, ConfigError, load_config, warnings
from . import host, runs, servers
from .findings import Finding, Level, bad, ok, warn
from .machine import Machine, look


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What was found, and what is to be said of it."""

    machine: Machine
    findings: tuple[Finding, ...]

    def count(self, level: Level) -> int:
        """How many findings are of a level."""
        return sum(finding.level is level for finding in self.findings)


def examine(
    config_file: Path | None = None,
    *,
    generate: bool = False,
    deep: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Examination:
    """
    Look at everything once; nothing is changed.

    Args:
        config_file: a run's config, where there is one: its servers, ports and paths are looked at as well.
        generate: have each server generate a token.
        deep: read the newest checkpoints through.
        progress: is told what is being looked at.

    """
    progress("the processes")
    machine = look()
    config, findings = _config(config_file)
    findings += _all(machine, config, generate=generate, deep=deep, progress=progress)
    return Examination(machine=machine, findings=tuple(findings))


def _config(file: Path | None) -> tuple[Config | None, list[Finding]]:
    if file is None:
        return None, []
    try:
        config = load_config(file)
    except ConfigError as error:
        return None, [bad("config", str(file), str(error), "stepguard config check --config FILE")]
    told = [
        warn("config", str(file), warning, "stepguard config schema explains it")
        for warning in warnings(config)
    ]
    return config, told or [ok("config", str(file), f"good: run {config.run.name}, mode {config.run.mode}")]


def _all(
    machine: Machine, config: Config | None, *, generate: bool, deep: bool, progress: Callable[[str], None]
) -> Iterator[Finding]:
    progress("the daemons")
    yield from runs.check_daemons(machine)
    progress("the servers")
    yield from servers.check_servers(machine, generate=generate)
    yield from runs.check_ports(machine, config)
    progress("the trainers")
    yield from runs.check_trainers(machine, config)
    yield from runs.check_wandb(machine)
    progress("the checkpoints")
    named = [] if config is None or config.checkpoints.dir is None else [config.checkpoints.dir]
    saved = runs.saved_in(machine, named)
    yield from runs.check_checkpoints(saved, machine, deep=deep, progress=progress)
    progress("the GPUs")
    yield from host.check_gpus(machine)
    progress("the host")
    yield from host.check_memory(machine)
    size = None
    with suppress(OSError):
        size = max((one.newest_bytes for one in saved), default=None)
    yield from host.check_disks(machine, size)
    yield host.check_clock()
    yield from host.check_permissions(machine)
