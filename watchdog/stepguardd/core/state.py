"""
The daemon's whole knowledge, as one frozen value.

Everything that a decision may depend on is in here, so that a journal of events gives the same decisions
again.
Times are seconds of the machine's monotonic clock, which outlives the daemon but not a reboot.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from .breaker import Phase
from .budget import Budget
from .events import Answer, GpuBaseline, GpuTroubled, LogSeen, OomSeen, Proc
from .invariants import require
from .ledger import LedgerRow
from .memory import Climb, Ladder, Short, Sizes
from .proof import KnownAnswer
from .reasons import Reason
from .reward import RewardConfig, RewardState
from .reward import start as start_judging


class Mode(Enum):
    """How far the daemon goes without a person."""

    SHADOW = "shadow"  # judge and report
    HOLD = "hold"  # also hold the trainer, and tell people
    ACT = "act"  # also repair


class GateOrder(Enum):
    """The orders of the gate page, in rising severity."""

    GO = "GO"
    HOLD = "HOLD"
    RESYNC = "RESYNC"
    ROLLBACK = "ROLLBACK"
    SAVE = "SAVE"
    STOP = "STOP"


class ServerState(Enum):
    """What is known of an inference server."""

    STARTING = "starting"
    SERVING = "serving"
    SUSPECT = "suspect"  # evidence against it: the run holds, nothing is killed yet
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"  # it lives, and its weights are not proven current
    PLANNED = "planned"  # paused or updating, for a while


LEGAL: frozenset[tuple[ServerState, ServerState]] = frozenset(
    (old, new)
    for old, news in {
        ServerState.STARTING: "SERVING SUSPECT DEAD RESTARTING STALE PLANNED",
        ServerState.SERVING: "SUSPECT DEAD RESTARTING STALE PLANNED STARTING",
        ServerState.SUSPECT: "SERVING DEAD RESTARTING STALE PLANNED",
        ServerState.DEAD: "RESTARTING SUSPECT STARTING",
        ServerState.RESTARTING: "STARTING DEAD SUSPECT STALE",
        ServerState.STALE: "SERVING SUSPECT DEAD RESTARTING",
        ServerState.PLANNED: "SERVING SUSPECT DEAD RESTARTING STALE",
    }.items()
    for new in (ServerState[name] for name in news.split())
)


class NodeState(Enum):
    """What is known of another machine of the run."""

    JOINING = "joining"  # its agent has not come yet
    PRESENT = "present"
    LOST = "lost"


class Hands(Enum):
    """Who makes a server that the daemon may restart."""

    OWN = "own"  # the daemon, by a process, a unit or a container
    OTHERS = "others"  # somebody else, once asked
    TRAINER = "trainer"  # the trainer, in whose processes it lives, under the order RESYNC


class Stage(Enum):
    """Where the repair of a server stands, in the order of a restart."""

    CONTINUE = "continue"  # SIGCONT sent to a stopped process
    WATCH = "watch"  # held on soft evidence; killed when it lasts
    STOP = "stop"
    BACKOFF = "backoff"
    START = "start"
    READY = "ready"
    CANARY = "canary"
    WEIGHTS = "weights"


class Launch(Enum):
    """Where the relaunch of a trainer stands, in its order."""

    STOP = "stop"
    BACKOFF = "backoff"
    TARGET = "target"  # the checkpoint is chosen, newer ones are set aside, the marker is moved
    START = "start"
    UP = "up"  # started, and not heard of yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The figures that decisions depend on; each is explained under the same name in config.toml."""

    max_refused_batches: int = 3
    max_staleness: int = 0
    interval_s: float = 1.0
    deadlock_after_s: float = 8.0
    spin_after_s: float = 43.0
    health_interval_s: float = 30.0
    health_timeout_s: float = 25.0
    colocated: bool = False
    kill_after_s: float = 60.0
    planned_lease_s: float = 600.0
    restart_budget: int = 3
    restart_window_s: float = 900.0
    backoff_first_s: float = 10.0
    backoff_max_s: float = 300.0
    backoff_jitter: float = 0.2
    healthy_reset_s: float = 600.0
    canary_timeout_s: float = 60.0
    probation_steps: int = 3
    poison_steps: int = 3
    quorum: float = 0.5
    cont_grace_s: float = 3.0
    locked_out_hold_s: float = 1800.0
    resync_timeout_s: float = 120.0
    save_timeout_s: float = 600.0
    start_timeout_s: float = 600.0
    stop_timeout_s: float = 20.0
    gpu_free_timeout_s: float = 50.0
    push_weights: bool = False
    weights_fixed: bool = False
    proven_after_steps: int = 5
    on_policy_collapse: str = "call"
    trainer_managed: bool = False
    trainer_start_timeout_s: float = 1800.0
    trainer_stop_timeout_s: float = 60.0
    relaunch_budget: int = 5
    relaunch_window_s: float = 21600.0
    relaunches_without_step: int = 3
    lost_rank_grace_s: float = 30.0
    request_timeout_s: float = 300.0
    stall_factor: float = 6.0
    stall_floor_s: float = 1800.0
    stall_ceiling_s: float = 7200.0
    ladder: Ladder = field(default_factory=Ladder)
    mode: Mode = Mode.HOLD
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """
    A server's repair under way.

    `changed` tells whether anything was in fact repaired, so that a trip can be laid at this server's door.
    `restarts` tells whether this repair restarts the server, or only looks and re-syncs.
    `started_at` is when it was last started in it, `unseen` whether that start showed no process here.
    An effect that failed and may be tried again is, but not before `again_at`.
    `compared` tells that the weights showed what they should. Those that did not are `distrusted` until they
    are loaded anew, whatever version the server says, and `contradicted` for the whole repair.
    `vouched` tells that the weights of a trainer without the guard are the newest that were served.
    """

    cause: Reason
    stage: Stage
    since: float
    began: float
    intent: str | None = None
    resync_generation: int | None = None
    resynced_at: float | None = None
    resyncs_failed: int = 0
    resync_again_at: float | None = None
    again_at: float | None = None
    pushing: str | None = None
    comparing: bool = False
    compared: bool = False
    distrusted: bool = False
    contradicted: bool = False
    push_failed: bool = False
    vouched: bool = False
    called: bool = False
    aborted_at: float | None = None
    changed: bool = False
    restarts: bool = False
    started_at: float | None = None
    unseen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """How each endpoint of a server answered last; UNKNOWN until it was asked."""

    ready: Answer = Answer.UNKNOWN
    model_info: Answer = Answer.UNKNOWN
    metrics: Answer = Answer.UNKNOWN
    server_info: Answer = Answer.UNKNOWN
    loads: Answer = Answer.UNKNOWN
    health: Answer = Answer.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest:
    """The newest version that a server served, in one attempt of one trainer process."""

    pid: int
    attempt: int
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """
    One inference server, and the evidence on it. `None` is unknown.

    `ready_doubted`: it generated while `/ready` said no, so that no is no pause.
    `generated_at`: when it was last seen to generate. `loop_at`: when its scheduler's loop was last seen to
    turn; `unanswered_since`: since when that loop does not answer, asked again and again.
    `doubted` and `health_due` say what is to be asked now: the scheduler, or for a token.
    `health_at`: when it was last asked for a token. `planned_until`: the end of an announced silence.
    `owes_proof`: it was repaired where nothing may be sent to it, and is proven when that ends.
    `served_version`: what it last served rollouts with, also after its process is gone.
    `gpu_baseline`: the GPUs before it was started; what they come back to once it is ended.
    `node` is the other machine whose agent has it in hand.
    """

    name: str
    managed: bool
    hands: Hands = Hands.OWN
    node: str | None = None
    state: ServerState = ServerState.STARTING
    since: float = 0.0
    reason: Reason | None = None
    procs: tuple[Proc, ...] = ()
    gpu_baseline: tuple[GpuBaseline, ...] = ()
    weight_version: str | None = None
    served_version: str | None = None
    repair: Repair | None = None
    budget: Budget = field(default_factory=Budget)
    restarts: int = 0
    longest_start_s: float = 0.0
    climb: Climb = field(default_factory=Climb)
    sizes: Sizes = field(default_factory=Sizes)
    short: Short | None = None
    seen: bool = False
    stopped: tuple[int, ...] = ()
    uninterruptible: tuple[int, ...] = ()
    uninterruptible_since: float | None = None
    running: int | None = None
    tokens: int | None = None
    tokens_at: float | None = None
    cpu_s: float | None = None
    sampled_at: float | None = None
    busy_at: float | None = None
    stale_probes: int = 0
    newest: Newest | None = None
    older_probes: int = 0
    failed_probes: int = 0
    endpoints: Endpoints = field(default_factory=Endpoints)
    ready_doubted: bool = False
    generated_at: float | None = None
    doubted: bool = False
    loop_at: float | None = None
    loads_stamp: float | None = None
    unanswered_since: float | None = None
    health_due: bool = False
    health_at: float | None = None
    failed_health: int = 0
    planned_until: float | None = None
    owes_proof: bool = False

    def move(self, to: ServerState, now: float, reason: Reason | None) -> "Server":
        """The server in another state; a move that is not legal raises `InvariantError`."""
        if to is self.state:
            return self if reason is self.reason else replace(self, reason=reason)
        require((self.state, to) in LEGAL, f"server {self.name} cannot go from {self.state} to {to}")
        return replace(self, state=to, since=now, reason=reason, health_due=False)

    def stuck_in_kernel(self) -> tuple[int, ...]:
        """Processes that wait in the kernel for longer than any disk that works."""
        at, since = self.sampled_at, self.uninterruptible_since
        long = at is not None and since is not None and at - since >= STUCK_IN_KERNEL_S
        return self.uninterruptible if long else ()

    def window_s(self, settings: Settings) -> float:
        """
        Over how long restarts are counted.

        Longer than that many restarts of *this* server take, or one that never comes up would be restarted
        for ever: budget × (start + detection) × 1.5.
        """
        needed_s = settings.restart_budget * (self.longest_start_s + settings.kill_after_s) * 1.5
        return max(settings.restart_window_s, needed_s)

    @property
    def usable(self) -> bool:
        """Whether rollouts may be sent to it. One that nobody has looked at yet counts as usable."""
        if self.state in {ServerState.SERVING, ServerState.PLANNED}:
            return True
        return self.state is ServerState.STARTING and self.repair is None


