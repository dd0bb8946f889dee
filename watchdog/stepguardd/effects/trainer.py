"""
Starting and ending a trainer: one back-end for each who may own it.

Each finds its trainer by itself (a mark in the environment, a unit, a container, a job's id), so what a
daemon that died had begun is found again, and not begun twice. How a trainer is to resume is the framework's
own affair, by its marker; where it wants to be told, `trainer.resume_args` says how.
"""

import asyncio
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from .. import proc
from ..config import LaunchSettings
from ..core.events import Proc
from .outcome import Outcome, failed
from .processes import end
from .programs import Answered, ask, with_leave

TRAINER_MARK: Final = "STEPGUARD_TRAINER"
INTENT_MARK: Final = "STEPGUARD_TRAINER_INTENT"
RUN_DIR: Final = "STEPGUARD_RUN_DIR"
RESUME_FILE: Final = "resume.env"
LOG_BYTES_MAX: Final = 64 << 20

_EARLY_DEATH_S: Final = 0.2
_KILLED_WITHIN_S: Final = 30.0
_STOP_ROUNDS: Final = 3
_ASK_TIMEOUT_S: Final = 30.0
_FIND_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """What a trainer is to start from; without a step, whatever it would take by itself."""

    step: int | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Whether a trainer runs, and how it ended if it did. None is unknown."""

    running: bool | None
    code: int | None = None


class TrainerBackend(Protocol):
    """Who owns the trainer, and how it is asked to start and to end."""

    def find(self) -> tuple[Proc, ...]:
        """Its live processes, the root first; empty when none is there, or none can be seen from here."""

    async def standing(self) -> Standing:
        """Whether it runs, by the word of who owns it."""

    async def start(self, intent: str, resume: Resume) -> Outcome:
        """See that it runs, started once for this intent. The outcome has its processes."""

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """See that its whole tree, these processes included, is gone."""


class ProcessTrainer:
    """
    The trainer as the daemon's child, in a session of its own: it outlives the daemon and is found again.

    Args:
        run: what names the run on this machine.
        settings: the section `trainer` of the config.
        run_dir: where its guard finds the daemon.
        log: where its output goes.

    """

    def __init__(self, run: str, settings: LaunchSettings, run_dir: Path, log: Path) -> None:
        self._mark = run
        self._settings = settings
        self._run_dir = run_dir
        self._log = log
        self._children: list[subprocess.Popen[bytes]] = []
        self._known: tuple[Proc, ...] = ()

    def find(self) -> tuple[Proc, ...]:
        """By the tree that was known, and at a daemon's start by the mark in the environment."""
        self._known = proc.family(self._known) or proc.marked(TRAINER_MARK, self._mark)
        return self._known

    async def standing(self) -> Standing:
        """By its processes; the code of one that ended comes with the news of its end."""
        return Standing(running=bool(await asyncio.to_thread(self.find)))

    async def start(self, intent: str, resume: Resume) -> Outcome:
        """Start it, unless this intent already has."""
        ours = proc.marked(INTENT_MARK, f"{self._mark}/{intent}")
        if ours:
            self._known = ours
            return Outcome(ok=True, detail="found running", procs=ours)
        left = proc.marked(TRAINER_MARK, self._mark)
        if left:
            return failed(f"another trainer of this run lives: pid {left[0].pid}")
        try:
            child = self._spawn(intent, resume)
        except OSError as error:
            program = self._settings.command[0]
            why = f"{error.strerror or error}; check trainer.command and trainer.cwd"
            return failed(f"cannot start {program}: {why}")
        await asyncio.sleep(_EARLY_DEATH_S)
        if child.poll() is not None:
            return failed(f"it exited at once with code {child.returncode}; its log is {self._log}")
        self._known = proc.tree(child.pid)
        return Outcome(ok=True, detail=f"pid {child.pid}", procs=self._known)

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """End the tree and whatever carries our mark; in rounds: one told to end may still start another."""
        ended, grace_s = 0, self._settings.stop_timeout_s
        tree = self._whole(procs)
        for _ in range(_STOP_ROUNDS):
            left = await end(tree, grace_s=grace_s, timeout_s=_KILLED_WITHIN_S)
            self._reap()
            if left:
                return failed("pids " + ", ".join(str(one.pid) for one in left) + " survive SIGKILL")
            ended += len(tree)
            grace_s, tree = 0.0, self._whole(tree)
            if not tree:
                break
        self._known = ()
        return Outcome(ok=True, detail=f"{ended} processes ended")

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]

    def _whole(self, procs: tuple[Proc, ...]) -> tuple[Proc, ...]:
        roots = (*procs, *proc.marked(TRAINER_MARK, self._mark))
        return proc.trees({known.pid for known in roots if proc.unmistaken(known)})

    def _spawn(self, intent: str, resume: Resume) -> subprocess.Popen[bytes]:
        settings = self._settings
        environment = {**os.environ, RUN_DIR: str(self._run_dir), **settings.environment()}
        environment |= _resume_variables(resume)
        environment[TRAINER_MARK] = self._mark
        environment[INTENT_MARK] = f"{self._mark}/{intent}"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > LOG_BYTES_MAX:
            self._log.replace(self._log.with_suffix(self._log.suffix + ".1"))
        self._reap()
        with self._log.open("ab") as log:
            child = subprocess.Popen(
                [*settings.command, *_resume_arguments(settings, resume)],
                cwd=settings.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)
        return child


