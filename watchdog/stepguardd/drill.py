"""
Drills: a real fault in somebody's staging run, and what became of it, measured.

The moment of the strike and the incident's own times are of one clock (CLOCK_MONOTONIC), so their difference
is a measurement. What is not known is None. A process that a drill stopped is continued when the drill ends.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from . import clock, proc
from .control.client import ControlClient, ControlError, NoDaemonError
from .control.contract import SOCKET_NAME
from .core.events import Proc
from .incidents.folders import DATA, folder_of

_POLL_S: Final = 0.1
_REPORT_WITHIN_S: Final = 20.0


class DrillFault(StrEnum):
    """What is done to a server."""

    KILL = "kill"
    HANG = "hang"
    DETOKENIZER = "detokenizer"
    PARENT = "parent"


STORIES: Final = {
    DrillFault.KILL: "SIGKILL to the server's scheduler",
    DrillFault.HANG: "SIGSTOP to the server's scheduler",
    DrillFault.DETOKENIZER: "SIGKILL to the server's detokenizer",
    DrillFault.PARENT: "SIGKILL to the server's parent process",
}
_ROLES: Final = {DrillFault.DETOKENIZER: "detokenizer", DrillFault.PARENT: "server"}


class DrillError(Exception):
    """Nothing was struck; the message is one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """
    One drill.

    Args:
        run_dir: of the run, whose daemon answers there.
        state_dir: where its reports are.
        fault: what is done.
        server: to which server; None: the first.
        timeout_s: from the strike until the incident is closed.

    """

    run_dir: Path
    state_dir: Path
    fault: DrillFault
    server: str | None = None
    timeout_s: float = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorecard:
    """
    What became of it; None is not known, or did not happen.

    Args:
        fault: what was done.
        server: to whom.
        role: which of its processes was struck.
        pid: the process.
        incident: the number of the incident that it became.
        cause: as Stepguard called it.
        detect_s: from the strike to the incident's opening.
        hold_s: from there until the trainer was let go on.
        recover_s: from the strike until the incident was closed, its probation passed.
        restarts: of the server.
        garbage_steps: optimizer steps on garbage, as the incident's report counts them.
        why: why it is not passed; "" when it is.

    """

    fault: DrillFault
    server: str
    role: str
    pid: int
    incident: int | None = None
    cause: str | None = None
    detect_s: float | None = None
    hold_s: float | None = None
    recover_s: float | None = None
    restarts: int | None = None
    garbage_steps: int | None = None
    why: str = ""

    @property
    def passed(self) -> bool:
        """Detected, held, recovered, and no step on garbage that is known of."""
        return not self.why

    def plain(self) -> dict[str, object]:
        """As `--json` prints it."""
        return {**asdict(self), "fault": self.fault.value, "passed": self.passed}


def rehearse(plan: Drill, tell: Callable[[str], None]) -> Scorecard:
    """
    Strike, and look on until the incident is closed or the time is over.

    Args:
        plan: what is done, to which run.
        tell: called with a line for each turn of events.

    Raises:
        DrillError: the run is not fit for a drill now, or has no such process. Nothing was struck.

    """
    with ControlClient(plan.run_dir / SOCKET_NAME) as client:
        server, target = _target(plan, client)
        with _struck(plan.fault, target) as at:
            tell(f"struck: {STORIES[plan.fault]} {server} (pid {target.pid})")
            seen = _incident_after(client, at, plan.timeout_s, tell)
    card = Scorecard(fault=plan.fault, server=server, role=target.role, pid=target.pid)
    return _judged(card, seen, at, plan)


def _target(plan: Drill, client: ControlClient) -> tuple[str, Proc]:
    """The server's name and the process to strike, of a run that is well."""
    try:
        status: Mapping[str, Any] = client.status()
    except NoDaemonError as error:
        raise DrillError(f"no daemon at {error}; start one with: stepguard run --config FILE") from None
    except ControlError as error:
        raise DrillError(str(error)) from None
    servers = {one["name"]: one for one in status.get("servers") or []}
    name = plan.server or next(iter(servers), None)
    if name is None or name not in servers:
        known = ", ".join(servers) or "none"
        raise DrillError(f"the run has no server {name or 'at all'}; its servers: {known}")
    if status.get("incident") is not None or status.get("breaker", {}).get("phase") != "closed":
        raise DrillError("the run is not well now; drill when `stepguard status` says GOING")
    if not status.get("trainer", {}).get("alive"):
        raise DrillError("no trainer is under way: nothing would have to be protected")
    root, role = servers[name].get("pid"), _ROLES.get(plan.fault, "scheduler")
    if servers[name].get("state") != "serving" or root is None:
        raise DrillError(f"{name} is not serving from a process that is seen here")
    found = [known for known in proc.tree(root) if known.role == role]
    if not found:
        raise DrillError(f"{name} (pid {root}) has no {role} process here")
    return name, found[0]


