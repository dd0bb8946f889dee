"""
Every setting of the daemon: its type, its bounds, its default and the words that explain it.

This is the one source of `config.toml`, `docs/configuration.md`, `stepguard config schema` and the checks at
start.
Nothing here reads a file: see `loading`.
"""

import itertools
import os
import re
import shutil
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from stepguard.settings import GuardSettings as GuardFile
from stepguardd.places import default_run_dir, default_state_dir


def _anchor(path: Path, info: ValidationInfo) -> Path:
    """A relative path in a file is relative to that file's folder, wherever the command was typed."""
    base = (info.context or {}).get("base", Path())
    return Path(os.path.abspath(base / path.expanduser()))  # noqa: PTH100 - resolve() would follow links


LocalPath = Annotated[Path, AfterValidator(_anchor)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Seconds = Annotated[float, Field(gt=0, le=30 * 86_400)]
Share = Annotated[float, Field(ge=0, le=1)]
MailAddress = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9._%+'-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})$")
]


def _named_secret(source: str, info: ValidationInfo) -> str:
    """A path or a credential's name; the secret itself, pasted here, is refused and not repeated."""
    if "://" in source or len(source) > 500 or any(not char.isprintable() for char in source):
        raise ValueError("must name a file or a credential; the secret itself does not belong here")
    if "/" in source or source.startswith("~"):
        return str(_anchor(Path(source), info))
    name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", source)
    if not name or re.fullmatch(r"[0-9a-fA-F]{32,}", source):  # W&B's keys are 40 such digits
        raise ValueError("must name a file or a credential; the secret itself does not belong here")
    return source


SecretSource = Annotated[str, AfterValidator(_named_secret)]


