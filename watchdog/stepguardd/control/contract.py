"""What can be asked of a running daemon and what it answers. Both ends of the control socket share this."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

if TYPE_CHECKING:
    from stepguardd.chronicle.chronicle import Chronicle
    from stepguardd.web.reading import CheckpointDict

SOCKET_NAME = "control.sock"
REPLY_BYTES_MAX = 1 << 20
REQUEST_BYTES_MAX = 64 << 10

Verb = Literal["pause", "resume", "rollback", "restart-server", "ack", "mode", "plan-server"]


class Refused(Exception):  # noqa: N818 - a refusal is an answer, not a fault
    """The daemon understood and will not do it now. The message tells a person why, in one line."""


class Daemon(Protocol):
    """The daemon as the control API sees it."""

    @property
    def chronicle(self) -> "Chronicle":
        """What the run has been through."""
        ...

    def checkpoints(self) -> "Sequence[CheckpointDict]":
        """The checkpoints that are known, in ascending order of attempt and step."""
        ...

    def quiet_s(self) -> float:
        """Since the decision loop decided last."""
        ...

    def status(self) -> Mapping[str, object]:
        """How the run is now, as a `StatusDict`. Cheap; called from the daemon's loop at any time."""
        ...

    async def ask(self, verb: Verb, who: str, why: str, args: Mapping[str, object]) -> Mapping[str, object]:
        """
        Take in a person's wish; return as soon as it is accepted and durable, not when it is done.

        Args:
            verb: What is wanted.
            who: The caller, as the kernel vouches for them: "root (uid 0, pid 4711)".
            why: The reason they gave; may be empty.
            args: rollback: {"before_step": int | None}; restart-server: {"server": str | None};
                plan-server: {"server": str | None, "for_s": float};
                ack: {"incident": str | None}; mode: {"mode": "shadow" | "hold" | "act"}; else empty.

        Returns:
            JSON-able facts for the caller; a "message" among them is shown to a person.

        Raises:
            Refused: it cannot be done now.

        """
        ...


class BreakerDict(TypedDict, total=False):
    """The breaker: its phase by name, for how long, and the reason code that led there."""

    phase: str
    since_s: float
    reason: str | None


class GateDict(TypedDict, total=False):
    """The order on the gate page."""

    order: str
    generation: int
    reason: str


class TrainerDict(TypedDict, total=False):
    """The trainer as its page and its reports show it; null is unknown."""

    alive: bool | None
    step: int | None
    attempt: int
    phase: str
    reward: float | None
    weight_version: str | None
    beat_age_s: float | None


class ServerDict(TypedDict, total=False):
    """One inference server, with its processes that are stopped, or wait in the kernel for long (state D)."""

    name: str
    url: str
    node: str | None
    state: str
    since_s: float
    pid: int | None
    weight_version: str | None
    stage: str | None
    restarts: int
    stopped: list[int]
    stuck_in_kernel: list[int]


class IncidentDict(TypedDict, total=False):
    """An incident: `stage` is held, probation or closed; `actions` what was done, in order."""

    id: int
    cause: str
    server: str | None
    onset_step: int | None
    opened_s: float
    held_s: float
    stage: str
    known_to: str | None
    actions: list[str]


class SavedDict(TypedDict, total=False):
    """One checkpoint of the ledger; `proven` ones may be gone back to."""

    step: int
    attempt: int
    path: str
    verdict: str
    reason: str
    healthy_steps: int
    proven: bool
    inside_incident: bool
    set_aside: bool
    gone: bool
    pinned: str | None


class BudgetDict(TypedDict, total=False):
    """What may still be tried without a person."""

    restarts_left: int | None


class GpuDict(TypedDict, total=False):
    """One GPU; null is unknown."""

    index: int
    used_bytes: int | None
    total_bytes: int | None
    lost: bool
    mig: bool | None
    busy_percent: int | None
    temperature_c: int | None
    power_w: float | None
    throttled_by: list[str] | None
    ecc_uncorrected: int | None


class PressureDict(TypedDict):
    """PSI: the percentage of the last 10 s in which some, or all, processes waited for memory."""

    some_10s: float
    full_10s: float
    short: bool


class HostDict(TypedDict, total=False):
    """The machine's memory; `oom_kills` counts the kernel's kills that were seen. Null is unknown."""

    available_bytes: int | None
    total_bytes: int | None
    oom_kills: int | None
    pressure: PressureDict | None


class OomSeenDict(TypedDict):
    """Memory that ran out: whose, how much of it (held, or asked for in vain), where, and how long ago."""

    kind: str
    role: str
    server: str | None
    pid: int | None
    name: str | None
    used_bytes: int | None
    cgroup: str | None
    gpu: int | None
    age_s: float


class OomDict(TypedDict, total=False):
    """One source of news about memory: how often since the daemon began (null: it cannot be seen)."""

    count: int | None
    newest: OomSeenDict | None


class LogDict(TypedDict, total=False):
    """
    A log that is followed; `server` is null for the trainer's.

    `trouble` says why it is not read. `lines` counts those that meant something; `sign`, `line` and `age_s`
    are the newest such, where one is remembered. `dropped_bytes` came too fast to be read.
    """

    server: str | None
    path: str
    trouble: str | None
    lines: int
    dropped_bytes: int
    sign: str
    line: str
    age_s: float


class StreamDict(TypedDict, total=False):
    """
    The reward stream that is followed beside the guard; null is unknown.

    `age_s` is the time since a step came, `trouble` says why nothing can be read now.
    """

    path: str
    metric: str | None
    step: int | None
    reward: float | str | None
    age_s: float | None
    trouble: str | None


class PromptsDict(TypedDict):
    """
    Prompts that are suspected of killing a server, and those that are withheld.

    `suspected` were in flight at each of so many `crashes`; `suspects` are the first 16 of them, by their
    keys. `withheld` stand in the run's file `quarantine`; `quarantine` are the newest 16 of them.
    """

    crashes: int
    suspected: int
    suspects: list[str]
    withheld: int
    quarantine: list[str]


class PageDict(TypedDict, total=False):
    """Where the page is, or why there is none."""

    url: str | None
    failure: str | None


class NodeDict(TypedDict):
    """Another machine of the run; `acked_generation` is the newest order that its gate page shows."""

    name: str
    state: str
    since_s: float
    acked_generation: int | None
    trainer: bool
    why: str


class StatusDict(TypedDict, total=False):
    """The answer to GET /api/v1/status. A reader must do without any key: daemons have versions."""

    run: str
    state_dir: str
    mode: str
    breaker: BreakerDict
    gate: GateDict
    trainer: TrainerDict
    servers: list[ServerDict]
    nodes: list[NodeDict]
    gpus: list[GpuDict] | None
    host: HostDict | None
    oom: dict[str, OomDict]
    logs: list[LogDict]
    stream: StreamDict | None
    prompts: PromptsDict | None
    unseen: dict[str, str]
    incident: IncidentDict | None
    last_incident: IncidentDict | None
    budget: BudgetDict
    checkpoints: list[SavedDict]
    rewards: list[float | None]
    refused_batches: int
    warnings: list[str]
    version: str
    uptime_s: float
    page: PageDict