class SystemdTrainer:
    """
    The trainer as a systemd unit of its own; the daemon needs leave to start and stop it.

    What it is to resume from stands in `<run_dir>/resume.env`, for an `EnvironmentFile=-` of the unit.

    Args:
        settings: the section `trainer` of the config.
        run_dir: the run's folder.
        systemctl: the command, with the flags that say whose manager is meant.

    """

    def __init__(self, settings: LaunchSettings, run_dir: Path, systemctl: tuple[str, ...]) -> None:
        assert settings.unit is not None
        self._unit = settings.unit
        self._run_dir = run_dir
        self._systemctl = systemctl
        self._stop_timeout_s = settings.stop_timeout_s
        self._known: tuple[Proc, ...] = ()

    def find(self) -> tuple[Proc, ...]:
        """The processes of the unit's main process; systemd is asked for it only once it is gone."""
        self._known = proc.family(self._known) or _tree_of(
            *self._systemctl, "show", "--property=MainPID", "--value", self._unit
        )
        return self._known

    async def standing(self) -> Standing:
        """
        By the unit's own state.

        One that `systemctl stop` ended has the result "success", whatever signal it took.
        """
        names = "--property=ActiveState,Result,ExecMainStatus"
        answer = await ask(*self._systemctl, "show", names, self._unit, timeout_s=_ASK_TIMEOUT_S)
        if not answer.ok:
            return Standing(running=None)
        shown = dict(line.partition("=")[::2] for line in answer.out.splitlines())
        if shown.get("ActiveState") in {"active", "activating", "reloading", "deactivating"}:
            return Standing(running=True)
        if shown.get("Result") == "success":
            return Standing(running=False, code=0)
        code = shown.get("ExecMainStatus", "")
        return Standing(running=False, code=int(code) if code.isdecimal() else None)

    async def start(self, intent: str, resume: Resume) -> Outcome:
        """`systemctl start` is an ensure by itself: a unit that runs is left running."""
        del intent
        _write_resume_file(self._run_dir, resume)
        await ask(*self._systemctl, "reset-failed", self._unit, timeout_s=_ASK_TIMEOUT_S)
        answer = await self._ask("start")
        if not answer.ok:
            return failed(answer.trouble)
        procs = await asyncio.to_thread(self.find)
        return Outcome(ok=True, detail=f"systemctl start {self._unit}", procs=procs)

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """Stop the unit, then see that no process of the old tree is left."""
        answer = await self._ask("stop")
        if not answer.ok:
            return failed(answer.trouble)
        return await _swept(procs)

    async def _ask(self, verb: str) -> Answered:
        timeout_s = self._stop_timeout_s + _KILLED_WITHIN_S + 60.0
        command = (*self._systemctl, "--no-ask-password", verb, self._unit)
        answered = await ask(*command, timeout_s=timeout_s, shown=f"systemctl {verb} {self._unit}")
        return with_leave(answered, self._unit)


