"""
What most likely went wrong: causes ranked by the evidence for and against each.

Pure, and one table: every fact speaks for or against every cause with a weight in nats, on top of how common
the cause is. The confidence is the logistic of the sum, each cause for itself, since one often brings another
(a crash, then a server with the base weights). It promises the same answer for the same facts, live and after
the event, and that every line says when, where and how much. It does not promise a proof: a weight is a
judgement, and the advice says how to check it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import exp

__all__ = ["ADVICE", "NAMES", "Cause", "Evidence", "Fact", "Hypothesis", "rank"]


class Cause(StrEnum):
    """What can go wrong. The values are stable: they are in JSON, reports and alerts."""

    SERVER_CRASH = "server_crash"
    SERVER_HANG = "server_hang"
    HOST_OOM = "host_oom"
    GPU_OOM = "gpu_oom"
    KV_EXHAUSTION = "kv_exhaustion"
    GPU_FAULT = "gpu_fault"
    NETWORK = "network"
    STALE_WEIGHTS = "stale_weights"
    REWARD_FUNCTION = "reward_function"
    POLICY_COLLAPSE = "policy_collapse"
    NAN_WEIGHTS = "nan_weights"
    DATA_FAULT = "data_fault"
    DISK_FULL = "disk_full"
    TRAINER_HANG = "trainer_hang"
    WATCHDOG_BLIND = "watchdog_blind"


class Fact(StrEnum):
    """What was seen."""

    # The reward
    FELL_TO_CONSTANT = "fell_to_constant"
    """From its level to one exact number within one step."""
    STAYED_CONSTANT = "stayed_constant"
    BACK_AT_START = "back_at_start"
    """After the fall it came back, but only to about the level of the run's first steps."""
    FELL_TO_START = "fell_to_start"
    NOT_FINITE = "not_finite"
    DECAYED = "decayed"
    LEVEL_FELL = "level_fell"
    STUCK = "stuck"
    SAME_SCORES = "same_scores"
    MISSING = "missing"
    # The other metrics
    LOSS_NOT_FINITE = "loss_not_finite"
    POLICY_MOVED = "policy_moved"
    LENGTH_GONE = "length_gone"
    LENGTH_STEADY = "length_steady"
    ABORTED_UP = "aborted_up"
    COMPLETE = "complete"
    LOGPROB_UP = "logprob_up"
    TRAINING_WENT_ON = "training_went_on"
    STEPS_FASTER = "steps_faster"
    STEPS_SLOWER = "steps_slower"
    GPU_MEMORY_FLAT = "gpu_memory_flat"
    # Logs, the kernel, the fleet
    SERVER_CRASHED = "server_crashed"
    SERVER_HUNG = "server_hung"
    SERVER_UNREACHABLE = "server_unreachable"
    HOST_OOM = "host_oom"
    GPU_OOM = "gpu_oom"
    KV_FULL = "kv_full"
    GPU_FAULT = "gpu_fault"
    NETWORK_FAULT = "network_fault"
    COLLECTIVE_TIMEOUT = "collective_timeout"
    WORKER_DIED = "worker_died"
    DISK_FULL = "disk_full"
    GRADER_ERROR = "grader_error"
    DATA_ERROR = "data_error"
    NAN_LINE = "nan_line"
    NO_OOM_LINES = "no_oom_lines"
    WEIGHTS_FAILED = "weights_failed"
    WEIGHTS_STALE = "weights_stale"
    CHECKPOINT_NOT_FINITE = "checkpoint_not_finite"
    TRAINER_STALLED = "trainer_stalled"
    WATCHDOG_GAP = "watchdog_gap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One thing that was seen: when, where, and how much."""

    fact: Fact
    time: str
    """A step ("step 188") or a time of day, as the source has it."""
    source: str
    """File and line, metric, server: where to look it up."""
    text: str
    """What it says, with its figure."""

    @property
    def line(self) -> str:
        """The evidence as one line."""
        return f"{self.time}, {self.source}: {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A cause, how sure it is, and why."""

    cause: Cause
    confidence: float
    supporting: tuple[str, ...]
    opposing: tuple[str, ...]


NAMES: Mapping[Cause, str] = {
    Cause.SERVER_CRASH: "the inference server crashed",
    Cause.SERVER_HANG: "the inference server hung",
    Cause.HOST_OOM: "the host ran out of memory",
    Cause.GPU_OOM: "a GPU ran out of memory",
    Cause.KV_EXHAUSTION: "the KV cache was exhausted",
    Cause.GPU_FAULT: "a GPU failed (Xid, ECC)",
    Cause.NETWORK: "the network between trainer and server failed",
    Cause.STALE_WEIGHTS: "a server served stale (base) weights",
    Cause.REWARD_FUNCTION: "the reward function failed",
    Cause.POLICY_COLLAPSE: "the policy collapsed",
    Cause.NAN_WEIGHTS: "the weights became NaN",
    Cause.DATA_FAULT: "the data or the environment changed or failed",
    Cause.DISK_FULL: "a disk was full",
    Cause.TRAINER_HANG: "the trainer hung",
    Cause.WATCHDOG_BLIND: "the watchdog did not see the run",
}

