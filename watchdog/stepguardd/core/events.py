"""
What the world told the daemon: a closed union of frozen values.

Sources make events, `decide` consumes them, the journal keeps them.
Nothing here is computed from anything else, and what a source could not learn is `None`, never 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from .signs import Sign


class Answer(Enum):
    """How one request to a server ended."""

    OK = "ok"
    UNAVAILABLE = "unavailable"  # it answered, and said no (503)
    REFUSED = "refused"  # nothing listens
    TIMEOUT = "timeout"
    BROKEN = "broken"  # cut off, oversized or not what it should be
    NOT_OFFERED = "not_offered"  # 404: this server has no such endpoint
    UNKNOWN = "unknown"  # not asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Proc:
    """One process of a server's tree. The start time, in clock ticks since boot, rules out a reused pid."""

    pid: int
    start_ticks: int
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBaseline:
    """What of a GPU's memory no living process accounted for, before a server was started."""

    gpu: int
    unclaimed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStarted:
    """The daemon came up, with a fresh state or its journal's. `gate_order` is what the page says."""

    gate_order: str
    gate_generation: int
    judged_batch: int = 0
    target_step: int | None = None
    target_path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSeen:
    """A server's live processes, the parent first; empty when there is none. Zombies are not live."""

    server: str
    procs: tuple[Proc, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessExited:
    """A process of a server's tree ended. The code is known for the daemon's own children alone."""

    server: str
    proc: Proc
    code: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSampled:
    """
    What /proc says of a live tree: its stopped pids, and the CPU seconds that all have used together.

    `uninterruptible` ones wait in the kernel (state D): for a disk, a network file system, the GPU's driver.
    """

    server: str
    stopped: tuple[int, ...]
    cpu_s: float
    uninterruptible: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProbed:
    """One round of the cheap endpoints. All of them answer with a frozen scheduler: they prove no life."""

    server: str
    ready: Answer = Answer.UNKNOWN
    model_info: Answer = Answer.UNKNOWN
    metrics: Answer = Answer.UNKNOWN
    weight_version: str | None = None
    running: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerAsked:
    """
    The second opinion, asked only in doubt: does the scheduler's own loop still turn?

    `/server_info` makes the round trip to the scheduler: a paused one answers, a frozen one does not.
    `/v1/loads` carries the time of the scheduler's last snapshot, by the server's own clock: it moves or not.
    `waited_s` is how long the answer to `/server_info` was waited for.
    """

    server: str
    info: Answer = Answer.UNKNOWN
    loads: Answer = Answer.UNKNOWN
    loads_stamp: float | None = None
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationAsked:
    """`/health_generate`, asked last: one token, `waited_s` ago. 200 proves nothing where it is a stub."""

    server: str
    answer: Answer
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsFailed:
    """
    Requests of the trainer itself failed on their way, so many in a row; 0 once one was answered again.

    `error` is the newest failure's, in a few words.
    """

    attempt: int
    in_a_row: int
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSeen:
    """The trainer's half of the gate page, read at an interval."""

    pid: int
    attempt: int
    step: int | None
    phase: str
    beats: int
    progress: int
    acked_generation: int
    weight_version: str | None
    handles_resync: bool
    handles_rollback: bool
    handles_save: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerTree:
    """The live processes of a trainer that Stepguard starts, the root first; empty when there is none."""

    procs: tuple[Proc, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerExited:
    """
    A process of the trainer ended: the one on the page, the root of its tree, or a rank.

    Without a pid it is its owner's word: a unit's, a container's, a job's. The code is known for the daemon's
    own children, and where the owner remembers it.
    """

    pid: int | None = None
    code: int | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerLeft:
    """The guard said goodbye: the training process ends, and knows why."""

    attempt: int
    why: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReported:
    """
    The guard admits a batch and waits for the verdict on it.

    `refused` is the guard's own local verdict; `began` is when the batch's first rollout may have been sent.
    """

    attempt: int
    step: int
    batch: int
    ok: int
    failed: int
    reward: float | None
    reward_std: float | None = None
    reward_min: float | None = None
    reward_max: float | None = None
    stale: int = 0
    refused: str | None = None
    began: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallsHung:
    """So many of the trainer's calls of one time hung at once that the guard spared their actors."""

    attempt: int
    what: str
    failed: int
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutsLost:
    """
    Rollouts that were sent at `began` and failed, by their prompts' keys, whatever they failed of.

    `answered` are suspects whose rollouts all came back.
    """

    attempt: int
    began: float
    lost: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommitted:
    """An optimizer step was taken."""

    attempt: int
    step: int
    reward: float | None = None
    weight_version: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """The trainer finished a checkpoint; `norms` are its own proof that it is finite."""

    attempt: int
    step: int
    path: str
    norms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointVetted:
    """A checkpoint's files were looked at."""

    attempt: int
    step: int
    verdict: str
    finding: str
    reason: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPinned:
    """A copy that rotation cannot take was made; without a path it was let go, or `trouble` says why not."""

    attempt: int
    step: int
    path: str | None = None
    trouble: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointGone:
    """A checkpoint is no longer where it was saved."""

    attempt: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderAcknowledged:
    """The trainer obeyed an order of this generation, or tried and failed."""

    generation: int
    order: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardLogged:
    """
    One step of a logged reward stream (W&B and others): late, so it never refuses a batch.

    `position` is where the reader stands once this step is taken in, as it wants to be told after a restart.
    """

    step: int
    reward: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    position: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyToken:
    """One token of a greedy answer, and its log-probability; None where the server did not say it."""

    token: int
    log_prob: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsLook:
    """
    What one server's weights showed of themselves. None and an empty answer are unknown.

    `version` is what the server said before and after; None where that changed meanwhile. Checksums of two
    servers can be compared where `layout`, how the weights are split, is the same.
    """

    server: str
    version: str | None = None
    checksum: str | None = None
    layout: str | None = None
    greedy: tuple[GreedyToken, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectEnded:
    """A command with this intent was carried out, or could not be, or was `needless`: all was so already."""

    intent: str
    ok: bool
    detail: str = ""
    procs: tuple[Proc, ...] = ()
    target_step: int | None = None
    target_path: str | None = None
    needless: bool = False
    kept_arguments: str | None = None
    """Why a server was started with its old arguments, though others were asked for."""
    looks: tuple[WeightsLook, ...] = ()
    """What a look at weights showed: of the server, then of the other one."""
    gpu_baseline: tuple[GpuBaseline, ...] = ()
    """The GPUs before this start; empty where they are unknown."""
    memory_held: str | None = None
    """What GPU memory a stop did not give back in time, in words; None also where that is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorAsked:
    """A person asked for something, by name and with a reason."""

    verb: str
    who: str
    why: str
    server: str | None = None
    before_step: int | None = None
    mode: str | None = None
    incident: int | None = None
    for_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSeen:
    """
    Lines of one meaning in one log: how many, and the first of them. A hint, never a proof.

    `position` is where the reader stands once this is taken in; None while what it read holds more.
    """

    sign: Sign
    server: str | None = None  # None: the trainer's log
    line: str = ""
    count: int = 1
    position: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRead:
    """A log was read up to `position`, and nothing in it meant anything; None is the trainer's."""

    server: str | None
    position: str


class OomKind(Enum):
    """Which memory ran out, and who noticed. Each asks for another remedy."""

    KERNEL_HOST = "kernel_host"  # the kernel killed, for the whole machine
    KERNEL_CGROUP = "kernel_cgroup"  # the kernel killed, for a cgroup's limit
    CGROUP_COUNTER = "cgroup_counter"  # the same, seen by the counter alone: the victim is unknown
    RAY_MONITOR = "ray_monitor"
    CUDA_START = "cuda_start"
    CUDA_RUN = "cuda_run"
    CUDA_UNKNOWN = "cuda_unknown"  # by a log that was not followed from its start
    POOL_TOO_SMALL = "pool_too_small"  # at the start: nothing was left for the KV pool
    KV_FULL = "kv_full"  # requests are retracted; no crash


class Role(Enum):
    """Whose process it was."""

    SERVER = "server"
    TRAINER = "trainer"
    OTHER = "other"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class OomSeen:
    """
    Memory ran out.

    `server` names whose it was where `role` is SERVER and that is known.
    `used_bytes` is what the victim held (the kernel, Ray), or what it asked for in vain (CUDA). `time_s`
    counts from boot and is known for the kernel's log alone. `facts` is everything else that the source said.
    """

    kind: OomKind
    role: Role
    server: str | None = None
    pid: int | None = None
    name: str | None = None
    used_bytes: int | None = None
    cgroup: str | None = None
    gpu: int | None = None
    count: int = 1
    time_s: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def crashed(self) -> bool:
        """Whether a process ended for it; a full KV pool only retracts requests."""
        return self.kind is not OomKind.KV_FULL


class GpuTrouble(Enum):
    """What can be wrong with a GPU that still lets itself be asked."""

    XID = "xid"
    ECC = "ecc"  # uncorrected errors, more than at the last look
    LOST = "lost"
    FILLING = "filling"  # the forecast: full within so many minutes
    ORPHAN = "orphan"  # memory held by a process of this run that belongs to no living server


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTroubled:
    """
    Something is wrong with a GPU, told once when it begins.

    `number` is the Xid, the new ECC errors, the minutes until it is full, or the pid that holds memory.
    """

    trouble: GpuTrouble
    gpu: int | None
    number: int | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPressed:
    """Processes wait for memory: PSI passed its limit, or fell below it again. Told at each change."""

    short: bool
    some_10s: float
    full_10s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJoined:
    """The agent of another machine is there; what its gate page said when it came."""

    node: str
    gate_order: str
    gate_generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAcknowledged:
    """The gate page of another machine says what ours did under this generation."""

    node: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLost:
    """Another machine was silent for longer than one may be, or never came."""

    node: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed. Every timeout of the core is looked at here."""


Event = (
    DaemonStarted
    | TreeSeen
    | ProcessExited
    | TreeSampled
    | ServerProbed
    | SchedulerAsked
    | GenerationAsked
    | RequestsFailed
    | TrainerSeen
    | TrainerTree
    | TrainerExited
    | TrainerLeft
    | BatchReported
    | CallsHung
    | RolloutsLost
    | StepCommitted
    | CheckpointSaved
    | CheckpointVetted
    | CheckpointPinned
    | CheckpointGone
    | OrderAcknowledged
    | RewardLogged
    | EffectEnded
    | OperatorAsked
    | LogSeen
    | LogRead
    | OomSeen
    | GpuTroubled
    | MemoryPressed
    | NodeJoined
    | NodeAcknowledged
    | NodeLost
    | Tick
)