def _https(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or parts.password:
        raise ValueError("must look like https://host/path, without a password in it")
    return url.rstrip("/")


HttpAddress = Annotated[str, AfterValidator(_https)]


class Section(BaseModel):
    """A table of the configuration: it never changes once read, and knows no key but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSettings(Section):
    """The run that is watched, and how far Stepguard may go by itself."""

    name: Name = Field(
        default="run", description="The run's name: it appears in alerts and names the default folders."
    )
    run_dir: LocalPath = Field(
        default_factory=lambda data: default_run_dir(data.get("name", "run")),
        description="The gate page and the sockets. Local file system only. The trainer finds it through the "
        "environment variable STEPGUARD_RUN_DIR. By default /run/stepguard/<name> where that can be written, "
        "else $XDG_RUNTIME_DIR/stepguard/<name>, else stepguard-<uid>/<name> in the folder for temporary "
        "files.",
        examples=["/run/stepguard/run"],
    )
    state_dir: LocalPath = Field(
        default_factory=lambda data: default_state_dir(data.get("name", "run")),
        description="The journal and the servers' logs. By default /var/lib/stepguard/<name> where that can "
        "be written, else $XDG_STATE_HOME/stepguard/<name>, else ~/.local/state/stepguard/<name>.",
        examples=["/var/lib/stepguard/run"],
    )
    mode: Literal["shadow", "hold", "act"] = Field(
        default="hold",
        description='"shadow" only reports what it would have done. "hold" also holds the run before a bad '
        'optimizer step, and reports which restart or rollback it would have made. "act" does those as well.',
    )
    servers_on_stop: Literal["keep", "stop"] = Field(
        default="keep",
        description='What becomes of the servers with backend "process" when the daemon is stopped: "keep" '
        'leaves them running for the next daemon to take up again, "stop" ends them with it.',
    )
    drills: bool = Field(
        default=False,
        description="Whether `stepguard drill` may strike this run's servers. For staging runs alone.",
    )

    @model_validator(mode="after")
    def _sockets_fit(self) -> Self:
        """A Unix socket's address holds 107 bytes, and the kernel's own error would not say so."""
        longest = os.fsencode(self.run_dir / "control.sock")
        if len(longest) > 107:
            raise ValueError(
                f"run_dir is {len(longest) - 107} bytes too long for the sockets in it; choose a shorter one"
            )
        return self


_AGENTS_HANDS = frozenset({"process", "systemd", "docker", "none"})
_NEEDED_KEYS = {"systemd": "unit", "docker": "container", "ray": "actor", "http": "hook"}


class ServerSettings(Section):
    """
    One inference server. Repeat the table for several; a single one may also be written as `[server]`.

    Without any, Stepguard guards the reward stream and the trainer alone.
    """

    name: Name = Field(
        default="server", description="What alerts and commands call it. Unique within the run."
    )
    url: str = Field(
        description="Where it answers: scheme, host and port.",
        examples=["http://127.0.0.1:30000"],
    )
    backend: Literal["process", "systemd", "docker", "ray", "http", "trainer", "none"] = Field(
        default="process",
        description='Who starts it: "process" = Stepguard, as its own child, by `command`; "systemd" = '
        'the unit `unit`; "docker" = docker, the container `container`; "ray" = the trainer, once '
        'Stepguard has killed the actor `actor`; "http" = whoever answers at `hook`; "trainer" = the '
        'trainer, in whose processes it lives (verl), under the order RESYNC; "none" = somebody else: '
        "Stepguard watches it, holds the run when it fails, and never restarts it.",
    )
    node: Name | None = Field(
        default=None,
        description="The machine of `cluster.nodes` on which it runs: the agent there starts and ends it, as "
        "`backend` says, and watches its processes. By default it is the daemon's own machine, or nobody's.",
        examples=["node1"],
    )
    command: tuple[str, ...] = Field(
        default=(),
        description='The program and its arguments, for backend "process". No shell reads it. For backend '
        '"docker": what follows `docker run --name …`: options, the image, the server\'s arguments.',
        examples=[["python", "-m", "sglang.launch_server", "--model-path", "…", "--port", "30000"]],
    )
    cwd: LocalPath | None = Field(
        default=None,
        description="The folder in which the command runs. By default the daemon's own.",
        examples=["/srv/train"],
    )
    env: Mapping[str, SecretStr] = Field(
        default_factory=dict,
        description="Environment variables added for the command. Their values are never printed.",
        examples=[{"CUDA_VISIBLE_DEVICES": "0"}],
    )
    unit: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9:_.\\@-]+\.service$",
        description='The systemd unit, for backend "systemd".',
        examples=["sglang.service"],
    )
    container: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description='The container\'s name, for backend "docker". With `command` Stepguard makes it anew for '
        "each start; without, it is started and stopped as it is.",
        examples=["sglang"],
    )
    actor: str | None = Field(
        default=None,
        min_length=1,
        description='The name of the actor that holds the server, for backend "ray". Stepguard kills it; the '
        "trainer, or Ray, makes it again.",
        examples=["rollout-engine-0"],
    )
    ray_address: str = Field(
        default="auto",
        min_length=1,
        description='The Ray cluster, for backend "ray". "auto" is this machine\'s.',
    )
    ray_namespace: str = Field(
        default="default",
        min_length=1,
        description="The Ray namespace in which the actor has its name: what the trainer gives `ray.init` or "
        "the actor's `options`. Where it gives none, Ray makes one up anew for each job: then give one.",
    )
    hook: SecretStr | None = Field(
        default=None,
        description='The URL that is asked to stop and to start the server, for backend "http": a POST of '
        '{"action": "stop" or "start", "server", "intent", "arguments"}, answered 2xx when it is done. '
        "Never printed: it may carry a token.",
        examples=["https://cluster.internal/restart"],
    )
    log: LocalPath | None = Field(
        default=None,
        description="Where the command's output goes and is read for known signs of trouble. By default "
        "<state_dir>/servers/<name>.log.",
        examples=["/var/log/sglang.log"],
    )
    start_timeout_s: Seconds = Field(
        default=600, description="A server that is not serving this long after its start has failed to start."
    )
    stop_timeout_s: Seconds = Field(
        default=20, description="Between the polite SIGTERM to the whole process tree and the SIGKILL."
    )

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("must look like http://host:port")
        if parts.username or parts.password:
            raise ValueError("must not carry a password: this file is printed and pasted")
        if parts.query or parts.fragment:
            raise ValueError("must end after the port or a path")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _backend_has_its_key(self) -> Self:
        if self.backend == "process" and not self.command:
            raise ValueError('command is missing: backend "process" needs it (or set backend = "none")')
        for backend, key in _NEEDED_KEYS.items():
            if self.backend == backend and not getattr(self, key):
                raise ValueError(f'{key} is missing: backend "{backend}" needs it')
        if self.node is not None and self.backend not in _AGENTS_HANDS:
            raise ValueError(
                f"node goes with backend {', '.join(sorted(_AGENTS_HANDS))}: an agent has no part in "
                f'"{self.backend}"; leave node out'
            )
        if self.hook is not None and urlsplit(self.hook.get_secret_value()).scheme not in {"http", "https"}:
            raise ValueError("hook must begin with http:// or https://")
        return self

    def environment(self) -> dict[str, str]:
        """The variables of `env` with their values, for the one place that starts the server."""
        return {key: value.get_secret_value() for key, value in self.env.items()}


class ProbeSettings(Section):
    """
    How the servers are watched. Holding is cheap and quick; killing needs evidence that lasts.

    A process that exits is noticed at once, by the kernel's word, whatever stands here.
    """

    interval_s: Seconds = Field(default=1.0, description="Between two of the cheap probes of a server.")
    timeout_s: Seconds = Field(
        default=3.0, description="A cheap probe without an answer for this long has failed."
    )
    health_interval_s: Seconds = Field(
        default=30,
        description="A server that showed no token for this long is asked for one, by `/health_generate`, "
        "and no more often than that. Never while it is paused, updated or offloaded.",
    )
    health_timeout_s: Seconds = Field(
        default=25, description="A `/health_generate` without an answer for this long has failed."
    )
    stopped_after_s: Seconds = Field(
        default=0.5,
        description="How often /proc is read for a process that was stopped (SIGSTOP, a debugger).",
    )
    deadlock_after_s: Seconds = Field(
        default=8,
        description="Requests are waiting, no token came for this long, and no processor is busy: hold.",
    )
    spin_after_s: Seconds = Field(
        default=43,
        description="Requests are waiting, no token came for this long, and a processor is busy: hold.",
    )
    kill_after_s: Seconds = Field(
        default=60, description="Evidence against a living server must last this long before it is killed."
    )
    planned_lease_s: Seconds = Field(
        default=600,
        description="A pause, an offload or a weight update that was announced excuses a silent server for "
        "this long, never for ever.",
    )
    colocated: bool = Field(
        default=False,
        description="The servers share their GPUs with the trainer, which takes their memory between "
        'rollouts (always so with backend "trainer"). Then nothing that generates is sent to them but in the '
        "phase ROLLOUT of a trainer with the guard.",
    )

    @model_validator(mode="after")
    def _probes_do_not_overlap(self) -> Self:
        if self.health_interval_s < self.health_timeout_s:
            raise ValueError(
                f"health_interval_s ({self.health_interval_s:g}) must be at least health_timeout_s "
                f"({self.health_timeout_s:g}): two of these probes must never overlap"
            )
        return self


class GuardSettings(Section):
    """
    What the guard inside the trainer does by itself.

    The daemon writes these to <run_dir>/guard.json, from where the trainer reads them at its start.
    """

    max_failed_fraction: Share = Field(
        default=0.1, description="A batch with a larger share of failed rollouts is refused."
    )
    max_refused_batches: int = Field(
        default=3,
        ge=1,
        description="After this many refused batches in a row the trainer holds, daemon or not.",
    )
    verdict_timeout_s: Seconds = Field(
        default=0.25,
        description="Waiting longer than this for the daemon's verdict on a batch counts as a hold.",
    )
    orphan_hold_s: Seconds = Field(
        default=600, description="A hold without a living daemon ends after this long, by stopping the run."
    )
    on_daemon_lost: Literal["continue", "hold"] = Field(
        default="continue", description="What a trainer that was free to go does when the daemon is gone."
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="How many weight versions a rollout may lag behind; older ones count as failed. 0 for "
        "synchronous training.",
    )

    def for_trainer(self) -> GuardFile:
        """The same, as the trainer's package defines and writes them."""
        return GuardFile(**self.model_dump())


class LaunchSettings(Section):
    """
    The trainer, where Stepguard may end it and start it again. Else a dead one is told of, and no more.

    It resumes by its framework's own marker, which is moved to the newest proven checkpoint first.
    """

    backend: Literal["none", "process", "systemd", "docker", "ray"] = Field(
        default="none",
        description='Who starts it: "process" = Stepguard, as its own child, by `command`, for the first '
        'time too; "systemd" = the unit `unit`; "docker" = the container `container`; "ray" = Ray, as a job '
        'of `command`; "none" = somebody else.',
    )
    command: tuple[str, ...] = Field(
        default=(),
        description='The program and its arguments, for the backends "process" and "ray". No shell reads it.',
        examples=[["torchrun", "--nproc-per-node", "8", "train.py"]],
    )
    resume_args: tuple[str, ...] = Field(
        default=(),
        description="Added to `command` when it is started again, with {path} and {step} of the checkpoint "
        "in their places, for frameworks that want to be told. The environment variables "
        "STEPGUARD_RESUME_PATH and STEPGUARD_RESUME_STEP say the same; a unit or container finds them in "
        "<run_dir>/resume.env.",
        examples=[["--resume-from-checkpoint", "{path}"]],
    )
    cwd: LocalPath | None = Field(
        default=None,
        description="The folder in which the command runs. By default the daemon's own.",
        examples=["/srv/train"],
    )
    env: Mapping[str, SecretStr] = Field(
        default_factory=dict,
        description="Environment variables added for the command. Their values are never printed.",
        examples=[{"WANDB_MODE": "offline"}],
    )
    unit: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9:_.\\@-]+\.service$",
        description='The systemd unit, for backend "systemd". Leave its own Restart= off: Stepguard restarts '
        "it, from a checkpoint that is good.",
        examples=["stepguard-trainer@run.service"],
    )
    container: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description='The name of a container that exists, for backend "docker".',
        examples=["trainer"],
    )
    address: str | None = Field(
        default=None,
        min_length=1,
        description='Where Ray\'s job server answers, for backend "ray". By default what RAY_ADDRESS says.',
        examples=["http://127.0.0.1:8265"],
    )
    log: LocalPath | None = Field(
        default=None,
        description="Where the command's output goes. By default <state_dir>/trainer.log.",
        examples=["/var/log/trainer.log"],
    )
    on_stop: Literal["keep", "stop"] = Field(
        default="keep",
        description='What becomes of it when the daemon is stopped: "keep" leaves it running for the next '
        'daemon to take up again, "stop" ends it too.',
    )
    start_timeout_s: Seconds = Field(
        default=1800,
        description="A trainer whose guard is not heard of this long after its start has failed.",
    )
    stop_timeout_s: Seconds = Field(
        default=60, description="Between the polite SIGTERM to the whole process tree and the SIGKILL."
    )
    lost_rank_grace_s: Seconds = Field(
        default=30, description="When one rank of several has ended, the others have this long to end too."
    )
    request_timeout_s: float = Field(
        default=300,
        ge=0,
        le=30 * 86_400,
        description="After how long its HTTP client gives up a request to a server. A trainer without the "
        "guard is held by pausing its servers, for half of that at most; 0 never pauses them.",
    )
    stall_factor: float = Field(
        default=6,
        ge=2,
        le=100,
        description="Without any progress for so many times the median of how long its phase takes, the "
        "trainer is stalled. Needs the guard.",
    )
    stall_floor_s: Seconds = Field(default=1800, description="It is not stalled before this.")
    stall_ceiling_s: Seconds = Field(
        default=7200,
        description="It is stalled after this, whatever is usual; a phase that is not known yet has so long.",
    )
    relaunch_budget: int = Field(
        default=5, ge=1, description="Relaunches allowed within the window; the next locks the run out."
    )
    relaunch_window_s: Seconds = Field(default=21_600, description="The window.")
    relaunches_without_step: int = Field(
        default=3,
        ge=1,
        description="So many relaunches without an optimizer step between them, and the run is locked out.",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {
            "process": ("command", self.command),
            "ray": ("command", self.command),
            "systemd": ("unit", self.unit),
            "docker": ("container", self.container),
        }
        key, value = needed.get(self.backend, ("", "-"))
        if not value:
            raise ValueError(f'{key} is missing: backend "{self.backend}" needs it')
        return self

    def environment(self) -> dict[str, str]:
        """The variables, for the one place that starts the trainer."""
        return {key: value.get_secret_value() for key, value in self.env.items()}


class RewardSettings(Section):
    """How the reward stream is judged. The defaults learn the run's own level and spread."""

    metric: str = Field(
        default="auto",
        min_length=1,
        description='The metric that is the reward, or a pattern for its name ("*/reward/mean"). "auto" '
        "knows the names that the common trainers use.",
        examples=["grpo_actor/task_reward/avg"],
    )
    rollouts_per_step: int | None = Field(
        default=None,
        ge=1,
        description="How many rollouts one step averages. By default learned.",
        examples=[64],
    )
    false_alarm_steps: int = Field(
        default=1_000_000, ge=100, description="Hold a healthy run at most about once in this many steps."
    )
    warning_alarm_steps: int = Field(
        default=20_000, ge=100, description="Warn about a healthy run at most about once in this many steps."
    )
    zero_streak_warn: int = Field(
        default=5,
        ge=1,
        description="Warn after this many rewards of exactly zero in a row, however rare reward is.",
    )
    zero_streak_hold: int = Field(
        default=10, ge=1, description="Hold after this many, where zeros in a row are not this run's habit."
    )
    min_reward: float | None = Field(
        default=None,
        description="Hold when a step's reward is below this. By default no such floor.",
        examples=[0.05],
    )
    no_step_for_s: Seconds | None = Field(
        default=None,
        description="Warn when no step was finished for this long. By default learned from the run's own "
        "phases.",
        examples=[1800],
    )

    @model_validator(mode="after")
    def _warn_before_holding(self) -> Self:
        if self.zero_streak_hold < self.zero_streak_warn:
            raise ValueError(
                f"zero_streak_hold ({self.zero_streak_hold}) must be at least zero_streak_warn "
                f"({self.zero_streak_warn})"
            )
        return self


_STREAMS = ("wandb_dir", "jsonl", "path", "wandb_run")


class StreamSettings(Section):
    """Where else the reward can be read, for trainers without the guard."""

    wandb_dir: LocalPath | None = Field(
        default=None,
        description="A W&B run folder, or a folder of them (the newest is followed). It is read on this "
        "disk; no account or network is needed.",
        examples=["wandb"],
    )
    jsonl: LocalPath | None = Field(
        default=None,
        description="A file of JSON lines, where wandb_dir is not set: verl's file logger, prime-rl's "
        "metrics.jsonl, or what `stepguard shim` makes W&B's rows go to at once.",
        examples=["metrics.jsonl"],
    )
    path: LocalPath | None = Field(
        default=None,
        description="Where neither is set: a file or folder in any form that `stepguard stream` reads, "
        "TensorBoard event files, CSV and text logs among them. What it is shows by its content.",
        examples=["runs/tensorboard"],
    )
    pattern: str | None = Field(
        default=None,
        min_length=1,
        description="Where `path` is a text log: a regular expression with the group `value` and, where its "
        "lines have them, `metric` and `step`. By default the shapes of verl, slime, TRL and AReaL.",
        examples=[r"step (?P<step>\d+).* reward (?P<value>[-+.\w]+)"],
    )
    wandb_run: str | None = Field(
        default=None,
        pattern=r"^[^/\s]+/[^/\s]+/[^/\s]+$",
        description="Where none of these is set: a run on W&B's servers. The last resort, 15 s late at best. "
        "Needs wandb_secret.",
        examples=["entity/project/run_id"],
    )
    wandb_secret: SecretSource | None = Field(
        default=None,
        description="W&B's API key: a file of mode 0600, or the name of a systemd credential.",
        examples=["wandb-api-key"],
    )
    wandb_url: HttpAddress = Field(
        default="https://api.wandb.ai", description="The servers, where they are your own."
    )
    step_key: str | None = Field(
        default=None,
        min_length=1,
        description="The metric that counts steps. By default W&B's own counter, or in JSON lines the first "
        "usual name that is there.",
        examples=["train/global_step"],
    )

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if self.pattern is not None:
            if self.path is None:
                raise ValueError("path is missing: pattern is for the text log that it names")
            try:
                groups = re.compile(self.pattern).groupindex
            except re.error as wrong:
                raise ValueError(f"pattern is no regular expression: {wrong}") from None
            if "value" not in groups:
                raise ValueError("pattern needs a group (?P<value>…): what of the line is the number")
        if self.wandb_run is not None and self.wandb_secret is None:
            raise ValueError("wandb_secret is missing: wandb_run needs it")
        return self

    def named(self) -> tuple[str, ...]:
        """The keys that name a stream, the one that is followed first."""
        return tuple(key for key in _STREAMS if getattr(self, key) is not None)


class RecoverySettings(Section):
    """How a failed server is brought back, how often that is tried, and when a person is called instead."""

    restart_budget: int = Field(
        default=3, ge=0, description="Restarts allowed within the window; the next failure locks the run out."
    )
    restart_window_s: Seconds = Field(
        default=900,
        description="The window. Where this server was seen to take longer to start it is widened to budget "
        "× (start + kill_after_s) × 1.5, or one that never comes up would be restarted for ever.",
    )
    backoff_first_s: Seconds = Field(
        default=10, description="Wait before the second restart; doubles with each further one."
    )
    backoff_max_s: Seconds = Field(default=300, description="The longest such wait.")
    backoff_jitter: Share = Field(default=0.2, description="Random share added to each wait.")
    healthy_reset_s: Seconds = Field(
        default=600, description="After this long in health, with a step done, the waits start small again."
    )
    canary_requests: int = Field(
        default=4,
        ge=1,
        description="Real generations that a restarted server must answer before it is trusted.",
    )
    canary_timeout_s: Seconds = Field(default=60, description="Each of them must be answered within this.")
    probation_steps: int = Field(
        default=3,
        ge=1,
        description="Steps after a recovery during which any new trouble counts as a failed recovery.",
    )
    poison_steps: int = Field(
        default=3, ge=1, description="Optimizer steps taken on garbage before clean-up means a rollback."
    )
    on_policy_collapse: Literal["call", "rollback"] = Field(
        default="call",
        description='When the reward is gone while every server is well: "call" holds until a person '
        'decides, "rollback" also goes back to the newest proven checkpoint from before it, once.',
    )
    quorum: Share = Field(
        default=0.5,
        description="Of several servers, hold when fewer than this share is serving; else fence one off.",
    )
    cont_grace_s: Seconds = Field(
        default=3, description="A stopped process is first sent SIGCONT; it has this long to answer again."
    )
    locked_out_hold_s: Seconds = Field(
        default=1800,
        description="After this long locked out without an answer the trainer is told to save and stop.",
    )
    gpu_free_timeout_s: Seconds = Field(
        default=50,
        description="After a server was ended, its GPUs' memory may take this long to come back, before it "
        "is started all the same and a person told; unknown without NVML, and then nothing is waited for.",
    )
    resync_timeout_s: Seconds = Field(
        default=120, description="The restarted server must have the current weights within this."
    )
    save_timeout_s: Seconds = Field(
        default=600,
        description="How long a held trainer may take to save before a stop, or to load a checkpoint.",
    )

    @model_validator(mode="after")
    def _waits_grow(self) -> Self:
        if self.backoff_max_s < self.backoff_first_s:
            raise ValueError(
                f"backoff_max_s ({self.backoff_max_s:g}) must be at least backoff_first_s "
                f"({self.backoff_first_s:g})"
            )
        return self


class MemorySettings(Section):
    """
    What a server is given less of when it is restarted for want of memory: one rung at a time.

    The host's memory lowers the requests first, the GPU's at work both, and a start without room for the
    cache raises the fraction.
    """

    mem_fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
        min_length=1,
        description="The rungs of --mem-fraction-static, from the top; the first is only ever gone up to.",
    )
    running_requests: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(32, 16, 8), description="The rungs of --max-running-requests, from the top."
    )
    min_kv_tokens: int = Field(
        default=8192,
        ge=1,
        description="A rung must hold the weights and a KV cache of this many tokens, or it is refused.",
    )
    gpu_gib: float | None = Field(
        default=None,
        gt=0,
        description="The memory of one GPU in GiB, for that sum. Without it no rung is refused.",
        examples=[80],
    )
    step_up_after_s: float = Field(
        default=21_600,
        ge=0,
        description="After this long without a shortage the next restart for another cause goes one rung up "
        "again, once. 0: never.",
    )

    @model_validator(mode="after")
    def _from_the_top(self) -> Self:
        for key in ("mem_fractions", "running_requests"):
            rungs = getattr(self, key)
            if any(below >= above for above, below in itertools.pairwise(rungs)):
                raise ValueError(f"{key} must fall from rung to rung")
        return self