# How common each cause is when something is wrong, in nats; then what each fact adds.
_RULES: Mapping[Cause, tuple[float, Mapping[Fact, float]]] = {
    Cause.SERVER_CRASH: (-2.0, {
        Fact.FELL_TO_CONSTANT: 2.5, Fact.STAYED_CONSTANT: 1.0, Fact.BACK_AT_START: 1.5, Fact.SERVER_CRASHED:
        5.0, Fact.SERVER_UNREACHABLE: 3.0, Fact.WORKER_DIED: 1.5, Fact.ABORTED_UP: 1.5, Fact.LENGTH_GONE:
        1.5, Fact.NOT_FINITE: 0.5, Fact.LEVEL_FELL: 0.3, Fact.STEPS_FASTER: 1.0, Fact.HOST_OOM: 1.0,
        Fact.GPU_OOM: 0.7, Fact.GPU_FAULT: 0.7, Fact.COMPLETE: -3.0, Fact.LENGTH_STEADY: -2.5, Fact.DECAYED:
        -2.0, Fact.STUCK: -1.5, Fact.FELL_TO_START: -1.0, Fact.LOSS_NOT_FINITE: -1.0,
    }),
    Cause.SERVER_HANG: (-3.5, {
        Fact.SERVER_HUNG: 5.5, Fact.STEPS_SLOWER: 2.5, Fact.FELL_TO_CONSTANT: 1.5, Fact.STAYED_CONSTANT:
        0.5, Fact.BACK_AT_START: 0.5, Fact.ABORTED_UP: 1.0, Fact.MISSING: 0.5, Fact.SERVER_CRASHED: -2.0,
        Fact.SERVER_UNREACHABLE: -1.0, Fact.STEPS_FASTER: -2.5, Fact.COMPLETE: -3.0, Fact.DECAYED: -2.0,
        Fact.LENGTH_STEADY: -2.0,
    }),
    Cause.HOST_OOM: (-4.0, {
        Fact.HOST_OOM: 7.0, Fact.FELL_TO_CONSTANT: 1.0, Fact.SERVER_CRASHED: 1.0, Fact.WORKER_DIED: 0.5,
        Fact.NO_OOM_LINES: -2.5,
    }),
    Cause.GPU_OOM: (-3.5, {
        Fact.GPU_OOM: 6.5, Fact.FELL_TO_CONSTANT: 0.5, Fact.SERVER_CRASHED: 0.5, Fact.NO_OOM_LINES: -2.0,
        Fact.GPU_MEMORY_FLAT: -1.0,
    }),
    Cause.KV_EXHAUSTION: (-4.0, {
        Fact.KV_FULL: 5.5, Fact.LEVEL_FELL: 0.5, Fact.ABORTED_UP: 0.5, Fact.STEPS_SLOWER: 0.5,
        Fact.FELL_TO_CONSTANT: -0.5, Fact.STAYED_CONSTANT: -1.0,
    }),
    Cause.GPU_FAULT: (-4.5, {
        Fact.GPU_FAULT: 7.0, Fact.FELL_TO_CONSTANT: 0.5, Fact.NOT_FINITE: 0.5, Fact.SERVER_CRASHED: 0.5,
    }),
    Cause.NETWORK: (-4.0, {
        Fact.NETWORK_FAULT: 5.0, Fact.SERVER_UNREACHABLE: 1.0, Fact.FELL_TO_CONSTANT: 1.0, Fact.ABORTED_UP:
        0.5, Fact.STAYED_CONSTANT: -0.5, Fact.BACK_AT_START: -1.0, Fact.SERVER_CRASHED: -1.0, Fact.COMPLETE:
        -2.0,
    }),
    Cause.STALE_WEIGHTS: (-3.0, {
        Fact.FELL_TO_START: 4.5, Fact.BACK_AT_START: 5.0, Fact.LOGPROB_UP: 3.5, Fact.WEIGHTS_STALE: 6.0,
        Fact.WEIGHTS_FAILED: 3.0, Fact.COMPLETE: 0.3, Fact.FELL_TO_CONSTANT: -1.0, Fact.DECAYED: -1.5,
        Fact.NOT_FINITE: -1.0,
    }),
    Cause.REWARD_FUNCTION: (-3.0, {
        Fact.GRADER_ERROR: 4.5, Fact.STUCK: 3.5, Fact.SAME_SCORES: 3.0, Fact.LENGTH_STEADY: 2.5,
        Fact.COMPLETE: 1.5, Fact.FELL_TO_CONSTANT: 1.5, Fact.STAYED_CONSTANT: 0.5, Fact.NOT_FINITE: 0.5,
        Fact.BACK_AT_START: -1.5, Fact.FELL_TO_START: -1.5, Fact.LENGTH_GONE: -2.0, Fact.ABORTED_UP: -2.0,
        Fact.SERVER_CRASHED: -2.0, Fact.SERVER_UNREACHABLE: -2.0, Fact.DECAYED: -1.0,
        Fact.LOSS_NOT_FINITE: -3.0,
    }),
    Cause.POLICY_COLLAPSE: (-3.0, {
        Fact.DECAYED: 3.5, Fact.POLICY_MOVED: 2.5, Fact.COMPLETE: 1.0, Fact.LEVEL_FELL: 0.5,
        Fact.FELL_TO_CONSTANT: -4.0, Fact.STAYED_CONSTANT: -0.5, Fact.BACK_AT_START: -1.0,
        Fact.FELL_TO_START: -1.5, Fact.STUCK: -1.5, Fact.ABORTED_UP: -1.5, Fact.SERVER_CRASHED: -1.5,
        Fact.SERVER_UNREACHABLE: -1.5, Fact.LOGPROB_UP: -0.5,
    }),
    Cause.NAN_WEIGHTS: (-4.0, {
        Fact.LOSS_NOT_FINITE: 5.5, Fact.CHECKPOINT_NOT_FINITE: 7.0, Fact.NAN_LINE: 3.5, Fact.NOT_FINITE:
        2.0, Fact.FELL_TO_CONSTANT: 0.5, Fact.BACK_AT_START: -2.5, Fact.SAME_SCORES: 0.5,
        Fact.TRAINING_WENT_ON: -1.0,
        Fact.DECAYED: -1.0,
    }),
    Cause.DATA_FAULT: (-3.5, {
        Fact.DATA_ERROR: 4.5, Fact.LEVEL_FELL: 2.8, Fact.COMPLETE: 0.5, Fact.STUCK: 0.5,
        Fact.FELL_TO_CONSTANT: 0.5, Fact.STAYED_CONSTANT: -0.5, Fact.BACK_AT_START: -0.5, Fact.ABORTED_UP:
        -1.5, Fact.LOGPROB_UP: -1.0, Fact.POLICY_MOVED: -0.5,
    }),
    Cause.DISK_FULL: (-5.0, {
        Fact.DISK_FULL: 7.0,
    }),
    Cause.TRAINER_HANG: (-4.0, {
        Fact.TRAINER_STALLED: 6.0, Fact.COLLECTIVE_TIMEOUT: 5.5, Fact.MISSING: 2.0, Fact.TRAINING_WENT_ON:
        -3.0,
    }),
    Cause.WATCHDOG_BLIND: (-4.0, {
        Fact.WATCHDOG_GAP: 6.0, Fact.MISSING: 2.5, Fact.TRAINING_WENT_ON: -0.5,
    }),
}  # fmt: skip

