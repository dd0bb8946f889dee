"""The training runs: is the guard in them, how fresh is their stream, are their checkpoints good."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stepguard.gate import GateError, GatePage

from .. import clock
from ..checkpoints.layouts import Checkpoint, Folder, LayoutError, find_checkpoints, open_folder, size_bytes
from ..checkpoints.vetting import VettingLimits, vet_all
from ..config import Config
from ..control.client import ControlClient, ControlError, NoDaemonError
from ..control.contract import StatusDict
from ..core.verdict import Depth, Verdict
from .findings import Finding, bad, ok, warn
from .machine import FoundTrainer, Machine
from .servers import flag, size

FLUSH: Final = "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL"
_STREAM_STALE_S: Final = 900.0
_VETTED: Final = 2
# How long a restart of a server takes where nobody has said: what people see with large models.
_RECOVERY_S: Final = 600.0
# Each framework's own default of its collectives' timeout, in seconds (torch's for NCCL is 600).
_COLLECTIVE_S: Final = {"trl": 1800.0, "verl": 600.0, "slime": 600.0, "miles": 600.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """Where checkpoints were found."""

    folder: Folder
    checkpoints: Sequence[Checkpoint]

    @property
    def newest_bytes(self) -> int:
        """How large the newest one is."""
        return size_bytes(self.checkpoints[-1])


def check_daemons(machine: Machine) -> Iterator[Finding]:
    """Stepguard's own daemons, and what they say."""
    answered = 0
    for socket in machine.sockets:
        subject = socket.parent.name
        try:
            with ControlClient(socket, timeout_s=3.0) as client:
                status = client.status()
        except NoDaemonError:
            continue  # a socket that a daemon has left behind
        except ControlError as error:
            yield warn("daemon", subject, str(error), "see its log, and restart it")
            continue
        answered += 1
        yield _daemon(subject, status)
    if not answered:
        yield warn(
            "daemon",
            "none",
            "no Stepguard daemon answers here: nothing is watched",
            "stepguard init writes a config; stepguard run --config FILE starts it",
        )


def _daemon(subject: str, status: StatusDict) -> Finding:
    phase = str(status.get("breaker", {}).get("phase"))
    words = f"run {status.get('run')}: {phase.replace('_', ' ')}, mode {status.get('mode')}"
    reason = status.get("breaker", {}).get("reason")
    if phase in {"open", "locked_out", "forced_open"}:
        return bad(
            "daemon",
            subject,
            f"{words}: the trainer is held ({reason})",
            "stepguard status; stepguard report",
        )
    return ok("daemon", subject, words)


def check_trainers(machine: Machine, config: Config | None) -> Iterator[Finding]:
    """The trainers that were found."""
    if not machine.trainers:
        yield warn(
            "trainer",
            "none",
            "no trainer runs here, or none that is known by its command line",
            "run this as the trainer's user; with the guard in it, any trainer is found",
        )
    for trainer in machine.trainers:
        yield _guard(trainer)
        yield from _collectives(trainer, config)


def _name(trainer: FoundTrainer) -> str:
    return f"pid {trainer.process.pid}" + (f" ({trainer.framework})" if trainer.framework else "")


def _guard(trainer: FoundTrainer) -> Finding:
    subject = _name(trainer)
    if trainer.process.environ is None:
        return warn(
            "guard", subject, "its environment may not be read: nobody can say whether it is guarded",
            "run this as its user, or as root",
        )  # fmt: skip
    if trainer.run_dir is None:
        return warn(
            "guard",
            subject,
            "not guarded: a bad batch is seen only after its optimizer step",
            "start it with STEPGUARD_RUN_DIR set, and the guard in its loop (docs/guard.md)",
        )
    try:
        with closing(GatePage.open(trainer.run_dir / "gate", writable=False)) as page:
            daemon, half = page.daemon(), page.trainer()
    except GateError as error:
        return bad("guard", subject, str(error), "start the daemon of that run_dir before the trainer")
    lease_s = -1.0 if daemon is None else daemon.lease_deadline_ns / 1e9 - clock.monotonic()
    if daemon is None or lease_s < 0:
        return bad(
            "guard", subject, "no living daemon stands behind its gate page", "stepguard run --config FILE"
        )
    if half is None:
        return warn("guard", subject, "its guard has not reported yet", "is Guard.from_env() in its loop?")
    return ok("guard", subject, f"guarded: gate {daemon.order.name}, phase {half.phase.name}")


def _collectives(trainer: FoundTrainer, config: Config | None) -> Iterator[Finding]:
    """A recovery that outlasts a collective's timeout costs the job that it wanted to save."""
    if trainer.ranks < 2 and not re.search(r"torchrun|deepspeed|ray", trainer.process.line):
        return
    told_s, source = _collective_s(trainer)
    expected_s, why = _recovery_s(config)
    words = f"collectives give up after {told_s:g} s ({source}); a recovery may take {expected_s:g} s ({why})"
    if told_s < expected_s:
        yield warn(
            "collectives",
            _name(trainer),
            words,
            "raise the timeout (--distributed-timeout-minutes, nccl_timeout, --ddp_timeout)",
        )
    else:
        yield ok("collectives", _name(trainer), words)


def _collective_s(trainer: FoundTrainer) -> tuple[float, str]:
    command = trainer.process.command
    minutes = flag(command, "distributed-timeout-minutes")
    if minutes is not None and minutes.isdigit():
        return 60.0 * int(minutes), "--distributed-timeout-minutes"
    for name in ("ddp_timeout", "nccl_timeout", "actor_rollout_ref.nccl_timeout", "nccl-timeout-s"):
        value = flag(command, name)
        if value is not None and value.isdigit():
            return float(value), name
    return _COLLECTIVE_S.get(trainer.framework or "", 600.0), "by default"


