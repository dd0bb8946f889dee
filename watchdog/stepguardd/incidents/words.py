"""The words of a report: durations, codes, and what helps once a cause is known."""

import re
from collections.abc import Mapping
from typing import Final

from ..core.diagnosis import Cause
from ..core.reasons import Reason

_CODE: Final = re.compile(
    "|".join(sorted((code.value for code in Reason if "_" in code), key=len, reverse=True))
)

# What a reason means, where the code alone says too little.
REASONS: Final[Mapping[Reason, str]] = {
    Reason.SERVER_DIED: "a process of the server ended",
    Reason.SERVER_STOPPED: "a process of the server was found stopped (SIGSTOP, a debugger, a suspend)",
    Reason.SERVER_HUNG: "the server gave no token, or its scheduler no answer, with idle processors",
    Reason.REQUESTS_FAILED: "the trainer's requests failed, one after the other",
    Reason.SERVER_SPINNING: "the server had requests and gave no token, with busy processors",
    Reason.SERVER_UNREACHABLE: "the server could not be reached",
    Reason.NODE_LOST: "a node was silent: it, its network or its agent is gone or frozen",
    Reason.REWARD_COLLAPSE: "the reward fell to a floor",
    Reason.REWARD_START_LEVEL: "the reward fell to the level of the run's first steps",
    Reason.REWARD_NOT_FINITE: "the reward was not a number",
    Reason.ROLLOUTS_FAILED: "batch after batch had too many failed rollouts",
    Reason.CALLS_HUNG: "too many of the trainer's calls to its actors hung at once",
    Reason.OPERATOR_PAUSE: "a person paused the run",
    Reason.OPERATOR_RESTART: "a person asked for a restart of the server",
    Reason.OPERATOR_ROLLBACK: "a person asked for a rollback",
    Reason.TRAINER_EXITED: "the trainer ended",
    Reason.TRAINER_STALLED: "the trainer made no progress",
    Reason.TRAINER_FROZEN: "the trainer's heartbeat stopped",
    Reason.RANK_LOST: "a rank of the trainer ended",
    Reason.GRAD_NOT_FINITE: "the gradient was not a number",
    Reason.LOSS_NOT_FINITE: "the loss was not a number",
    Reason.STALE_WEIGHTS: "a batch came from old weights",
    Reason.WEIGHTS_UNPROVEN: "a server's weights could not be proven current",
    Reason.SERVER_RETURNED: "a server came back that nobody had restarted here, its weights unproven",
    Reason.PAUSED_TOO_LONG: "the server was paused for longer than it may be",
    Reason.SERVER_EXCEPTION: "the server's log told of a crash",
}


# What helps once the run goes on again: find the cause, and keep it from coming back.
AFTERWARDS: Final[Mapping[Cause, tuple[str, ...]]] = {
    Cause.SERVER_CRASH: ("Find out why the process ended: what its log says of it is below.",),
    Cause.SERVER_HANG: (
        "Read the stacks below, if any: they show where the server stood. A stopped process (state T) was "
        "stopped by somebody: a debugger, `docker pause`, a Slurm suspend.",
    ),
    Cause.HOST_OOM: (
        "Lower the concurrency of rollouts or the host's caches, or raise the cgroup's limit: it will come "
        "back at the same load.",
    ),
    Cause.GPU_OOM: (
        "Lower --mem-fraction-static or the number of concurrent requests before it comes back.",
    ),
    Cause.KV_EXHAUSTION: ("Lower --max-running-requests or the response length, or give it more KV memory.",),
    Cause.GPU_FAULT: ("Take the node out of the pool and read the Xid: a GPU that fell once falls again.",),
    Cause.NETWORK: ("Check the link between trainer and server: its errors are in the trainer's log below.",),
    Cause.STALE_WEIGHTS: (
        "See that whoever restarts a server also hands it the trainer's weights before it answers.",
    ),
    Cause.REWARD_FUNCTION: ("Score a few of the stored completions by hand: the server is not at fault.",),
    Cause.POLICY_COLLAPSE: (
        "Lower the learning rate or raise the KL coefficient: unchanged, it ends the same way again.",
    ),
    Cause.NAN_WEIGHTS: (
        "Clip gradients, lower the learning rate, or leave that batch out: unchanged, the step ends the same "
        "way again.",
    ),
    Cause.DATA_FAULT: (
        "Compare the prompts before and after the onset; `stepguard resume` accepts a change.",
    ),
    Cause.DISK_FULL: ("Free space, then vet the newest checkpoint: it may be cut short.",),
    Cause.TRAINER_HANG: (
        "Read the stacks below; a rank that waits in a collective waits for one that is not.",
    ),
    Cause.WATCHDOG_BLIND: (
        "Check that the guard or the metric stream reaches the daemon: stepguard stream.",
    ),
}


def plain(code: str) -> str:
    """A reason code in words."""
    return code.replace("_", " ")


def in_words(text: str) -> str:
    """A note with its reason codes as words: the codes are for the journal and for people's alert rules."""
    return _CODE.sub(lambda code: plain(code.group()), text)


def seconds(value: float | None) -> str:
    """A duration for a person."""
    if value is None:
        return "unknown"
    if value < 0.0995:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    whole = int(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def times(count: int, one: str, many: str | None = None) -> str:
    """A count with its word."""
    return f"{count} {one}" if count == 1 else f"{count} {many or one + 's'}"