class WeightsSettings(Section):
    """How the current weights get back into a restarted server. A server without them is never resumed."""

    sync: Literal["disk", "nccl", "ipc", "none"] = Field(
        default="disk",
        description='How the trainer hands weights over. After a restart "disk" is pushed again by the '
        "daemon "
        '(see `path`) or by the trainer; "nccl" and "ipc" are rebuilt by the trainer\'s on_resync '
        "handler, and "
        'without one mean that the trainer is relaunched; "none": weights never change.',
    )
    path: str | None = Field(
        default=None,
        description="Where the weights of a version lie, with {version} in its place, or {version:06d} where "
        "numbers are written with leading zeros: then the daemon pushes them by itself. By default the "
        "trainer is asked to.",
        examples=["/srv/weights/{version}", "/srv/weights/weight_v{version:06d}"],
    )

    @field_validator("path")
    @classmethod
    def _only_version(cls, path: str | None) -> str | None:
        if path is None:
            return path
        rest, versions = re.subn(r"\{version(:0\d+d)?\}", "", path)
        if not versions or set(rest) & set("{}"):
            raise ValueError("must contain {version} or {version:06d}, and no other braces")
        return path


class CheckpointSettings(Section):
    """Where the trainer saves, and which checkpoints a rollback may use."""

    dir: LocalPath | None = Field(
        default=None,
        description="The folder of checkpoints. By default what the guard reports as saved.",
        examples=["checkpoints"],
    )
    framework: Literal[
        "auto",
        "verl",
        "slime",
        "miles",
        "areal",
        "trl",
        "openrlhf",
        "prime-rl",
        "skyrl",
        "nemo-rl",
        "roll",
        "dcp",
    ] = Field(default="auto", description='Whose layout the folder has. "auto" looks.')
    keep_proven: int = Field(
        default=2, ge=1, description="This many proven checkpoints are kept from being rotated away."
    )
    proven_after_steps: int = Field(
        default=5, ge=1, description="A checkpoint is proven by this many healthy steps after it."
    )
    vetting: Literal["full", "structure"] = Field(
        default="full",
        description='How far each saved checkpoint is read: "full" looks at every number and checksum, '
        '"structure" at the form of each file; the trainer\'s own norms then stand for its numbers.',
    )
    vetting_mib_per_s: int | None = Field(
        default=None,
        ge=1,
        description="The most that vetting reads from the disk. By default as fast as a niced process gets.",
        examples=[200],
    )
    pinned_gib_max: float = Field(
        default=1024,
        gt=0,
        description="The most that copies of proven checkpoints may take; hard links take nothing.",
    )


