"""
What a message about the run may say: the facts beside a notice, as they stood when it was noted.

Kept with the notice in the journal, so that a daemon that was killed writes the same message afterwards.
"""

from dataclasses import dataclass
from math import isfinite

from .. import budget
from ..breaker import Phase
from ..diagnosis import NAMES, Evidence, Fact, rank
from ..events import Event, OperatorAsked, ProcessExited
from ..reasons import Reason
from ..state import GateOrder, Incident, Mode, Server, ServerState, State, Trip

REWARDS_BEFORE = 10

_FACTS = {
    Reason.SERVER_DIED: Fact.SERVER_CRASHED,
    Reason.SERVER_STOPPED: Fact.SERVER_HUNG,
    Reason.SERVER_HUNG: Fact.SERVER_HUNG,
    Reason.SERVER_SPINNING: Fact.SERVER_HUNG,
    Reason.SERVER_UNREACHABLE: Fact.SERVER_UNREACHABLE,
    Reason.STALE_WEIGHTS: Fact.WEIGHTS_STALE,
    Reason.REWARD_COLLAPSE: Fact.FELL_TO_CONSTANT,
    Reason.REWARD_START_LEVEL: Fact.FELL_TO_START,
    Reason.REWARD_LEVEL_FALL: Fact.LEVEL_FELL,
    Reason.REWARD_DECAY: Fact.DECAYED,
    Reason.REWARD_STUCK: Fact.STUCK,
    Reason.REWARD_VARIANCE_COLLAPSE: Fact.SAME_SCORES,
    Reason.REWARD_NOT_FINITE: Fact.NOT_FINITE,
    Reason.LOSS_NOT_FINITE: Fact.LOSS_NOT_FINITE,
    Reason.GRAD_NOT_FINITE: Fact.LOSS_NOT_FINITE,
    Reason.ZERO_STREAK: Fact.STAYED_CONSTANT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """
    The run beside one notice. None is unknown.

    Args:
        mode: how far the daemon may go by itself.
        phase: the breaker's.
        order: what the gate says.
        incident: the incident that the notice belongs to.
        server: the state of the incident's server.
        stage: what its repair is at.
        managed: whether Stepguard may restart it.
        committed_step: the newest optimizer step that was taken.
        garbage_steps: optimizer steps taken since the onset of a fall of the reward, before it was held.
        reward_before: the mean of the last healthy steps.
        reward_now: the newest finite one.
        restarts_left: of the incident's server, within its window.
        probation_left: steps until the incident ends by itself.
        person: whether nothing goes on until a person decides.
        stop_in_s: when nobody does, the trainer is told to save and stop after this long.

    """

    mode: Mode
    phase: Phase
    order: GateOrder
    incident: Incident | None = None
    server: ServerState | None = None
    stage: str | None = None
    managed: bool = True
    committed_step: int | None = None
    garbage_steps: int | None = None
    reward_before: float | None = None
    reward_now: float | None = None
    restarts_left: int | None = None
    probation_left: int = 0
    person: bool = False
    stop_in_s: float | None = None


def about(state: State, incident: Incident | None, now: float) -> About:
    """The facts of this moment."""
    settings = state.settings
    rewards = [value for value in state.rewards if value is not None and isfinite(value)]
    server = next(
        (one for one in state.servers if incident is not None and one.name == incident.server), None
    )
    committed, garbage = state.trainer.committed_step, None
    onset = None if state.trip is None else state.trip.onset_step
    if onset is not None and committed is not None:
        garbage = max(0, committed - onset + 1)
    lockout = state.lockout
    left = None
    if server is not None:
        limit, window_s = settings.restart_budget, server.window_s(settings)
        left = budget.left(server.budget, now=now, limit=limit, window_s=window_s)
    return About(
        mode=state.mode,
        phase=state.phase,
        order=state.gate.order,
        incident=incident,
        server=None if server is None else server.state,
        stage=None if server is None or server.repair is None else server.repair.stage.value,
        managed=server is None or server.managed,
        committed_step=committed,
        garbage_steps=garbage,
        reward_before=sum(rewards[-REWARDS_BEFORE:]) / len(rewards[-REWARDS_BEFORE:]) if rewards else None,
        reward_now=rewards[-1] if rewards else None,
        restarts_left=left,
        probation_left=state.probation_left,
        person=_waits_for_a_person(state),
        stop_in_s=None if lockout is None else max(0.0, lockout.since + settings.locked_out_hold_s - now),
    )


def _waits_for_a_person(state: State) -> bool:
    """Whether the run is held, and nothing that the daemon may do will let it go on."""
    if state.phase is Phase.SHADOW:
        return False
    if state.lockout is not None or state.pause is not None:
        return True
    if state.trip is not None and state.trip.kind == "called":
        return True
    held = state.gate.order is not GateOrder.GO or state.phase is Phase.OPEN
    down = [server for server in state.servers if not server.usable]
    idle = all(server.repair is None or server.repair.stage.value == "watch" for server in down)
    return held and bool(down) and idle and (state.mode is not Mode.ACT or not any(s.managed for s in down))


def evidence(state: State, reason: Reason, event: Event | None, now: float) -> tuple[str, ...]:
    """
    What speaks for an incident when it opens: how sure its likeliest cause is, then the figures.

    Args:
        state: as it is when the incident opens.
        reason: what holds the run.
        event: what the daemon was told just now.
        now: seconds of the monotonic clock.

    """
    if isinstance(event, OperatorAsked) and event.verb in {"restart-server", "rollback"}:
        # A person needs no evidence, and what the servers did at that moment is none.
        return (f"asked for by {event.who}: {event.why or 'no reason given'}",)
    lines = []
    fact = _FACTS.get(reason)
    if fact is not None:
        ranked = rank([Evidence(fact=fact, time="now", source="the daemon", text=reason.value)])
        if ranked:
            lines.append(f"{ranked[0].confidence:.0%} sure: {NAMES[ranked[0].cause]}")
    if state.trip is not None:
        lines += _of_the_reward(state.trip)
    down = next((server for server in state.servers if not server.usable), None)
    if down is not None:
        lines += _of_a_server(down, state, event, now)
    return tuple(lines)


def _of_the_reward(trip: Trip) -> list[str]:
    """The judge's own figures, in words where they are the ones that people know."""
    known = dict(trip.evidence)
    lines = []
    if "value" in known and "baseline" in known:
        lines.append(f"reward {known['value']:.3g}, where this run's level was {known['baseline']:.3g}")
    elif "level" in known and "baseline" in known:
        lines.append(f"reward near {known['level']:.3g}, where this run's level was {known['baseline']:.3g}")
    if "nats" in known and "threshold_nats" in known:
        lines.append(
            f"evidence {known['nats']:.3g} nats; a hold takes {known['threshold_nats']:.3g}, "
            "which chance reaches less than once in a million steps"
        )
    told = {"value", "baseline", "level", "nats", "threshold_nats"} if lines else set()
    rest = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in trip.evidence if name not in told]
    return lines + ([", ".join(rest[:3])] if rest and len(lines) < 2 else [])


def _of_a_server(server: Server, state: State, event: Event | None, now: float) -> list[str]:
    lines = []
    name = server.name
    if isinstance(event, ProcessExited) and event.server == name:
        code = event.code
        how = "" if code is None else (f" by signal {-code}" if code < 0 else f" with exit code {code}")
        lines.append(f"{name}'s {event.proc.role} process (pid {event.proc.pid}) ended{how}")
    elif server.stopped:
        lines.append(f"process {server.stopped[0]} of {name} stands still (state T) in two looks")
    elif server.failed_probes:
        lines.append(f"{server.failed_probes} probes of {name} in a row had no answer")
    elif server.running and server.tokens_at is not None:
        busy = "a processor is busy" if server.busy_at == server.sampled_at else "no processor is busy"
        quiet_s = now - server.tokens_at
        lines.append(f"{name} runs {server.running} requests, gave no token for {quiet_s:.0f} s, and {busy}")
    elif server.reason is Reason.SERVER_DIED:
        lines.append(f"a process that {name} cannot do without is gone")
    served, wanted = server.weight_version, state.trainer.weight_version
    if server.state is ServerState.STALE and served is not None and wanted is not None:
        lines.append(f"{name} serves weights {served}, the trainer is at {wanted}")
    return lines
