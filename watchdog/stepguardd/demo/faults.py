"""
The faults of the demo: each is really injected, and each says beforehand what is to be expected.

Signals go to processes of the demo's own, by pid. The injection time is taken beside the signal, on the
same clock that the daemon uses.
"""

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import httpx

from .. import clock, proc
from ..sources.sglang import open_requests

PAUSE_S: Final = 12.0  # longer than a deadlock would be given
_CALL_TIMEOUT_S: Final = 10.0
_LOAD_TIMEOUT_S: Final = 120.0


class Fault(StrEnum):
    """What happens to the run."""

    KILL = "kill"
    HANG = "hang"
    STALE = "stale"
    ZEROS = "zeros"
    TRAJECTORY = "trajectory"
    DETOKENIZER = "detokenizer"
    PARENT = "parent"
    WEIGHTS = "weights"
    PAUSE = "pause"
    TRAINER = "trainer"
    ACTOR = "actor"
    RANK = "rank"
    NAN = "nan"
    POLICY = "policy"
    RELAPSE = "relapse"
    OOM = "oom"
    POISON = "poison"
    NONE = "none"


class PauseMode(StrEnum):
    """SGLang's modes of a pause: what becomes of the requests that run."""

    ABORT = "abort"
    IN_PLACE = "in_place"
    RETRACT = "retract"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """
    One fault, and the run that it is shown on.

    Args:
        fault: which.
        story: what happens, in a line.
        expected: what Stepguard is expected to do, in a line.
        restarts: how many restarts it should take.
        holds: how many times it should hold.
        failures: what the guarded trainer does with failed rollouts: mask them, or score them 0.
        weight_sync: how the trainer hands its weights over: by disk, or in a group that dies with the server.
        supervised: whether something else than Stepguard restarts the server.
        rollbacks: how many rollbacks it should take.
        relaunches: how many relaunches of the trainer it should take.
        probation_steps: how long the run is on probation after a recovery, in steps.

    """

    fault: Fault
    story: str
    expected: str
    restarts: int
    holds: int
    failures: str = "mask"
    weight_sync: str = "disk"
    supervised: bool = False
    rollbacks: int = 0
    relaunches: int = 0
    probation_steps: int = 3


