"""
What the core wants done: a closed union of frozen values.

A command with an `intent` is an effect: journalled before it is begun, ended by an `EffectEnded` of the
same intent.
Effects are written as *ensure*: each looks at the world first and does only what is missing, so the same
intent may be carried out again after a crash of the daemon.
"""

from dataclasses import dataclass

from .alerts.facts import About
from .events import GpuBaseline, Proc
from .state import Gate


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishGate:
    """Write this on the gate page, before anything else. Idempotent, so it needs no intent."""

    gate: Gate


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkPrompts:
    """
    Tell the guard, by files in the run's folder, which prompts to send apart and which never.

    Idempotent and carried out before its row, as the gate page is: a daemon that dies between marks again.
    """

    suspects: tuple[str, ...] = ()
    quarantine: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinueServer:
    """Send SIGCONT to the stopped processes of a server."""

    intent: str
    server: str
    procs: tuple[Proc, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopServer:
    """End a server's whole tree, TERM then KILL, and see its port free and its GPU memory given back."""

    intent: str
    server: str
    procs: tuple[Proc, ...]
    gpu_baseline: tuple[GpuBaseline, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StartServer:
    """
    Start a server. The process carries the intent, so that it is found again and never started twice.

    `arguments` are SGLang's flags that are to have another value than the server's own command gives them.
    """

    intent: str
    server: str
    arguments: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCanary:
    """See that a server generates: a few concurrent requests of in-vocabulary ids, all of them answered."""

    intent: str
    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PushWeights:
    """
    Load the trainer's current weights from disk into a server, and see that it says so.

    With `anew` also into one that says so already.
    """

    intent: str
    server: str
    version: str
    anew: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareWeights:
    """See what a server's weights show of themselves, beside those of another one of the same version."""

    intent: str
    server: str
    other: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequests:
    """End every request of a server with wrong weights: who waits for the answers fails fast."""

    intent: str
    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseGeneration:
    """Let a server's requests wait, those that run and those that come."""

    intent: str
    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinueGeneration:
    """Let a server's requests go on; nothing to do for one that is not paused, or not there."""

    intent: str
    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRollback:
    """
    Find the newest proven checkpoint from before a step, set newer ones aside, move the marker.

    Without a step it is for a relaunch: the newest proven one of all, and where nothing was saved yet, none.
    """

    intent: str
    before_step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StopTrainer:
    """End the trainer's whole tree, TERM then KILL."""

    intent: str
    procs: tuple[Proc, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTrainer:
    """
    Start the trainer. It carries the intent, so that it is found again and never started twice.

    Args:
        target_step, target_path: what it is to resume from; None leaves that to the trainer.
        skip_steps: whose batches crashed it twice.

    """

    intent: str
    target_step: int | None = None
    target_path: str | None = None
    skip_steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Notify:
    """
    Tell people, and keep it in the incident's record.

    `about` is the run beside it; None in journals of versions without alerts.
    """

    incident: int | None
    what: str
    reason: str
    text: str
    about: About | None = None


Effect = (
    ContinueServer
    | StopServer
    | StartServer
    | RunCanary
    | PushWeights
    | CompareWeights
    | AbortRequests
    | PauseGeneration
    | ContinueGeneration
    | PrepareRollback
    | StopTrainer
    | StartTrainer
)
Command = PublishGate | MarkPrompts | Notify | Effect