def _recovery_s(config: Config | None) -> tuple[float, str]:
    if config is None or not config.servers:
        return _RECOVERY_S, "assumed for a large model"
    start_s = max(server.start_timeout_s for server in config.servers)
    return start_s + config.probe.kill_after_s, "start_timeout_s and kill_after_s of the config"


def check_wandb(machine: Machine) -> Iterator[Finding]:
    """W&B's logs: how old, and how late they are by their setting."""
    for trainer in machine.trainers:
        environ = trainer.process.environ or {}
        if environ.get("WANDB_MODE") == "disabled" and trainer.run_dir is None:
            yield warn("wandb", _name(trainer), "is disabled, and there is no guard: no reward can be read",
                       "WANDB_MODE=offline, or the guard")  # fmt: skip
    for path in machine.wandb:
        subject = path.stem
        try:
            age_s = max(0.0, clock.wall() - path.stat().st_mtime)
        except OSError as error:
            yield warn("wandb", subject, f"{path}: {error.strerror}", "run this as its owner")
            continue
        owner = next((one for one in machine.trainers if _writes(one, path)), None)
        environ = {} if owner is None else owner.process.environ or {}
        flush = environ.get(FLUSH)
        words = f"last written {age_s:.0f} s ago"
        if age_s > _STREAM_STALE_S:
            yield warn(
                "wandb", subject, words, "is the run over, or does it hang? stepguard stream " + str(path)
            )
        elif owner is not None and owner.run_dir is not None:
            yield ok("wandb", subject, f"{words}; the guard's own reports come first")
        elif flush is None:
            yield warn(
                "wandb",
                subject,
                f"{words}; rows reach the disk up to 15 s late (wandb 0.31 and newer)",
                f"start the trainer with {FLUSH}=0.2",
            )
        else:
            yield ok("wandb", subject, f"{words}; flushed every {flush} s")


def _writes(trainer: FoundTrainer, path: Path) -> bool:
    cwd = trainer.process.cwd
    return path in trainer.process.files or (cwd is not None and path.is_relative_to(cwd))


def saved_in(machine: Machine, extra: Sequence[Path] = ()) -> list[Saved]:
    """The checkpoint folders among the places where the trainers may save."""
    found: dict[Path, Saved] = {}
    for path in [*extra, *machine.saves]:
        try:
            folder = open_folder(path)
            checkpoints = find_checkpoints(folder)
        except (LayoutError, OSError):
            continue
        if checkpoints:
            found[folder.root] = Saved(folder=folder, checkpoints=checkpoints)
    return list(found.values())


def check_checkpoints(
    saved: Sequence[Saved], machine: Machine, *, deep: bool, progress: Callable[[str], None]
) -> Iterator[Finding]:
    """
    Whether there is something to go back to.

    Args:
        saved: where checkpoints were found.
        machine: what was found.
        deep: read the newest ones through, every number; else their structure.
        progress: is told what is being read.

    """
    if not saved and machine.trainers:
        yield warn(
            "checkpoints",
            "none",
            "no checkpoint was found where the trainers run",
            "stepguard checkpoints list DIR; without one there is nothing to go back to",
        )
    limits = VettingLimits(depth=Depth.FULL if deep else Depth.STRUCTURE, stall_s=60.0)
    for one in saved:
        newest = list(one.checkpoints[-_VETTED:])
        progress(f"{one.folder.root}: {len(newest)} checkpoints")
        verdicts = vet_all(one.folder, newest, limits)
        subject = str(one.folder.root)
        count = (
            f"{len(one.checkpoints)} of {one.folder.layout.framework.value}, newest step {newest[-1].step}"
        )
        last = verdicts[-1]
        good = sum(vetting.verdict is Verdict.GOOD for vetting in verdicts)
        depth = "read through" if deep else "structure"
        if last.verdict is Verdict.GOOD:
            yield ok("checkpoints", subject, f"{count}, {size(one.newest_bytes)}: good ({depth})")
        elif good:
            yield warn(
                "checkpoints",
                subject,
                f"{count} is {last.verdict.value} ({last.reason}); the one before is good",
                f"stepguard checkpoints verify {subject}",
            )
        else:
            yield bad(
                "checkpoints",
                subject,
                f"{count}: the newest {len(newest)} are not good: {last.verdict.value}, {last.reason}",
                f"stepguard checkpoints verify {subject} finds one to go back to",
            )


def check_ports(machine: Machine, config: Config | None) -> Iterator[Finding]:
    """Whether the ports of the config belong to the servers that are meant."""
    from .. import proc  # noqa: PLC0415 - only where a config names ports
    from ..effects.backends.contract import port_of  # noqa: PLC0415 - as above

    for server in config.servers if config is not None else ():
        port = port_of(server.url)
        if port is None:
            continue
        owner = proc.port_owner(port)
        known = next((one for one in machine.servers if one.port == port), None)
        subject = f"{server.name}, port {port}"
        if known is not None:
            yield ok("port", subject, f"is the server's (pid {known.process.pid})")
        elif proc.port_taken(port):
            who = f"pid {owner}" if owner is not None else "another user's process"
            yield bad(
                "port",
                subject,
                f"is held by {who}, which is no inference server",
                f"ss -ltnp 'sport = :{port}'",
            )
        else:
            yield warn(
                "port", subject, "nothing listens there", "the server is not up; a daemon would start it"
            )