class DockerTrainer:
    """
    The trainer as a container that exists already; it is stopped and started, never made or removed.

    Args:
        settings: the section `trainer` of the config.
        run_dir: the run's folder; mounted into the container, it holds `resume.env`.

    """

    def __init__(self, settings: LaunchSettings, run_dir: Path) -> None:
        assert settings.container is not None
        self._container = settings.container
        self._run_dir = run_dir
        self._stop_timeout_s = settings.stop_timeout_s
        self._known: tuple[Proc, ...] = ()

    def find(self) -> tuple[Proc, ...]:
        """The processes of the container's first one, as they are seen from here."""
        self._known = proc.family(self._known) or _tree_of(
            "docker", "inspect", "--format", "{{.State.Pid}}", self._container
        )
        return self._known

    async def standing(self) -> Standing:
        """By docker's own state."""
        template = "{{.State.Running}} {{.State.ExitCode}}"
        answer = await ask(
            "docker", "inspect", "--format", template, self._container, timeout_s=_ASK_TIMEOUT_S
        )
        running, _, code = answer.out.partition(" ")
        if not answer.ok or running not in {"true", "false"}:
            return Standing(running=None)
        return Standing(running=running == "true", code=int(code) if code.isdecimal() else None)

    async def start(self, intent: str, resume: Resume) -> Outcome:
        """`docker start` leaves a container alone that runs."""
        del intent
        _write_resume_file(self._run_dir, resume)
        answer = await ask("docker", "start", self._container, timeout_s=4 * _ASK_TIMEOUT_S)
        if not answer.ok:
            return failed(answer.trouble)
        procs = await asyncio.to_thread(self.find)
        return Outcome(ok=True, detail=f"docker start {self._container}", procs=procs)

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """`docker stop`: TERM, the grace, KILL for all of the container."""
        grace = str(max(1, round(self._stop_timeout_s)))
        answer = await ask(
            *("docker", "stop", "--time", grace, self._container),
            timeout_s=self._stop_timeout_s + _KILLED_WITHIN_S,
        )
        return await _swept(procs) if answer.ok else failed(answer.trouble)