class ReportSettings(Section):
    """
    What is kept of each incident: a folder <state_dir>/incidents/<number> with the report.

    `stepguard report` shows it.
    """

    keep: int = Field(
        default=50, ge=1, description="So many incidents are kept; the oldest are deleted first."
    )
    total_mib: int = Field(
        default=1024, ge=16, description="All of them together take no more room than this, in MiB."
    )
    log_kib: int = Field(
        default=256, ge=8, le=65_536, description="Of each log so much is kept around an incident, in KiB."
    )
    decisions_mib: int = Field(
        default=32, ge=1, le=1024, description="The log of decisions ends at this size, in MiB."
    )
    stacks: bool = Field(
        default=True,
        description="Ask py-spy, where it is installed, for the stacks of a server or trainer that hangs. It "
        "does not stop the process for it.",
    )


class ControlSettings(Section):
    """Who may pause, resume and roll back over the socket in run_dir."""

    allowed_uids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        description="User ids allowed besides root and the daemon's own. The socket's group must let them in "
        "too.",
        examples=[[1000]],
    )


class WebSettings(Section):
    """
    The page, and the same API over TCP: for a browser on this machine, or through `ssh -L`.

    To change anything takes the run's token or the one-time link of `stepguard open`.
    """

    enabled: bool = Field(
        default=True, description="Whether there is a page. The control socket is always there."
    )
    listen: str = Field(
        default="127.0.0.1:8722",
        description="Address and port; port 0 takes a free one. Beyond this machine only with `tls_cert` and "
        "`tls_key`, and then reading needs the token as well.",
    )
    tls_cert: LocalPath | None = Field(
        default=None,
        description="The certificate, with its chain, as PEM.",
        examples=["/etc/ssl/stepguard.pem"],
    )
    tls_key: LocalPath | None = Field(
        default=None, description="The certificate's key, as PEM.", examples=["/etc/ssl/stepguard.key"]
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="Names beside localhost and the address itself under which a browser may call the page.",
        examples=[["node7.cluster.example"]],
    )
    token_file: LocalPath | None = Field(
        default=None,
        description="The token, for scripts. By default <state_dir>/web.token, made at the first start. Only "
        "its owner may read it.",
        examples=["/var/lib/stepguard/run/web.token"],
    )

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, listen: str) -> str:
        split_listen(listen)
        return listen

    @model_validator(mode="after")
    def _not_beyond_this_machine_in_the_clear(self) -> Self:
        host, _ = split_listen(self.listen)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise PydanticCustomError("value_error", "tls_cert and tls_key belong together: set both")
        if not host.is_loopback and self.tls_cert is None:
            raise PydanticCustomError(
                "value_error",
                "listen is beyond this machine: set tls_cert and tls_key, or use 127.0.0.1 and ssh -L",
            )
        return self