SCENARIOS: dict[Fault, Scenario] = {
    Fault.KILL: Scenario(
        fault=Fault.KILL,
        story="SIGKILL to the server's scheduler",
        expected="hold, one restart, weights pushed, no garbage step",
        restarts=1,
        holds=1,
    ),
    Fault.HANG: Scenario(
        fault=Fault.HANG,
        story="SIGSTOP to the server's scheduler",
        expected="hold, SIGCONT, no restart, no garbage step",
        restarts=0,
        holds=1,
    ),
    Fault.STALE: Scenario(
        fault=Fault.STALE,
        story="the server is killed; its own supervisor restarts it with the base weights",
        expected="hold, re-sync by the trainer, no restart of ours, no garbage step",
        restarts=0,
        holds=1,
        weight_sync="group",
        supervised=True,
    ),
    Fault.ZEROS: Scenario(
        fault=Fault.ZEROS,
        story="SIGKILL to the scheduler, and a trainer that scores every failure 0",
        expected="hold, one restart, the zeros refused before their step",
        restarts=1,
        holds=1,
        failures="zero",
    ),
    Fault.TRAJECTORY: Scenario(
        fault=Fault.TRAJECTORY,
        story="one trajectory of many raises an exception",
        expected="the trajectory is masked, no hold",
        restarts=0,
        holds=0,
    ),
    Fault.DETOKENIZER: Scenario(
        fault=Fault.DETOKENIZER,
        story="SIGKILL to the server's detokenizer",
        expected="hold, one restart, weights pushed, no garbage step",
        restarts=1,
        holds=1,
    ),
    Fault.PARENT: Scenario(
        fault=Fault.PARENT,
        story="SIGKILL to the server's parent process",
        expected="hold, one restart, weights pushed, no garbage step",
        restarts=1,
        holds=1,
    ),
    Fault.WEIGHTS: Scenario(
        fault=Fault.WEIGHTS,
        story="somebody loads the base weights into the server",
        expected="the batch refused, hold, weights pushed again, no restart, no garbage step",
        restarts=0,
        holds=1,
    ),
    Fault.PAUSE: Scenario(
        fault=Fault.PAUSE,
        story=f"somebody pauses the server's generation for {PAUSE_S:g} s",
        expected="the run waits, no hold, no restart",
        restarts=0,
        holds=0,
    ),
    Fault.TRAINER: Scenario(
        fault=Fault.TRAINER,
        story="SIGKILL to the trainer",
        expected="hold, a relaunch from the newest proven checkpoint, no garbage step",
        restarts=0,
        holds=1,
        relaunches=1,
    ),
    Fault.RANK: Scenario(
        fault=Fault.RANK,
        story="one of two ranks is killed, and the other waits for it at the barrier",
        expected="it fails at once, hold, a relaunch of both from the newest good checkpoint",
        restarts=0,
        holds=1,
        relaunches=1,
    ),
    Fault.ACTOR: Scenario(
        fault=Fault.ACTOR,
        story="SIGSTOP to one of the worker processes that grade: a call that hangs",
        expected="its rollout is masked, the worker killed and replaced, no hold",
        restarts=0,
        holds=0,
    ),
    Fault.NAN: Scenario(
        fault=Fault.NAN,
        story="one optimizer step with a loss that is NaN",
        expected="hold, a rollback to the newest proven checkpoint, no garbage step",
        restarts=0,
        holds=1,
        rollbacks=1,
    ),
    Fault.POLICY: Scenario(
        fault=Fault.POLICY,
        story="three steps in the wrong direction, at a high rate, ruin the policy",
        expected='hold and call, with on_policy_collapse = "rollback" a rollback, no garbage step',
        restarts=0,
        holds=1,
        rollbacks=1,
    ),
    Fault.RELAPSE: Scenario(
        fault=Fault.RELAPSE,
        story="SIGKILL to the server's scheduler, and again while the run is on probation",
        expected="one hold, two restarts, the second with fewer requests at a time, no garbage step",
        restarts=2,
        holds=1,
        probation_steps=8,
    ),
    Fault.OOM: Scenario(
        fault=Fault.OOM,
        story="there is only memory left for three quarters of the requests at a time",
        expected="hold, one restart with fewer requests at a time, no garbage step",
        restarts=1,
        holds=1,
    ),
    Fault.POISON: Scenario(
        fault=Fault.POISON,
        story="one prompt of a batch kills the server whenever it is sent",
        expected="hold, three restarts, the prompt found and withheld, no garbage step",
        restarts=3,
        holds=1,
    ),
    Fault.NONE: Scenario(
        fault=Fault.NONE,
        story="nothing goes wrong",
        expected="no hold, no restart",
        restarts=0,
        holds=0,
    ),
}


INSIDE_THE_TRAINER: Final = frozenset({Fault.TRAJECTORY, Fault.RANK, Fault.NAN, Fault.POLICY, Fault.POISON})
"""What the trainer is told to do to itself, at a step that is fixed beforehand."""

_CALLS: Final = frozenset({Fault.PAUSE, Fault.WEIGHTS})
_STRUCK: Final = {Fault.DETOKENIZER: "detokenizer", Fault.PARENT: "server"}


def strike(fault: Fault, pid: int) -> float | None:
    """
    Do it.

    Args:
        fault: what to do; some are the trainer's own doing, `pause` and `weights` are calls.
        pid: the server's parent process, or the trainer; one of the demo's own.

    Returns:
        The moment, in monotonic seconds; None when this fault is not done to a process.

    Raises:
        ProcessLookupError: there is no such process to strike.

    """
    if fault in {Fault.NONE, Fault.ACTOR} or fault in _CALLS | INSIDE_THE_TRAINER:
        return None
    if fault is Fault.TRAINER:
        at = clock.monotonic()
        os.kill(pid, signal.SIGKILL)
        return at
    role = _STRUCK.get(fault, "scheduler")
    struck = [known for known in proc.tree(pid) if known.role == role]
    if not struck:
        raise ProcessLookupError(f"the server (pid {pid}) has no {role} to strike")
    what = signal.SIGSTOP if fault is Fault.HANG else signal.SIGKILL
    at = clock.monotonic()
    os.kill(struck[0].pid, what)
    return at