class RayTrainer:
    """
    The trainer as a Ray job, one submission for each intent.

    Args:
        run: what names the run; the submissions are called after it.
        settings: the section `trainer` of the config.
        run_dir: where its guard finds the daemon, on the node of the job's driver.

    """

    def __init__(self, run: str, settings: LaunchSettings, run_dir: Path) -> None:
        self._prefix = "stepguard-" + "".join(c if c.isalnum() else "-" for c in run)[-60:]
        self._settings = settings
        self._run_dir = run_dir
        self._job: str | None = None

    def find(self) -> tuple[Proc, ...]:
        """A job's driver runs on whatever node Ray chose: its processes are Ray's to know."""
        return ()

    async def standing(self) -> Standing:
        """By Ray's own word on the newest submission."""
        job = self._job or await self._newest()
        if job is None:
            return Standing(running=False)
        answer = await self._ray("status", job)
        words = answer.out.upper()
        if not answer.ok:
            return Standing(running=None)
        if "SUCCEEDED" in words:
            return Standing(running=False, code=0)
        if "STOPPED" in words:
            return Standing(running=False, code=-15)
        if "FAILED" in words:
            return Standing(running=False, code=1)
        return Standing(running=True)

    async def start(self, intent: str, resume: Resume) -> Outcome:
        """Submit the job under a name made of the intent: a second submission of it is refused by Ray."""
        settings, job = self._settings, f"{self._prefix}-{intent}"
        if (await self._ray("status", job)).ok:
            self._job = job
            return Outcome(ok=True, detail=f"found submitted as {job}")
        variables = {RUN_DIR: str(self._run_dir), **settings.environment(), **_resume_variables(resume)}
        answer = await self._ray(
            *("submit", "--no-wait", "--submission-id", job),
            *("--runtime-env-json", json.dumps({"env_vars": variables})),
            *("--", *settings.command, *_resume_arguments(settings, resume)),
        )
        if not answer.ok:
            return failed(answer.trouble)
        self._job = job
        return Outcome(ok=True, detail=f"submitted as {job}")

    async def stop(self, procs: tuple[Proc, ...]) -> Outcome:
        """`ray job stop`, and wait for Ray to say that it has ended."""
        del procs
        job = self._job or await self._newest()
        if job is None:
            return Outcome(ok=True, detail="no job was submitted")
        self._job = job
        if (await self.standing()).running is False:
            return Outcome(ok=True, detail=f"{job} had ended")
        answer = await self._ray("stop", job)
        left = (await self.standing()).running
        return (
            Outcome(ok=True, detail=f"{job} stopped")
            if left is False
            else failed(answer.trouble or "it runs")
        )

    async def _newest(self) -> str | None:
        """The newest submission of this run, for a daemon that was not there when it was made."""
        answer = await self._ray("list")
        names = {
            word.strip("'\",()")
            for word in answer.out.replace("=", " ").split()
            if self._prefix in word and answer.ok
        }
        numbered = [(name.removeprefix(self._prefix + "-").partition("-")[0], name) for name in names]
        known = sorted((int(number), name) for number, name in numbered if number.isdecimal())
        return known[-1][1] if known else None

    async def _ray(self, *arguments: str) -> Answered:
        address = self._settings.address
        where = () if address is None else ("--address", address)
        verb, *rest = arguments
        timeout_s = self._settings.stop_timeout_s + 2 * _ASK_TIMEOUT_S
        return await ask("ray", "job", verb, *where, *rest, timeout_s=timeout_s)


def trainer_backend(
    run: str, settings: LaunchSettings, *, run_dir: Path, log: Path, systemctl: tuple[str, ...]
) -> TrainerBackend | None:
    """The back-end that the config names; None where the trainer is somebody else's."""
    match settings.backend:
        case "process":
            return ProcessTrainer(run, settings, run_dir, log)
        case "systemd":
            return SystemdTrainer(settings, run_dir, systemctl)
        case "docker":
            return DockerTrainer(settings, run_dir)
        case "ray":
            return RayTrainer(run, settings, run_dir)
        case "none":
            return None


def _resume_variables(resume: Resume) -> dict[str, str]:
    if resume.step is None:
        return {}
    return {"STEPGUARD_RESUME_STEP": str(resume.step), "STEPGUARD_RESUME_PATH": resume.path or ""}


def _resume_arguments(settings: LaunchSettings, resume: Resume) -> list[str]:
    """The framework's own words for resuming, with the step and the path in their places."""
    if resume.step is None:
        return []
    return [
        argument.replace("{step}", str(resume.step)).replace("{path}", resume.path or "")
        for argument in settings.resume_args
    ]


def _write_resume_file(run_dir: Path, resume: Resume) -> None:
    lines = [f"{name}={json.dumps(value)}\n" for name, value in _resume_variables(resume).items()]
    (run_dir / RESUME_FILE).write_text("".join(lines))


def _tree_of(*command: str) -> tuple[Proc, ...]:
    """The tree of the pid that a command prints; empty where it prints none."""
    try:
        shown = subprocess.run(
            command, capture_output=True, timeout=_FIND_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    text = shown.stdout.strip()
    return proc.tree(int(text)) if text.isdigit() and int(text) > 0 else ()


async def _swept(procs: tuple[Proc, ...]) -> Outcome:
    """What is left of the old tree after its owner stopped it, and ended."""
    whole = proc.trees({known.pid for known in procs if proc.unmistaken(known)})
    left = await end(whole, grace_s=0.0, timeout_s=_KILLED_WITHIN_S)
    return failed(f"{len(left)} processes survive SIGKILL") if left else Outcome(ok=True, detail="stopped")