class ClusterSettings(Section):
    """
    Other machines of the run, each served by `stepguard agent`. See docs/cluster.md.

    An order reaches all of them before any rank goes on, and a machine that is lost holds the others.
    """

    listen: str | None = Field(
        default=None,
        description="Address and port at which the agents call this daemon. Every one of them has to hold "
        "the token; what is said can be read on the way.",
        examples=["10.0.0.1:8723"],
    )
    nodes: tuple[Name, ...] = Field(
        default=(),
        description="The names of the other machines; the run waits for all of them.",
        examples=[["node1", "node2"]],
    )
    trainer: Name | None = Field(
        default=None,
        description="The node on which the trainer's rank 0 runs. By default it runs on the daemon's own "
        "machine.",
        examples=["node1"],
    )
    token_file: LocalPath | None = Field(
        default=None,
        description="The token that agents have to hold. By default <state_dir>/cluster.token, made at the "
        "first start. Only its owner may read it.",
        examples=["/var/lib/stepguard/run/cluster.token"],
    )
    lost_after_s: Annotated[float, Field(ge=1, le=60)] = Field(
        default=4.0, description="A machine that is silent for so long is lost, and the run is held."
    )
    join_timeout_s: Seconds = Field(
        default=600.0,
        description="A machine that has not come so long after the daemon is lost, and people are told.",
    )

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, listen: str | None) -> str | None:
        if listen is not None:
            split_listen(listen)
        return listen

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if bool(self.nodes) != (self.listen is not None):
            raise PydanticCustomError("value_error", "listen and nodes belong together: set both")
        if len(set(self.nodes)) != len(self.nodes):
            raise PydanticCustomError("value_error", "nodes has one name twice; give each machine its own")
        if self.trainer is not None and self.trainer not in self.nodes:
            raise PydanticCustomError("value_error", "trainer must be one of cluster.nodes")
        return self