def grader_of(trainer: int) -> int:
    """
    The pid of a worker process that grades for this trainer.

    Raises:
        ProcessLookupError: it has none.

    """
    for known in proc.tree(trainer):
        with suppress(OSError):
            if b"stepguard_grpo.grading" in Path(f"/proc/{known.pid}/cmdline").read_bytes():
                return known.pid
    raise ProcessLookupError(f"the trainer (pid {trainer}) has no worker process that grades")


def pause_generation(url: str, mode: str) -> float:
    """
    Ask a server to pause, as somebody else's script would; returns the moment, in monotonic seconds.

    Args:
        url: the server.
        mode: SGLang's: `abort`, `in_place` or `retract`.

    Raises:
        httpx.HTTPError: it did not.

    """
    at = clock.monotonic()
    _post(url, "/pause_generation", {"mode": mode})
    return at


def strike_rollouts(fault: Fault, pid: int, url: str) -> float | None:
    """
    Do it to a server in which rollouts are under way: between two of them nobody would score a failure.

    Args:
        fault: one that kills the scheduler.
        pid: the server's parent process, one of the demo's own.
        url: the server.

    Returns:
        The moment, in monotonic seconds; None where no rollout was under way, and nothing was done.

    Raises:
        ProcessLookupError: there is no such process to strike.
        httpx.HTTPError: the server does not say what it does.

    """
    if not _requests_are_open(url):
        return None
    schedulers = [known.pid for known in proc.tree(pid) if known.role == "scheduler"]
    # What waits for a scheduler that stands still waits until its end.
    for scheduler in schedulers:
        os.kill(scheduler, signal.SIGSTOP)
    at = None
    try:
        if _requests_are_open(url):
            at = strike(fault, pid)
    finally:
        if at is None:
            for scheduler in schedulers:
                os.kill(scheduler, signal.SIGCONT)
    return at


def load_weights(url: str, model: Path, version: str) -> float | None:
    """
    Load other weights into a server, as a script does that pauses, loads and continues.

    Only while rollouts wait in it. It would harm nobody between them, where the trainer's own push puts the
    weights right; and two loads at once into a paused SGLang kill it, which is another fault than this one
    (docs/sglang.md). A trainer that waits for rollouts pushes nothing.

    Args:
        url: the server.
        model: a folder of weights that the server can read.
        version: what it is to call them.

    Returns:
        The moment, in monotonic seconds; None where no rollout was under way, and nothing was loaded.

    Raises:
        httpx.HTTPError: it did not.

    """
    at = pause_generation(url, PauseMode.IN_PLACE.value)
    try:
        if not _rollouts_wait(url):
            return None
        # A flush would be refused while requests run, with the weights changed all the same.
        body = {"model_path": str(model), "weight_version": version, "flush_cache": False}
        _post(url, "/update_weights_from_disk", body, timeout_s=_LOAD_TIMEOUT_S)
    finally:
        continue_generation(url)
    return at


def _rollouts_wait(url: str) -> bool:
    """Whether a server that was told to pause holds requests, which now end no sooner than it goes on."""
    with httpx.Client(base_url=url, timeout=_CALL_TIMEOUT_S, trust_env=False) as http:
        # Answered by the scheduler, after the pause: what had ended before has left by then.
        http.get("/server_info").raise_for_status()
    return _requests_are_open(url)


def _requests_are_open(url: str) -> bool:
    """By the parent's count, which it gives also while its scheduler stands still."""
    with httpx.Client(base_url=url, timeout=_CALL_TIMEOUT_S, trust_env=False) as http:
        return bool(open_requests(http.get("/metrics").raise_for_status().content))


def continue_generation(url: str) -> None:
    """Ask it to go on; httpx.HTTPError when it did not."""
    _post(url, "/continue_generation", {})


def _post(url: str, path: str, body: Mapping[str, object], *, timeout_s: float = _CALL_TIMEOUT_S) -> None:
    with httpx.Client(base_url=url, timeout=timeout_s, trust_env=False) as http:
        http.post(path, json=body).raise_for_status()