# Where a fact does not explain itself: why it speaks for or against that cause.
_WHY: Mapping[tuple[Cause, Fact], str] = {
    (Cause.SERVER_CRASH, Fact.FELL_TO_CONSTANT): "every rollout failed at once, and failures were scored",
    (
        Cause.SERVER_CRASH,
        Fact.BACK_AT_START,
    ): "something restarted the server, and without the trained weights",
    (Cause.SERVER_CRASH, Fact.COMPLETE): "a dead server completes nothing",
    (Cause.SERVER_CRASH, Fact.DECAYED): "a crash does not fade in",
    (Cause.SERVER_CRASH, Fact.STEPS_FASTER): "requests to a dead server fail quickly",
    (Cause.SERVER_HANG, Fact.STEPS_FASTER): "a hung server makes every step wait for its timeout",
    (Cause.SERVER_HANG, Fact.STEPS_SLOWER): "every step waits for the timeout of its requests",
    (Cause.STALE_WEIGHTS, Fact.BACK_AT_START): "the base weights were serving, not the trained ones",
    (Cause.STALE_WEIGHTS, Fact.FELL_TO_CONSTANT): "base weights would have scored more than that",
    (
        Cause.REWARD_FUNCTION,
        Fact.BACK_AT_START,
    ): "a broken grader does not come back at the base model's level",
    (Cause.REWARD_FUNCTION, Fact.LENGTH_STEADY): "the completions were as before, only their score was not",
    (Cause.POLICY_COLLAPSE, Fact.FELL_TO_CONSTANT): "no optimizer step takes a policy there at once",
    (Cause.POLICY_COLLAPSE, Fact.BACK_AT_START): "a collapsed policy does not come back by itself",
    (Cause.NAN_WEIGHTS, Fact.BACK_AT_START): "weights that are NaN do not come back",
    (Cause.NAN_WEIGHTS, Fact.TRAINING_WENT_ON): "NaN weights would have shown in the updates",
    (Cause.GPU_OOM, Fact.GPU_MEMORY_FLAT): "nothing grew before the fall",
    (Cause.NETWORK, Fact.BACK_AT_START): "a network that returns brings the trained weights back with it",
    (
        Cause.KV_EXHAUSTION,
        Fact.STAYED_CONSTANT,
    ): "a full KV cache retracts requests, it does not fail them all",
    (Cause.TRAINER_HANG, Fact.TRAINING_WENT_ON): "the trainer went on",
}