Level = Literal["info", "alert", "call"]
_LEVEL = (
    'What is sent there: "call" = a person is needed, "alert" = also every incident, "info" = also warnings '
    "and what people did."
)


class AlertsSettings(Section):
    """
    When people are told, on whatever channel is set below. See docs/alerts.md.

    A setting that ends in `_secret` never holds the secret: it names a file of mode 0600 by its path, or a
    systemd credential by its name.
    """

    repeat_s: Seconds = Field(
        default=14_400,
        description="An open incident is told again after this long, unless somebody acknowledged it.",
    )
    update_after_s: Seconds = Field(
        default=300,
        description="What is done about an incident is told at the latest after this long. Turning points "
        "(it goes on, it happened again, a person is needed, it is over) are told at once.",
    )
    quiet_hours: str | None = Field(
        default=None,
        pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$",
        description="From and to, in the machine's local time. In between only calls are sent; the rest "
        "follows afterwards, one message for each incident.",
        examples=["22:00-07:00"],
    )
    max_per_hour: int = Field(
        default=20,
        ge=1,
        le=1000,
        description="Messages to one channel. What is beyond is sent in one digest; calls may take as many "
        "again.",
    )
    page_url: HttpAddress | None = Field(
        default=None,
        description="The page's address as people reach it, for the link in messages.",
        examples=["http://127.0.0.1:8722"],
    )
    internal_hosts: tuple[str, ...] = Field(
        default=(),
        description="Hosts that alerts may reach at a private address and without TLS. All others must be "
        "public and speak TLS.",
        examples=[["mail.cluster.internal", "127.0.0.1"]],
    )
    proxy: HttpAddress | None = Field(
        default=None,
        description="An HTTP proxy for Slack, webhook and ping. The environment's proxies are not used.",
        examples=["http://proxy.internal:3128"],
    )
    ca_file: LocalPath | None = Field(
        default=None,
        description="Certificates to trust beside the machine's own, as PEM.",
        examples=["/etc/ssl/certs/our-ca.pem"],
    )
    dead_man_secret: SecretSource | None = Field(
        default=None,
        description="Where the address stands that is asked (GET) while the decision loop turns, as "
        "healthchecks.io and its kin want it: they call a person when the asking stops.",
        examples=["dead-man-url"],
    )
    dead_man_interval_s: Seconds = Field(default=60, description="Between two such pings.")


