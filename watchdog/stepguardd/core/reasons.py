"""
The stable codes that say why: one closed enum for verdicts, commands, incidents and alerts.

It promises that a code, once released, keeps its meaning and its spelling: journals, reports, the gate page
and people's alert rules refer to them. A code names a cause or an observation, never an action. Adding a
member is free; renaming or reusing one is not. What a person should do about a code stands in the diagnosis
and in docs/detection.md, not here.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["CONTRADICTIONS", "Reason"]


class Reason(StrEnum):
    """Why the daemon thinks what it thinks. The value is what is stored and shown."""

    OK = "ok"

    # --- The reward stream (core/reward)
    REWARD_COLLAPSE = "reward_collapse"
    """The reward lies at a floor (0, -1 or any other constant) or next to it, far below its baseline."""
    REWARD_PARTIAL_LOSS = "reward_partial_loss"
    """A share of the reward is gone and a second witness says that rollouts fail."""
    REWARD_LEVEL_FALL = "reward_level_fall"
    """The reward fell to a new level. Partial loss or a curriculum switch: the reward alone cannot tell."""
    REWARD_START_LEVEL = "reward_start_level"
    """The reward fell to the level of the run's first steps: a server probably serves the base weights."""
    REWARD_DECAY = "reward_decay"
    """The reward falls steadily, step after step, towards nothing."""
    REWARD_STUCK = "reward_stuck"
    """The very same number again and again although the rollouts vary."""
    REWARD_NOT_FINITE = "reward_not_finite"
    """The reward is NaN or infinite."""
    REWARD_MISSING = "reward_missing"
    """No reward for too long: no row, or rows without a value."""
    REWARD_VARIANCE_COLLAPSE = "reward_variance_collapse"
    """All rollouts of a step get (nearly) the same score, away from the best possible one."""
    ZERO_STREAK = "zero_streak"
    """The user's plain rule: so many steps of exactly zero in a row."""
    MIN_REWARD = "min_reward"
    """The user's plain rule: the reward is below `min_reward`."""

    # --- The other metrics of a step
    LOSS_NOT_FINITE = "loss_not_finite"
    GRAD_NOT_FINITE = "grad_not_finite"
    ABORTED_RATIO = "aborted_ratio"
    """More rollouts than usual are aborted or fail."""
    LOGPROB_MISMATCH = "logprob_mismatch"
    """Trainer and server disagree about log-probabilities more than usual: suspect weights."""
    ENTROPY_SHIFT = "entropy_shift"
    KL_SHIFT = "kl_shift"
    LENGTH_SHIFT = "length_shift"
    CLIP_RATIO_SHIFT = "clip_ratio_shift"

    # --- A batch refused by the guard's local fuse
    FAILED_FRACTION = "failed_fraction"
    STALE_WEIGHTS = "stale_weights"
    NO_GROUP = "no_group"

    # --- Servers
    SERVER_STARTING = "server_starting"
    SERVER_DIED = "server_died"
    SERVER_STOPPED = "server_stopped"
    """A process of its tree is stopped (SIGSTOP, a debugger, `docker pause`, a Slurm suspend)."""
    SERVER_HUNG = "server_hung"
    """Requests run, no token comes and no CPU is used; or the scheduler does not answer."""
    SERVER_SPINNING = "server_spinning"
    """Requests run and no token comes, while the CPU is busy."""
    SERVER_UNREACHABLE = "server_unreachable"
    SERVER_PAUSED = "server_paused"
    SERVER_UPDATING = "server_updating"
    """The trainer is in phase SYNC: the servers take new weights."""
    SERVER_OFFLOADED = "server_offloaded"
    """The trainer has the GPUs that it shares with the servers: any phase but ROLLOUT of a colocated run."""
    SERVER_RETURNED = "server_returned"
    """A server that was dead has a process again."""
    PAUSED_TOO_LONG = "paused_too_long"

    REQUESTS_FAILED = "requests_failed"
    """The trainer's own requests fail, one after the other."""

    SERVER_EXCEPTION = "server_exception"
    """Its log tells of a crash that its processes do not show yet."""

    VERSION_WENT_BACK = "version_went_back"
    """Within one attempt it serves an older version of the weights than it did."""
    CHECKSUM_DIFFERS = "checksum_differs"
    """Two replicas say the same version, and their weights are not the same."""
    ANSWER_DIFFERS = "answer_differs"
    """It says the right version, and does not generate what that version generated."""

    # --- Memory and GPUs
    HOST_OOM = "host_oom"
    """The kernel killed a process for memory: of the machine, or of a cgroup."""
    RAY_OOM = "ray_oom"
    """Ray's memory monitor killed a worker."""
    GPU_OOM = "gpu_oom"
    """CUDA ran out of memory, at the start or at work."""
    KV_FULL = "kv_full"
    """The KV pool is full and requests are retracted: slow, and no crash."""
    MEMORY_PRESSURE = "memory_pressure"
    """Processes wait for memory (PSI); nothing was killed yet."""
    GPU_FAULT = "gpu_fault"
    """A GPU reported an Xid or uncorrected memory errors, or fell off the bus."""
    GPU_FILLING = "gpu_filling"
    """A GPU's memory grows steadily and will be full soon."""
    GPU_ORPHAN = "gpu_orphan"
    """A process of a server that is gone still holds GPU memory."""
    GPU_HELD = "gpu_held"
    """After a server was ended, its GPUs' memory did not come back to what it was before its start."""
    LOG_TROUBLE = "log_trouble"
    """A log tells of trouble outside of the servers: NCCL, Ray, a full disk, an Xid."""

    # --- Remedies that failed or ran out
    START_FAILED = "start_failed"
    STOP_FAILED = "stop_failed"
    CANARY_FAILED = "canary_failed"
    RESYNC_FAILED = "resync_failed"
    ROLLBACK_FAILED = "rollback_failed"
    WEIGHTS_UNPROVEN = "weights_unproven"
    RESTART_BUDGET_SPENT = "restart_budget_spent"
    RELAUNCH_BUDGET_SPENT = "relaunch_budget_spent"
    RELAPSED = "relapsed"
    """The trouble came back after the last remedy."""
    NO_CHECKPOINT = "no_checkpoint"

    # --- The trainer and its batches
    OUTAGE = "outage"
    """The batch's rollouts overlapped a time in which too few servers could be used."""
    ROLLOUTS_FAILED = "rollouts_failed"
    """Batch after batch is refused for failed rollouts."""
    PROMPT_SUSPECTED = "prompt_suspected"
    """The same prompts were in flight each time that the server died."""
    PROMPT_QUARANTINED = "prompt_quarantined"
    """The server dies whenever this prompt is sent: it is withheld."""
    CALLS_HUNG = "calls_hung"
    """Too many of the trainer's calls to its actors hung at once: nothing was killed."""
    OLD_ATTEMPT = "old_attempt"
    """The batch is from before a rollback."""
    TRAINER_STARTING = "trainer_starting"
    TRAINER_EXITED = "trainer_exited"
    TRAINER_FINISHED = "trainer_finished"
    """It ended by itself or was told to: not a death."""
    RANK_LOST = "rank_lost"
    """One rank of several ended, and the others wait for it."""
    TRAINER_STALLED = "trainer_stalled"
    """It lives and makes no progress, far longer than its phase ever took."""
    TRAINER_FROZEN = "trainer_frozen"
    """Its heartbeat stopped: the process is stopped or frozen, or gone where it cannot be seen."""
    ROLLED_BACK = "rolled_back"
    PROBATION_FAILED = "probation_failed"
    """The rewards after a recovery are not what they were before the incident."""

    # --- Other machines of the run
    NODES_JOINING = "nodes_joining"
    """Not every machine's agent has come yet."""
    NODES_AGREE = "nodes_agree"
    """Nothing holds the run any more, and not every machine has said so yet."""
    NODE_LOST = "node_lost"
    """A machine's agent is silent: the machine, its network or the agent is gone, or frozen."""

    # --- Checkpoints
    CHECKPOINT_BAD = "checkpoint_bad"
    PIN_REFUSED = "pin_refused"
    """A proven checkpoint could not be kept from the framework's rotation."""

    # --- People, and the daemon itself
    OPERATOR_PAUSE = "operator_pause"
    OPERATOR_RESUME = "operator_resume"
    OPERATOR_ROLLBACK = "operator_rollback"
    OPERATOR_RESTART = "operator_restart"
    OPERATOR_RELAUNCH = "operator_relaunch"
    OPERATOR_PLANNED = "operator_planned"
    """A person or a script said that a server will be silent for a while, on purpose."""
    OPERATOR_MODE = "operator_mode"
    OPERATOR_ACK = "operator_ack"
    UNKNOWN_VERB = "unknown_verb"
    RECONCILING = "reconciling"
    """The daemon came back to a held gate and looks at every server before it lets go."""


CONTRADICTIONS = frozenset({Reason.VERSION_WENT_BACK, Reason.CHECKSUM_DIFFERS, Reason.ANSWER_DIFFERS})
"""Weights that are not what their label says."""