@contextmanager
def _struck(fault: DrillFault, target: Proc) -> Iterator[float]:
    """The moment of the strike; whoever was stopped goes on at the end, whatever happened meanwhile."""
    hang = fault is DrillFault.HANG
    at = clock.monotonic()
    try:
        os.kill(target.pid, signal.SIGSTOP if hang else signal.SIGKILL)
    except OSError as error:
        raise DrillError(f"cannot strike pid {target.pid}: {error.strerror}") from None
    try:
        yield at
    finally:
        if hang and proc.alive(target):
            with suppress(OSError):
                os.kill(target.pid, signal.SIGCONT)


def _incident_after(
    client: ControlClient, at: float, timeout_s: float, tell: Callable[[str], None]
) -> Mapping[str, Any] | None:
    """The first incident that opened after a moment, as it was seen last: closed, or when time was up."""
    seen: Mapping[str, Any] | None = None
    told: set[str] = set()
    while clock.monotonic() < at + timeout_s:
        # A daemon that is away is started again by others; its journal keeps the incident's times.
        with suppress(NoDaemonError, ControlError):
            status: Mapping[str, Any] = client.status()
            for found in (status.get("last_incident"), status.get("incident")):
                if found is not None and found["opened_at"] >= at and _same(found, seen):
                    seen = found
        if seen is not None:
            stage = str(seen["stage"])
            if stage not in told:
                told.add(stage)
                tell(f"{clock.monotonic() - at:.1f} s: incident {seen['id']} ({seen['cause']}), {stage}")
            if seen["closed_at"] is not None:
                break
        time.sleep(_POLL_S)
    return seen


def _same(found: Mapping[str, Any], seen: Mapping[str, Any] | None) -> bool:
    return seen is None or bool(found["id"] == seen["id"])


def _judged(card: Scorecard, seen: Mapping[str, Any] | None, at: float, plan: Drill) -> Scorecard:
    figures = {key: value for key, value in asdict(card).items() if key != "why"}
    if seen is None:
        return Scorecard(**{**figures, "why": f"not detected within {plan.timeout_s:g} s"})
    opened, resumed, closed = seen["opened_at"], seen["resumed_at"], seen["closed_at"]
    garbage = None if closed is None else _garbage(plan.state_dir, seen["id"])
    why = ""
    if seen.get("server") not in {None, card.server}:
        why = f"the incident is of another server: {seen['server']}"
    elif resumed is None:
        why = f"still held after {plan.timeout_s:g} s; see `stepguard status`"
    elif closed is None:
        why = f"probation not passed within {plan.timeout_s:g} s: does the trainer take steps?"
    elif garbage:
        why = f"{garbage} optimizer steps on garbage"
    figures |= {
        "incident": seen["id"],
        "cause": seen["cause"],
        "detect_s": round(opened - at, 4),
        "hold_s": None if resumed is None else round(resumed - opened, 3),
        "recover_s": None if closed is None else round(closed - at, 3),
        "restarts": seen.get("restarts"),
        "garbage_steps": garbage,
        "why": why,
    }
    return Scorecard(**figures)


def _garbage(state_dir: Path, number: int) -> int | None:
    """The count of a closed incident's report, written a moment after it closed; None without one."""
    deadline = clock.monotonic() + _REPORT_WITHIN_S
    path = folder_of(state_dir, number) / DATA
    while clock.monotonic() < deadline:
        with suppress(OSError, ValueError, KeyError, TypeError):
            report = json.loads(path.read_text())
            if report["stage"] == "closed":
                return int(report["cost"]["garbage_steps"])
        time.sleep(_POLL_S)
    return None