class SlackSettings(Section):
    """Slack: an incoming webhook, or a bot token, with which an incident is one thread with its curve."""

    webhook_secret: SecretSource | None = Field(
        default=None,
        description="Where the incoming webhook's address stands. Webhooks know no threads and no pictures.",
        examples=["slack-webhook"],
    )
    token_secret: SecretSource | None = Field(
        default=None,
        description="Where the bot's token stands (xoxb-…), with the scopes chat:write and files:write. It "
        "is used rather than the webhook where both are set.",
        examples=["slack-token"],
    )
    channel: str | None = Field(
        default=None,
        pattern=r"^[CGD][A-Z0-9]{2,20}$",
        description="The channel's id, for the bot; it must have been invited there.",
        examples=["C0123456789"],
    )
    api_url: HttpAddress = Field(default="https://slack.com/api", description="Where the bot's interface is.")
    min_level: Level = Field(default="info", description=_LEVEL)

    @model_validator(mode="after")
    def _has_a_channel(self) -> Self:
        if self.token_secret and not self.channel:
            raise ValueError("channel is missing: the bot must know where to write")
        return self


class EmailSettings(Section):
    """E-mail by SMTP: text, HTML and the reward's curve."""

    host: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._:-]{1,253}$",
        description="The mail server. Without one no mail is sent.",
        examples=["smtp.example.org"],
    )
    port: int | None = Field(
        default=None, ge=1, le=65535, description="By default 587, or 465 with TLS.", examples=[587]
    )
    security: Literal["starttls", "tls", "none"] = Field(
        default="starttls",
        description='"starttls" asks for TLS and takes nothing less, "tls" speaks it from the first byte, '
        '"none" is for hosts in alerts.internal_hosts.',
    )
    user: str | None = Field(default=None, description="For the login.", examples=["stepguard"])
    password_secret: SecretSource | None = Field(
        default=None, description="Where the password stands.", examples=["smtp-password"]
    )
    sender: MailAddress | None = Field(
        default=None, description="The mail's From.", examples=["stepguard@example.org"]
    )
    to: tuple[MailAddress, ...] = Field(
        default=(), description="Who gets it.", examples=[["oncall@example.org"]]
    )
    wait_s: Seconds = Field(
        default=60,
        description="The first mail of an incident waits this long: one that repairs itself is one mail and "
        "not three. A call is sent at once.",
    )
    min_level: Level = Field(default="alert", description=_LEVEL)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.host and not (self.sender and self.to):
            raise ValueError("sender and to are needed with host")
        if bool(self.user) != bool(self.password_secret):
            raise ValueError("user and password_secret belong together")
        if self.user and self.security == "none":
            raise ValueError(
                'security = "none" would show the password to the network; use "starttls" or "tls"'
            )
        return self