class Halted(Enum):
    """Where our pause of a server stands."""

    PAUSING = "pausing"
    PAUSED = "paused"
    LIFTING = "lifting"
    LIFTED = "lifted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Halt:
    """
    A server that is paused so that a trainer without the guard waits. See core/unguarded.

    Kept from its first pause until the hold is over: `since` is when that pause began, `at` when the stage
    did, and with `over` this hold pauses it no more.
    """

    server: str
    since: float
    at: float
    stage: Halted = Halted.LIFTED
    intent: str | None = None
    again_at: float | None = None
    over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """
    The trainer, as its page and its reports show it, and as its launcher knows it.

    `works_at` is its phase, or the one in which it is held. `failed_requests` is how many of its requests
    failed in a row; `verified_at_failures` how many had when the servers were last looked at for it.

    `left` is why it said that it ends, if it did. `crashed_at` is the step that it last died in; a batch that
    it died in twice is among `skip_steps`.
    """

    pid: int | None = None
    alive: bool | None = None
    attempt: int = 0
    step: int | None = None
    phase: str = "UNKNOWN"
    phase_at: float | None = None
    beats: int = 0
    beats_at: float | None = None
    progress: int = 0
    progress_at: float | None = None
    acked_generation: int = 0
    weight_version: str | None = None
    version_at: float | None = None
    handles_resync: bool = False
    handles_rollback: bool = False
    handles_save: bool = False
    committed_step: int | None = None
    refused_in_a_row: int = 0
    works_at: str = "UNKNOWN"
    failed_requests: int = 0
    verified_at_failures: int = 0
    procs: tuple[Proc, ...] = ()
    left: str | None = None
    budget: Budget = field(default_factory=Budget)
    launches: int = 0
    launches_without_step: int = 0
    crashed_at: int | None = None
    skip_steps: tuple[int, ...] = ()
    rank_lost: int | None = None
    rank_lost_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """How long a phase of the trainer took, oldest first; how often this process entered it, up to 3."""

    name: str
    entered: int = 0
    last: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """
    The trainer's progress: where it is, since when, and when anything of it last moved. See core/stall.

    `clean` tells whether nothing disturbed this phase, so that its time may be learned.
    """

    pid: int | None = None
    phase: str = "UNKNOWN"
    step: int | None = None
    mark: tuple[int, int, str] = (0, 0, "")
    entered_at: float | None = None
    moved_at: float | None = None
    clean: bool = False
    told: bool = False
    silent_told: bool = False
    phases: tuple[PhaseTimes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The daemon's half of the gate page, less the lease."""

    order: GateOrder = GateOrder.GO
    generation: int = 0
    reason: str = ""
    target_step: int | None = None
    target_path: str | None = None
    judged_batch: int = 0
    judged_step: int | None = None
    judged_ok: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """
    Another machine of the run.

    `acked_generation` is the newest that its gate page is known to show; `why` is how it was lost.
    """

    name: str
    state: NodeState = NodeState.JOINING
    since: float = 0.0
    acked_generation: int = -1
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trip:
    """
    A batch or a stream that no optimizer step may be taken on, until its cause is found.

    `infra` tells that a cause was found among the servers and repaired; `relapse`, that it came on probation.
    """

    reason: Reason
    kind: str
    step: int
    onset_step: int
    since: float
    evidence: tuple[tuple[str, float], ...] = ()
    infra: bool = False
    relapse: bool = False
    rolled_back: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """A person holds the trainer; `reminders` is how often people were told that it is still so."""

    who: str
    why: str
    since: float
    reminders: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lockout:
    """
    No remedy is left: held until a person decides.

    When nobody comes the trainer is told to save, under `save_generation`, and then to stop.
    """

    reason: Reason
    since: float
    save_generation: int | None = None
    saving_since: float | None = None
    stop: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """A rollback under way: first the target is found, then the trainer is ordered to it."""

    before_step: int
    reason: Reason
    since: float
    intent: str | None
    target_step: int | None = None
    target_path: str | None = None
    generation: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaunch:
    """
    A trainer being started, again or for the first time.

    `pid` is of the one that it replaces. With `before_step` it is a rollback, of a trainer that does not
    reload in place; without, it resumes from the newest proven checkpoint.
    """

    cause: Reason
    stage: Launch
    since: float
    pid: int | None = None
    intent: str | None = None
    before_step: int | None = None
    target_step: int | None = None
    target_path: str | None = None
    first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """An optimizer step that was taken. `gradient` is its norm; None is unknown."""

    attempt: int
    step: int
    reward: float | None
    gradient: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What the reward was like before an incident: what the steps on probation are compared with."""

    mean: float
    deviation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """
    What is told to people about one trouble, from the first hold to the end of its probation.

    `evidence` is what spoke for it when it opened; `known_to` is the person who said that they know.
    """

    number: int
    reason: Reason
    server: str | None
    onset_step: int | None
    opened_at: float
    resumed_at: float | None = None
    closed_at: float | None = None
    restarts: int = 0
    resyncs: int = 0
    rollbacks: int = 0
    relaunches: int = 0
    refused_batches: int = 0
    evidence: tuple[str, ...] = ()
    known_to: str | None = None
    before: Level | None = None
    actions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPosition:
    """Where a log was read up to, in its reader's words; None is the trainer's."""

    server: str | None
    position: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """
    What was lately seen of memory, GPUs and logs, the newest last, each with when it was last seen.

    Evidence for the diagnosis and for the choice of a memory setting; nothing in here holds a run by itself.
    """

    ooms: tuple[tuple[float, OomSeen], ...] = ()
    gpus: tuple[tuple[float, GpuTroubled], ...] = ()
    logs: tuple[tuple[float, LogSeen], ...] = ()
    log_positions: tuple[LogPosition, ...] = ()
    memory_short_since: float | None = None


APART_AFTER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspects:
    """
    Prompts that were in flight when a server died by itself, by their keys. See core/poison.

    `lost` were at the newest crash, of the time `at`; `earlier` were at each of the crashes before it.
    """

    at: float | None = None
    lost: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()
    earlier_crashes: int = 0

    @property
    def shared(self) -> tuple[str, ...]:
        """Those of earlier crashes that were there again."""
        lost = set(self.lost)
        return tuple(key for key in self.earlier if key in lost)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Who is under suspicion now."""
        return self.shared or self.lost or self.earlier

    @property
    def crashes(self) -> int:
        """At how many crashes in a row they were all in flight."""
        if self.shared:
            return self.earlier_crashes + 1
        return 1 if self.lost else self.earlier_crashes

    @property
    def apart(self) -> tuple[str, ...]:
        """Whom the guard sends apart: to be in flight at one crash is no more than bad luck."""
        return self.prompts if self.crashes >= APART_AFTER else ()


SEEN_KEPT = 16
STUCK_IN_KERNEL_S = 5.0
"""A busy disk keeps a process for moments; this long is told."""
CHECKPOINTS_KEPT = 64
REWARDS_KEPT = 60
ACTIONS_KEPT = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything. `decide` is the only maker of a next one."""

    settings: Settings
    mode: Mode
    reward: RewardState
    phase: Phase = Phase.CLOSED
    phase_since: float = 0.0
    servers: tuple[Server, ...] = ()
    trainer: Trainer = field(default_factory=Trainer)
    gate: Gate = field(default_factory=Gate)
    trip: Trip | None = None
    pause: Pause | None = None
    lockout: Lockout | None = None
    rollback: Rollback | None = None
    relaunch: Relaunch | None = None
    reconciling: bool = False
    intents: int = 0
    probation_left: int = 0
    outage_began: float | None = None
    outage_ended: float | None = None
    retries: Budget = field(default_factory=Budget)
    incident: Incident | None = None
    incidents: int = 0
    last_incident: Incident | None = None
    checkpoints: tuple[LedgerRow, ...] = ()
    recent: tuple[Taken, ...] = ()
    probation_rewards: tuple[float, ...] = ()
    doubtful_step: int | None = None
    rewards: tuple[float | None, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    refused_batches: int = 0
    surroundings: Surroundings = field(default_factory=Surroundings)
    stall: Stall = field(default_factory=Stall)
    suspects: Suspects = field(default_factory=Suspects)
    answers: tuple[KnownAnswer, ...] = ()
    stream_step: int | None = None
    stream_position: str | None = None
    halts: tuple[Halt, ...] = ()
    nodes: tuple[Node, ...] = ()
    clearing: int | None = None
    """The generation of the hold under which the nodes agree that the run may go on."""


def initial(settings: Settings, mode: Mode, servers: tuple[Server, ...]) -> State:
    """The state before anything was seen."""
    return State(
        settings=settings,
        mode=mode,
        phase=Phase.SHADOW if mode is Mode.SHADOW else Phase.CLOSED,
        servers=servers,
        reward=start_judging(settings.reward),
    )
