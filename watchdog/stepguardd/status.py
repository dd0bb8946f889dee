"""The daemon's state as people and programs read it: one JSON-able object. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import stepguard

from .core import budget, ledger
from .core.events import Answer
from .core.state import Incident, Server, ServerState, State
from .oneline import one_line


def of(
    state: State,
    *,
    run: str,
    state_dir: str,
    urls: Mapping[str, str],
    now: float,
    started_at: float,
    stream: Mapping[str, object] | None,
    notes: Sequence[str],
    lost_rows: int,
    journal_failure: str | None,
) -> dict[str, object]:
    """
    Everything that `stepguard status` shows.

    Args:
        state: the daemon's state.
        run: the run's name.
        state_dir: where its journal and its reports are.
        urls: each server's address.
        now: seconds of the monotonic clock.
        started_at: when the daemon came up, on the same clock.
        stream: the logged stream that is followed, as its reader tells of it; None where there is none.
        notes: what a person should know about that stream.
        lost_rows: journal rows that the disk did not take.
        journal_failure: why, when the newest write failed.

    """
    settings = state.settings
    left = [
        budget.left(server.budget, now=now, limit=settings.restart_budget, window_s=server.window_s(settings))
        for server in state.servers
    ]
    warnings = list(notes)
    if journal_failure is not None:
        warnings.append(f"the journal cannot be written: {journal_failure}")
    if lost_rows:
        warnings.append(f"{lost_rows} rows were lost to the journal")
    return {
        "run": run,
        "state_dir": state_dir,
        "mode": state.mode.value,
        "breaker": {
            "phase": state.phase.value,
            "since_s": round(now - state.phase_since, 3) if state.phase_since else round(now - started_at, 3),
            "reason": _why(state),
            "probation_left": state.probation_left,
        },
        "gate": gate(state),
        "trainer": _trainer(state, now),
        "checkpoints": [_checkpoint(row, settings.proven_after_steps) for row in state.checkpoints[-8:]],
        "relaunch": None if state.relaunch is None else state.relaunch.stage.value,
        "servers": [_server(server, urls, now) for server in state.servers],
        "incident": _incident(state.incident, now),
        "last_incident": _incident(state.last_incident, now),
        "incidents": state.incidents,
        "budget": {
            "restarts_left": min(left, default=None),
            "restart_budget": settings.restart_budget,
            "restart_window_s": settings.restart_window_s,
        },
        "stream": None if stream is None else {**stream, "step": state.stream_step},
        "rewards": [number(value) for value in state.rewards],
        "refused_batches": state.refused_batches,
        "warnings": warnings,
        "version": stepguard.__version__,
        "uptime_s": round(now - started_at, 3),
    }


_PROMPTS_NAMED: Final = 16


def prompts(state: State, withheld: Sequence[str]) -> dict[str, object] | None:
    """
    Prompts that are suspected of killing a server, and those that are not sent any more; None without any.

    Args:
        state: the daemon's state.
        withheld: the keys in the run's quarantine, oldest first.

    """
    suspects = state.suspects.apart
    if not suspects and not withheld:
        return None
    return {
        "crashes": state.suspects.crashes if suspects else 0,
        "suspected": len(suspects),
        "suspects": list(suspects[:_PROMPTS_NAMED]),
        "withheld": len(withheld),
        "quarantine": list(withheld[-_PROMPTS_NAMED:]),
    }


_UNOFFERED: Final = {
    "ready": "a pause shows only by requests that wait",
    "metrics": "requests and tokens are unknown: start it with --enable-metrics",
    "server_info": "a pause is not told from a freeze",
    "loads": "its scheduler's snapshots are not seen",
    "health": "it cannot be asked for a token",
}
_NAMED_MAX: Final = 3


def unseen(state: State) -> dict[str, str]:
    """What is unknown of servers and why, by what would tell it; nothing before it was looked for."""
    found = {}
    for endpoint, loss in _UNOFFERED.items():
        lacking = [server.name for server in state.servers if _lacks(server, endpoint)]
        if lacking:
            path = "/v1/loads" if endpoint == "loads" else f"/{endpoint}"
            found[path] = f"not offered by {_few(lacking)}: {loss}"
    usable = {ServerState.SERVING, ServerState.PLANNED}
    afar = [server.name for server in state.servers if server.state in usable and not server.procs]
    if afar:
        lost = "a death shows by the port alone, a stopped process by its silence"
        found["processes"] = f"those of {_few(afar)} are not seen from here: {lost}"
    return found


def _lacks(server: Server, endpoint: str) -> bool:
    """Whether it has no such endpoint, or one that tells nothing that is known here."""
    said = getattr(server.endpoints, endpoint)
    untold = endpoint == "metrics" and said is Answer.OK and server.tokens is None
    return said is Answer.NOT_OFFERED or untold


def _few(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_MAX
    return ", ".join(names[:_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


def line(state: State) -> str:
    """The breaker's phase and what it rests on, as `systemctl status` shows it."""
    serving = sum(server.state is ServerState.SERVING for server in state.servers)
    words = [state.phase.value, f"mode {state.mode.value}", f"gate {state.gate.order.value}"]
    words.append(f"{serving} of {len(state.servers)} servers serving")
    why = _why(state)
    return one_line(", ".join(words) + (f": {why}" if why else ""))


