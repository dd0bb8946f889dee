"""
One run of the demo, from its folders to its figures.

Every process belongs to the demo and is ended by it, by pid, however the run ends: a daemon that was told to
stop its server, a trainer, and where the fault asks for it a supervisor that stands for somebody else's.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from stepguard_grpo import ground_truth
from stepguard_grpo.ground_truth import TruthRecord
from stepguard_grpo.model import write_base_model

from .. import proc
from ..control.client import ControlClient, ControlError, NoDaemonError
from ..control.contract import SOCKET_NAME
from ..core.events import Proc
from ..effects.backends.process import SERVER_MARK
from .faults import (
    INSIDE_THE_TRAINER,
    PAUSE_S,
    Fault,
    PauseMode,
    Scenario,
    continue_generation,
    grader_of,
    load_weights,
    pause_generation,
    strike,
    strike_rollouts,
)
from .outcome import STOOD_STILL, Figures, figures
from .servers import ServerKind, ServerMissingError, ServerProgram, server_program
from .shortage import Shortage, shortage
from .supervisor import Supervisor, end_trees, rooted_at

SERVER: Final = "sglang"
POLL_S: Final = 0.1
END_TIMEOUT_S: Final = 15.0
UNGUARDED_AFTER_FAULT_S: Final = 60.0
STOOD_STILL_S: Final = 20.0
GRADERS: Final = 4
RANKS: Final = 2
_INSIDE_FLAGS: Final = {
    Fault.TRAJECTORY: "--raise-in-rollout",
    Fault.NAN: "--nan-at",
    Fault.RANK: "--die-at",
    Fault.POLICY: "--ruin-at",
    Fault.POISON: "--poison-at",
}
RISEN: Final = 0.7
RISEN_STEPS: Final = 5
LATEST_FAULT: Final = 0.6
EARLIEST_FAULT: Final = 0.35


class DemoError(Exception):
    """The demo cannot go on; the message is one line that says what to look at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run to conduct."""

    scenario: Scenario
    root: Path
    guarded: bool
    steps: int
    seed: int
    fault_step: int | None = None
    server: ServerKind = ServerKind.EMBEDDED
    pause_mode: PauseMode = PauseMode.IN_PLACE


@dataclass(slots=True, kw_only=True)
class Progress:
    """How the run is, for whoever draws it. Changed in place between two looks."""

    plan: Plan
    records: list[TruthRecord] = field(default_factory=list)
    status: Mapping[str, Any] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    fault_step: int | None = None
    struck_at: float | None = None
    began: float = field(default_factory=time.monotonic)


def conduct(plan: Plan, look: Callable[[Progress], None]) -> tuple[Progress, Figures]:
    """
    Run it to its end.

    Args:
        plan: which run.
        look: called about ten times a second with how the run is.

    Raises:
        DemoError: a part did not come up; KeyboardInterrupt passes, with every process ended.

    """
    progress = Progress(plan=plan)
    with Arena(plan) as arena:
        incidents: list[Mapping[str, Any]] = []
        for _ in arena.trainer_lives():
            progress.records = ground_truth.read(arena.run_root / "ground_truth.jsonl")
            arena.watch(progress, incidents)
            arena.maybe_strike(progress)
            look(progress)
            if arena.long_enough(progress):
                break
        arena.settle(progress, incidents, look)
        progress.records = ground_truth.read(arena.run_root / "ground_truth.jsonl")
        died = arena.how_it_died()
        look(progress)
    return progress, figures(
        progress.records,
        incidents=incidents,
        struck_at=progress.struck_at,
        fault_step=progress.fault_step,
        died=died,
    )


class Arena:
    """
    The folders and processes of one run. Leaving it ends them all.

    Args:
        plan: which run.
        daemon_environment: variables for the daemon, beside the demo's own.

    """

    def __init__(self, plan: Plan, daemon_environment: Mapping[str, str] | None = None) -> None:
        self._daemon_environment = dict(daemon_environment or {})
        self.daemon: subprocess.Popen[bytes] | None = None
        self._plan = plan
        self._scenario = plan.scenario
        self.root = plan.root
        self.run_root = plan.root / "run"
        self.run_dir: Path | None = None
        self._stack = ExitStack()
        self._port = _free_port()
        # A server is found again by its run's name: two demos at a time must not find each other's.
        self._name = f"demo-{self._port}"
        self.url = f"http://127.0.0.1:{self._port}"
        self._program = _program(plan.server)
        self._continue_at: float | None = None
        self._trainer: subprocess.Popen[bytes] | None = None
        self._trainer_pid: int | None = None
        self._client: ControlClient | None = None
        self._supervisor: Supervisor | None = None
        self._server_pid: int | None = None
        self._relapsed = False
        self._on_probation_at: int | None = None
        self._shortage: Shortage | None = None
        self._committed, self._committed_at = 0, 0.0
        self._stood_still = False
        self._seen_actions = 0
        self._seen_incident: object = None

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # ---- building ------------------------------------------------------------------------------------

    def _build(self) -> None:
        self.run_root.mkdir(parents=True, exist_ok=True)
        write_base_model(self.run_root / "base", self._plan.seed)
        scenario = self._scenario
        if scenario.fault is Fault.OOM:
            self._shortage = shortage(self._name, self.root)
            self._stack.callback(self._shortage.close)
        if not self._plan.guarded or scenario.supervised:
            self._supervisor = Supervisor(
                self._server_command(),
                self.root / "server.log",
                restart=scenario.supervised,
                environment=self._program.environment,
            )
            self._stack.callback(self._supervisor.stop)
            self._supervisor.start()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        environment.pop("STEPGUARD_RUN_DIR", None)
        if self._plan.guarded:
            # Short and local: a Unix socket's path holds 107 bytes.
            run_dir = self.run_dir = Path(tempfile.mkdtemp(prefix="stepguard-demo-"))
            self._stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
            self._stack.callback(self._end_server)
            self._start_daemon()
            environment["STEPGUARD_RUN_DIR"] = str(run_dir)
        else:
            self._await_server(lambda: proc.port_taken(self._port))
        if self._shortage is not None:
            self._shortage.ready()
        if not self._relaunched:
            self._trainer = self._spawn(self._trainer_command(), "trainer.log", environment)

    @property
    def _relaunched(self) -> bool:
        """Whether the daemon starts the trainer: only then can it start it again."""
        return self._plan.guarded and self._scenario.fault in {Fault.TRAINER, Fault.RANK}

    def _server_command(self) -> list[str]:
        command = self._program.command(self.run_root / "base", self._port)
        return command if self._shortage is None else self._shortage.command(command)

    def _trainer_command(self) -> list[str]:
        plan, scenario = self._plan, self._scenario
        ranks = ["ranks", str(RANKS)] if scenario.fault is Fault.RANK else ["train"]
        command = [sys.executable, "-m", f"stepguard_grpo.{ranks[0]}", *ranks[1:]]
        command += ["--server-url", self.url, "--run-root", str(self.run_root)]
        command += ["--steps", str(plan.steps), "--seed", str(plan.seed)]
        command += ["--resume" if self._relaunched else "--no-resume"]
        command += ["--weight-sync", self._weight_sync]
        command += ["--failures", scenario.failures if plan.guarded else "zero"]
        command += ["--guard" if plan.guarded else "--no-guard"]
        if scenario.fault is Fault.HANG:
            command += ["--request-timeout-s", "5"]
        if scenario.fault is Fault.ACTOR:
            command += ["--graders", str(GRADERS)]
        if scenario.fault is Fault.PAUSE:
            command += ["--request-timeout-s", str(4 * PAUSE_S)]
        flag = _INSIDE_FLAGS.get(scenario.fault)
        if flag is not None and plan.fault_step is not None:
            # The others spoil the step itself; this one keeps its batch from becoming a step.
            command += [flag, str(plan.fault_step + (scenario.fault is Fault.POISON))]
        return command

    @property
    def _weight_sync(self) -> str:
        """A real server's group wants NCCL: there the trainer pushes over disk instead."""
        return "disk" if self._program.kind is ServerKind.SGLANG else self._scenario.weight_sync

    def _start_daemon(self) -> None:
        assert self.run_dir is not None
        (self.root / "config.toml").write_text(self._config(self.run_dir))
        self._client = ControlClient(self.run_dir / SOCKET_NAME, timeout_s=2.0)
        self._stack.callback(self._client.__exit__, None, None, None)
        self.restart_daemon(self._daemon_environment)

        def serving() -> bool:
            if self.daemon is None or self.daemon.poll() is not None:
                raise DemoError(f"the daemon did not start; see {self.root / 'daemon.log'}")
            servers = self.status().get("servers") or [{}]
            return bool(servers[0].get("state") == "serving")

        self._await_server(serving)

    def _end_server(self) -> None:
        """What a daemon that did not end by itself, or was killed, left of its server."""
        end_trees(proc.marked(SERVER_MARK, f"{self._name}/{SERVER}"))

    def restart_daemon(self, environment: Mapping[str, str] | None = None) -> None:
        """Start a daemon on this run; the one before must have ended."""
        config = str(self.root / "config.toml")
        command = [sys.executable, "-m", "stepguardd", "run", "--config", config]
        self.daemon = self._spawn(command, "daemon.log", {**os.environ, **(environment or {})})

    def _config(self, run_dir: Path) -> str:
        weights = self.run_root / "weights" / "{version}"
        backend = "none" if self._scenario.supervised else "process"
        lines = [
            "[run]",
            f'name = "{self._name}"',
            f"run_dir = {json.dumps(str(run_dir))}",
            f"state_dir = {json.dumps(str(self.root / 'state'))}",
            'mode = "act"',
            'servers_on_stop = "stop"',
            "[server]",
            f'name = "{SERVER}"',
            f'url = "{self.url}"',
            f'backend = "{backend}"',
        ]
        if backend == "process":
            lines.append(f"command = {json.dumps(self._server_command())}")
            lines.append(f"log = {json.dumps(str(self.root / 'server.log'))}")
            variables = self._program.environment.items()
            lines.append(
                f"env = {{ {', '.join(f'{name} = {json.dumps(value)}' for name, value in variables)} }}"
            )
            lines.append(f"start_timeout_s = {self._program.start_timeout_s}")
        lines += ["[checkpoints]", f"dir = {json.dumps(str(self.run_root / 'checkpoints'))}"]
        lines += ["[stream]", f"wandb_dir = {json.dumps(str(self.run_root / 'wandb'))}"]
        lines += ["[web]", 'listen = "127.0.0.1:0"']
        lines += ["[weights]"]
        if self._relaunched:
            lines = [*lines[:-1], *self._launch_lines(), lines[-1]]
        if self._scenario.weight_sync != "disk":
            # Only the trainer can give a restarted server its weights.
            lines += ['sync = "nccl"']
        else:
            lines += ['sync = "disk"', f"path = {json.dumps(str(weights))}"]
        lines += ["[recovery]", 'on_policy_collapse = "rollback"']
        lines += [f"probation_steps = {self._scenario.probation_steps}", "backoff_first_s = 2.0"]
        return "\n".join(lines) + "\n"

    def _launch_lines(self) -> list[str]:
        return [
            "[trainer]",
            'backend = "process"',
            f"command = {json.dumps(self._trainer_command())}",
            f"log = {json.dumps(str(self.root / 'trainer.log'))}",
            f"cwd = {json.dumps(str(self.root))}",
            'env = { OMP_NUM_THREADS = "1", WANDB_MODE = "offline" }',
            'on_stop = "stop"',
        ]

    def _spawn(self, command: list[str], log: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self.root / log).open("ab") as out:
            # A session of its own: Ctrl-C is for the demo, which then ends the others in order.
            child = subprocess.Popen(
                command,
                env=environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._stack.callback(_end, child, rooted_at(child))
        return child

    def _await_server(self, up: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._program.start_timeout_s
        while not up():
            if time.monotonic() > deadline:
                raise DemoError(f"the server did not come up; see {self.root / 'server.log'}")
            time.sleep(POLL_S)

    # ---- watching ------------------------------------------------------------------------------------

    def trainer_lives(self) -> Iterator[None]:
        """One turn about ten times a second for as long as the trainer runs."""
        while self._trainer_lives():
            yield
            time.sleep(POLL_S)

    def _trainer_lives(self) -> bool:
        if self._trainer is not None:
            return self._trainer.poll() is None
        trainer = self.status().get("trainer") or {}
        return trainer.get("left") not in {"finished", "stopped"}

    def watch(self, progress: Progress, incidents: list[Mapping[str, Any]]) -> None:
        """Take in the daemon's status: its state, its incidents, and what it says it did."""
        status = self.status()
        if not status:
            return
        progress.status = status
        servers = status.get("servers") or []
        self._server_pid = servers[0].get("pid") if servers else None
        self._trainer_pid = (status.get("trainer") or {}).get("pid")
        for key in ("last_incident", "incident"):
            incident = status.get(key)
            if incident is None:
                continue
            known = [old.get("id") for old in incidents]
            if incident.get("id") in known:
                incidents[known.index(incident.get("id"))] = incident
            else:
                incidents.append(incident)
                self._seen_actions = 0
            self._tell(progress, incident)

    def _tell(self, progress: Progress, incident: Mapping[str, Any]) -> None:
        if incident.get("id") != self._seen_incident:
            self._seen_incident, self._seen_actions = incident.get("id"), 0
        actions = list(incident.get("actions") or ())
        progress.events.extend(actions[self._seen_actions :])
        self._seen_actions = max(self._seen_actions, len(actions))

    def status(self) -> Mapping[str, Any]:
        """What the daemon says of the run; empty where none answers."""
        if self._client is None:
            return {}
        try:
            return self._client.status()
        except (NoDaemonError, ControlError):
            return {}

    def maybe_strike(self, progress: Progress) -> None:
        """Inject the fault once the reward has risen, or at the step that the other run chose."""
        fault = self._scenario.fault
        self._maybe_continue(progress)
        self._maybe_strike_again(progress)
        if progress.fault_step is not None or fault is Fault.NONE or not progress.records:
            return
        step = progress.records[-1].step
        if fault in INSIDE_THE_TRAINER:
            if self._plan.fault_step is not None and step >= self._plan.fault_step:
                progress.fault_step = self._plan.fault_step
                progress.events.append(f"fault: {self._scenario.story}, at step {self._plan.fault_step}")
            return
        if not self._due(progress, step):
            return
        pid = self._server_pid if self._supervisor is None else self._supervisor.pid
        if fault in {Fault.TRAINER, Fault.ACTOR}:
            pid = self._trainer_pid if self._trainer is None else self._trainer.pid
        if pid is None:
            return
        if self._shortage is not None:
            at = time.monotonic()
            if not self._shortage.begin():
                return
            progress.struck_at = at
        elif fault is Fault.PAUSE:
            progress.struck_at = pause_generation(self.url, self._plan.pause_mode.value)
            self._continue_at = progress.struck_at + PAUSE_S
        elif fault is Fault.WEIGHTS:
            progress.struck_at = load_weights(self.url, self.run_root / "base", "base")
        elif fault is Fault.ZEROS:
            progress.struck_at = strike_rollouts(fault, pid, self.url)
        elif fault is Fault.ACTOR:
            progress.struck_at = self._stop_grader(pid)
        else:
            progress.struck_at = strike(fault, pid)
        if progress.struck_at is None:
            return  # between two rollouts: another look finds some
        progress.fault_step = step
        progress.events.append(f"fault: {self._scenario.story}, after step {step}")
        if self._shortage is not None:
            progress.events.append(f"that is {self._shortage.kind}")

    def _stop_grader(self, trainer: int) -> float:
        """Stop one of the processes that grade; whoever leaves it stopped, it ends with the demo."""
        grader = os.pidfd_open(grader_of(trainer))
        self._stack.callback(_kill, grader)
        at = time.monotonic()
        signal.pidfd_send_signal(grader, signal.SIGSTOP)
        return at

    def _maybe_continue(self, progress: Progress) -> None:
        """End the pause when its time has come."""
        if self._continue_at is not None and time.monotonic() >= self._continue_at:
            self._continue_at = None
            continue_generation(self.url)
            progress.events.append("the server was told to continue")

    def _maybe_strike_again(self, progress: Progress) -> None:
        """
        A relapse: the same once more, after a good step on probation.

        Before one, the same prompts would be in flight at both deaths: that starts a hunt for poison.
        """
        if self._scenario.fault is not Fault.RELAPSE or self._relapsed or self._server_pid is None:
            return
        phase = (progress.status.get("breaker") or {}).get("phase")
        if progress.struck_at is None or phase != "half_open" or not progress.records:
            return
        step = progress.records[-1].step
        self._on_probation_at = step if self._on_probation_at is None else self._on_probation_at
        if step > self._on_probation_at:
            self._relapsed = True
            strike(Fault.RELAPSE, self._server_pid)
            progress.events.append("fault: SIGKILL again, on probation")

    def _due(self, progress: Progress, step: int) -> bool:
        if self._plan.fault_step is not None:
            return step >= self._plan.fault_step
        steps = self._plan.steps
        recent = [record.reward_mean_true or 0.0 for record in progress.records[-RISEN_STEPS:]]
        risen = len(recent) == RISEN_STEPS and sum(recent) / RISEN_STEPS >= RISEN
        return (risen and step >= EARLIEST_FAULT * steps) or step >= LATEST_FAULT * steps

    def long_enough(self, progress: Progress) -> bool:
        """
        What would never end by itself: a run that is locked out, and an unguarded one that hangs.

        A minute of the latter, or less without a single step, shows what there is to see.
        """
        if self._plan.guarded:
            return (progress.status.get("breaker") or {}).get("phase") == "locked_out"
        if progress.struck_at is None:
            return False
        if len(progress.records) != self._committed:
            self._committed, self._committed_at = len(progress.records), time.monotonic()
        elif time.monotonic() - self._committed_at > STOOD_STILL_S:
            self._stood_still = True
            return True
        return time.monotonic() - progress.struck_at > UNGUARDED_AFTER_FAULT_S

    def settle(
        self, progress: Progress, incidents: list[Mapping[str, Any]], look: Callable[[Progress], None]
    ) -> None:
        """One last look at the daemon, after the trainer's last report."""
        time.sleep(2 * POLL_S)
        self.watch(progress, incidents)
        look(progress)

    def how_it_died(self) -> str | None:
        """The error that ended the trainer; None when it ended by itself or was cut short by the demo."""
        if self._trainer is None:
            return None if self._finished() else f"see {self.root / 'trainer.log'}"
        if self._stood_still:
            return f"{STOOD_STILL}, and would for ever: the demo ended it"
        code = self._trainer.poll()
        if code in {None, 0}:
            return None
        with suppress(OSError, ValueError):
            record = json.loads((self.run_root / "run_record.json").read_text())
            return str(record.get("error") or f"exit code {code}")
        return f"exit code {code}; see {self.root / 'trainer.log'}"

    def _finished(self) -> bool:
        with suppress(OSError, ValueError):
            record = json.loads((self.run_root / "run_record.json").read_text())
            return bool(record.get("outcome") == "finished")
        return False


def _program(kind: ServerKind) -> ServerProgram:
    try:
        return server_program(kind)
    except ServerMissingError as error:
        raise DemoError(f"--server {kind.value}: {error}") from None


def _end(child: subprocess.Popen[bytes], root: Proc) -> None:
    """
    TERM, a while, KILL; then what it leaves: W&B's own process ends a second or two after its trainer.

    That process may be in a session of its own, with no tie to the trainer once the trainer is dead, so who
    belongs to the child is looked up while it lives.
    """
    known = proc.tree(child.pid) if proc.alive(root) else ()
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
    child.wait(END_TIMEOUT_S)
    end_trees([root, *known])


def _kill(pidfd: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