ADVICE: Mapping[Cause, tuple[str, ...]] = {
    Cause.SERVER_CRASH: (
        "Restart the server and push the trainer's current weights before the next rollout.",
        "Go back to a checkpoint from before the onset; what was trained since was trained on failures.",
        "Give failed rollouts no reward: let the guard mask them (guard.gather and guard.admit).",
    ),
    Cause.SERVER_HANG: (
        "Kill the server's whole process tree, then restart it and push the current weights.",
        "Bound every request by a timeout, so that a hang is a failed rollout and not a silent wait.",
    ),
    Cause.HOST_OOM: (
        "Lower the number of concurrent rollouts or the host's cache of batches, and watch memory.events.",
    ),
    Cause.GPU_OOM: (
        "Restart with a lower --mem-fraction-static (an OOM at run time) or fewer concurrent requests.",
    ),
    Cause.KV_EXHAUSTION: ("Lower --max-running-requests or the response length, or add KV memory.",),
    Cause.GPU_FAULT: ("Drain the node, read the Xid in the kernel log, and reset or replace the GPU.",),
    Cause.NETWORK: ("Check the link between trainer and server, and the server's address.",),
    Cause.STALE_WEIGHTS: (
        "Never let a restarted server answer before its weight_version equals the trainer's.",
    ),
    Cause.REWARD_FUNCTION: (
        "Score some of the stored completions by hand.",
        "Let the reward function raise when it cannot score, instead of answering 0.",
    ),
    Cause.POLICY_COLLAPSE: (
        "Go back to a checkpoint from before the onset, with a lower learning rate or more KL.",
    ),
    Cause.NAN_WEIGHTS: (
        "Go back to the newest checkpoint that vets finite (stepguard checkpoints), and clip gradients.",
    ),
    Cause.DATA_FAULT: (
        "Compare the prompts before and after the onset; a change that was meant can be acknowledged.",
    ),
    Cause.DISK_FULL: ("Free space, then check the newest checkpoint: it may be cut short.",),
    Cause.TRAINER_HANG: ("Take a stack dump of every rank (py-spy dump) before restarting the trainer.",),
    Cause.WATCHDOG_BLIND: (
        "Check that the guard or the metric stream reaches the daemon (stepguard stream).",
    ),
}


def rank(evidence: Iterable[Evidence]) -> tuple[Hypothesis, ...]:
    """
    The causes that anything speaks for, the most likely first.

    Args:
        evidence: what was seen. Of one fact, the first weighs; all of them are listed.

    """
    found = list(evidence)
    facts = {piece.fact for piece in found}
    ranked = []
    for order, (cause, (prior, weights)) in enumerate(_RULES.items()):
        supporting = tuple(_line(cause, piece) for piece in found if weights.get(piece.fact, 0.0) > 0)
        if not supporting:
            continue
        opposing = tuple(_line(cause, piece) for piece in found if weights.get(piece.fact, 0.0) < 0)
        score = prior + sum(weights.get(fact, 0.0) for fact in facts)
        confidence = min(0.99, max(0.01, 1 / (1 + exp(-score))))
        ranked.append((-score, order, Hypothesis(
            cause=cause, confidence=round(confidence, 2), supporting=supporting, opposing=opposing
        )))  # fmt: skip
    ranked.sort(key=lambda entry: entry[:2])
    return tuple(hypothesis for _, _, hypothesis in ranked)


def _line(cause: Cause, piece: Evidence) -> str:
    why = _WHY.get((cause, piece.fact))
    return f"{piece.line} ({why})" if why else piece.line