def gate(state: State) -> dict[str, object]:
    """What the gate page says."""
    return {
        "order": state.gate.order.value,
        "generation": state.gate.generation,
        "reason": state.gate.reason,
        "judged_step": state.gate.judged_step,
        "judged_ok": state.gate.judged_ok,
    }


def _why(state: State) -> str | None:
    if state.incident is not None:
        return state.incident.reason.value
    if state.pause is not None:
        by = f"paused by {state.pause.who}"
        return f"{by}: {state.pause.why}" if state.pause.why else by
    return None


def _trainer(state: State, now: float) -> dict[str, object]:
    trainer = state.trainer
    return {
        "pid": trainer.pid,
        "alive": trainer.alive,
        "step": trainer.step,
        "committed_step": trainer.committed_step,
        "attempt": trainer.attempt,
        "left": trainer.left,
        "launches": trainer.launches,
        "phase": trainer.phase,
        "reward": number(state.rewards[-1]) if state.rewards else None,
        "weight_version": trainer.weight_version,
        "beat_age_s": None if trainer.beats_at is None else round(now - trainer.beats_at, 3),
    }


def _checkpoint(row: ledger.LedgerRow, proven_after: int) -> dict[str, object]:
    return {
        "step": row.step,
        "attempt": row.attempt,
        "path": row.path,
        "verdict": row.verdict.value,
        "reason": row.reason,
        "healthy_steps": row.healthy_steps,
        "proven": ledger.proven(row, proven_after),
        "inside_incident": row.inside,
        "set_aside": row.set_aside,
        "gone": row.gone,
        "pinned": row.pinned_path,
        "reward": number(row.reward),
        "kl": number(row.kl),
        "gradient_norm": number(row.gradient_norm),
    }


def _server(server: Server, urls: Mapping[str, str], now: float) -> dict[str, object]:
    return {
        "name": server.name,
        "url": urls.get(server.name),
        "node": server.node,
        "state": server.state.value,
        "reason": None if server.reason is None else server.reason.value,
        "since_s": round(now - server.since, 3),
        "pid": server.procs[0].pid if server.procs else None,
        "processes": len(server.procs),
        "stopped": list(server.stopped),
        "stuck_in_kernel": list(server.stuck_in_kernel()),
        "weight_version": server.weight_version,
        "stage": None if server.repair is None else server.repair.stage.value,
        "restarts": server.restarts,
    }


def _incident(incident: Incident | None, now: float) -> dict[str, object] | None:
    if incident is None:
        return None
    resumed, closed = incident.resumed_at, incident.closed_at
    return {
        "id": incident.number,
        "cause": incident.reason.value,
        "server": incident.server,
        "onset_step": incident.onset_step,
        "opened_s": round(now - incident.opened_at, 3),
        "opened_at": incident.opened_at,
        "resumed_at": resumed,
        "closed_at": closed,
        "held_s": round((now if resumed is None else resumed) - incident.opened_at, 3),
        "restarts": incident.restarts,
        "resyncs": incident.resyncs,
        "rollbacks": incident.rollbacks,
        "relaunches": incident.relaunches,
        "refused_batches": incident.refused_batches,
        "evidence": list(incident.evidence),
        "known_to": incident.known_to,
        "stage": "held" if resumed is None else ("probation" if closed is None else "closed"),
        "actions": list(incident.actions),
    }


def number(value: float | None) -> float | str | None:
    """A figure for JSON, which has no NaN: it is spelled as a word, and null stays unknown."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