def split_listen(listen: str) -> tuple[IPv4Address | IPv6Address, int]:
    """
    Address and port of `web.listen`.

    Raises:
        PydanticCustomError: it is not an address with a port.

    """
    host, _, port = listen.rpartition(":")
    try:
        address = ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
        number = int(port)
    except ValueError:
        number, address = -1, ip_address("127.0.0.1")
    if not 0 <= number <= 65535:
        raise PydanticCustomError("value_error", 'must be an address and a port, like "127.0.0.1:8722"')
    return address, number


class WebhookSettings(Section):
    """Any service of your own: one JSON object for each message, signed."""

    url_secret: SecretSource | None = Field(
        default=None, description="Where the address stands.", examples=["webhook-url"]
    )
    signing_secret: SecretSource | None = Field(
        default=None,
        description="Where the key stands with which the body is signed (HMAC-SHA256, see docs/alerts.md).",
        examples=["webhook-key"],
    )
    min_level: Level = Field(default="info", description=_LEVEL)


class AppriseSettings(Section):
    """A hundred other services, by Apprise's addresses; needs the extra `apprise`."""

    urls_secret: SecretSource | None = Field(
        default=None, description="Where the addresses stand, one a line.", examples=["apprise-urls"]
    )
    min_level: Level = Field(default="alert", description=_LEVEL)


class Config(Section):
    """The whole configuration of one run's daemon."""

    run: RunSettings = Field(default_factory=RunSettings)
    servers: tuple[ServerSettings, ...] = ()
    probe: ProbeSettings = Field(default_factory=ProbeSettings)
    guard: GuardSettings = Field(default_factory=GuardSettings)
    reward: RewardSettings = Field(default_factory=RewardSettings)
    stream: StreamSettings = Field(default_factory=StreamSettings)
    recovery: RecoverySettings = Field(default_factory=RecoverySettings)
    memory: MemorySettings = Field(default_factory=MemorySettings)
    weights: WeightsSettings = Field(default_factory=WeightsSettings)
    checkpoints: CheckpointSettings = Field(default_factory=CheckpointSettings)
    reports: ReportSettings = Field(default_factory=ReportSettings)
    control: ControlSettings = Field(default_factory=ControlSettings)
    web: WebSettings = Field(default_factory=WebSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings, validate_default=True)
    trainer: LaunchSettings = Field(default_factory=LaunchSettings)
    alerts: AlertsSettings = Field(default_factory=AlertsSettings)
    slack: SlackSettings = Field(default_factory=SlackSettings)
    email: EmailSettings = Field(default_factory=EmailSettings)
    webhook: WebhookSettings = Field(default_factory=WebhookSettings)
    apprise: AppriseSettings = Field(default_factory=AppriseSettings)

    @field_validator("servers")
    @classmethod
    def _names_differ(cls, servers: tuple[ServerSettings, ...]) -> tuple[ServerSettings, ...]:
        names = [server.name for server in servers]
        for name in names:
            if names.count(name) > 1:
                raise PydanticCustomError("names", f"has two called {name!r}; give each a name of its own")
        return servers

    @field_validator("cluster")
    @classmethod
    def _servers_nodes_are_known(cls, cluster: ClusterSettings, info: ValidationInfo) -> ClusterSettings:
        for server in info.data.get("servers", ()):
            if server.node is not None and server.node not in cluster.nodes:
                raise PydanticCustomError(
                    "value_error", f"nodes has no {server.node!r}, where the server {server.name!r} is to be"
                )
        return cluster

    @field_validator("trainer")
    @classmethod
    def _trainer_is_in_reach(cls, trainer: LaunchSettings, info: ValidationInfo) -> LaunchSettings:
        node = getattr(info.data.get("cluster"), "trainer", None)
        if node is not None and trainer.backend in {"process", "systemd", "docker"}:
            raise PydanticCustomError(
                "value_error",
                f"backend {trainer.backend!r} would start it on the daemon's own machine, and cluster."
                f"trainer says {node!r}; leave one of them out, or run the daemon there",
            )
        return trainer

    def server_log(self, server: ServerSettings) -> Path:
        """Where this server's output goes."""
        return server.log or self.run.state_dir / "servers" / f"{server.name}.log"

    def trainer_log(self) -> Path:
        """Where the output of a trainer goes that Stepguard starts."""
        return self.trainer.log or self.run.state_dir / "trainer.log"


def warnings(config: Config) -> list[str]:
    """What is legal but will disappoint, each in one sentence that names the keys and a remedy."""
    found = []
    if not config.servers:
        found.append("servers: none is configured, so only the reward stream and the trainer are watched")
    probe = config.probe
    for server in config.servers:
        host = urlsplit(server.url).hostname
        if host in {"0.0.0.0", "::"}:  # noqa: S104 - it is refused, not bound
            found.append(
                f"servers.{server.name}.url: {host} is an address to listen on, not to call; use "
                f"127.0.0.1, and let "
                "the server listen there too: it has no passwords"
            )
        if server.backend == "process" and server.node is None and not _is_runnable(server):
            found.append(
                f"servers.{server.name}.command: {server.command[0]!r} is not found or may not be executed"
            )
    if probe.kill_after_s < max(probe.deadlock_after_s, probe.spin_after_s):
        found.append(
            "probe.kill_after_s is shorter than deadlock_after_s or spin_after_s: a server would be killed "
            "as soon as it is suspected"
        )
    return found


def _is_runnable(server: ServerSettings) -> bool:
    """Whether the program is there now, looked for as the start will look for it."""
    program = server.command[0]
    if "/" in program:
        program = str((server.cwd or Path()) / program)
    return shutil.which(program, path=server.environment().get("PATH")) is not None
