"""
The judgement on one observation after another: OK, a warning, or hold this batch.

Pure: no clock, no I/O, no randomness, no logging. The order of the questions is the order of their weight.
Not a number at all? Then: is it a constant where none belongs, next to nothing, the starting level, a fall
that a second witness confirms, or one that goes on and on? Each of these holds. A fall that settles at a new
level is a warning, with a grace in which a hold needs a second witness; after it the new level is accepted.

A held or refused observation never enters the baseline. After a hold the judgement stays tripped until the
stream is back at the baseline from before the incident; a new attempt (rollback, relaunch) or `acknowledge`
ends it as well.
"""

from __future__ import annotations

from math import isfinite, log, log1p

from stepguardd.core.reasons import Reason
from stepguardd.core.reward import falls, runs, witnesses
from stepguardd.core.reward.baseline import (
    Model,
    absorb,
    adopt,
    is_calm,
    learn,
    level_at,
    model_of,
    release,
)
from stepguardd.core.reward.model import (
    Dips,
    Episode,
    Fall,
    Kind,
    Learned,
    Level,
    Observation,
    RewardConfig,
    RewardState,
    Run,
    Trip,
    Verdict,
    Witness,
)

__all__ = ["acknowledge", "observe", "silence", "start"]

Figures = tuple[tuple[str, float], ...]

_OK = Verdict()
_new = tuple.__new__  # without the detour through Python that a named tuple's own constructor takes

_HUGE = 1e100  # no reward; what is larger counts as infinite, and no square of what is smaller overflows
_SUSPICIOUS_NATS = 2.0  # from here on values wait before they enter the baseline
_BACK_NATS = 3.0  # 20 to 1 that the stream is back
_ACCEPTED = 4  # values at a level that a person let go, before it is the baseline
_SHORT = 4  # values: no run of equal ones that is shorter can be stuck
_EPISODE_GAP = 10  # quiet steps that end a warning
_WITNESSED_NATS = 3.0  # what the reward itself must say for a second witness to count
_WITNESS_NATS = 4.0  # what a second witness must say to count
# For "exactly the starting level" against "some other level": a switch rarely lands there. Every switch that
# this run has had makes another one more likely than stale weights, and so the threshold higher.
_START_ODDS = 5.0
_USUAL_DIPS = 2  # falls that ended by themselves, before another like them is no news
_DIPS_MEMORY = 1000  # steps after the last of them
_START_STEPS = 4, 12  # since the onset; later the odds would be asked too often, and a climb may pass by
_TREND_NATS = 7.0
_TREND_STEPS = 8
_DECAYED_SIGMAS = 8.0
_DECAYED = 0.36  # of the baseline's height: what a decay may leave before it is held


def start(config: RewardConfig) -> RewardState:
    """The state before the first observation."""
    assert config.run_nats > 0
    return RewardState()


def observe(config: RewardConfig, state: RewardState, seen: Observation) -> tuple[RewardState, Verdict]:
    """
    The state and the verdict after one observation.

    Args:
        config: the settings; the same in every call on one state.
        state: from `start` or the last call.
        seen: the observation. Going back, or another attempt, is a restart from an older checkpoint.

    """
    attempt, step, value, _, failed, spread, metrics, marks = seen
    if state.step is not None and (attempt != state.attempt or step < state.step):
        state = _restarted(state, seen)
    if metrics or marks or failed is not None or spread is not None or state.witnesses is not None:
        state = _with_witnesses(state, seen)
        if (fault := witnesses.broken(seen)) is not None:
            return _not_finite(state, seen, fault[0])
    if value is None:
        return _unknown(config, state, seen)
    if not -_HUGE < value < _HUGE:  # nor is NaN
        return _not_finite(state, seen, Reason.REWARD_NOT_FINITE)
    if state.trip is not None and state.trip.level is not None:
        return _while_tripped(config, state, seen, value)
    if is_calm(state.baseline, state.learned, value) and _is_at_rest(config, state, seen, value):
        return _calm(config, state, seen, value), _OK
    return _judged(config, state, seen, value)


def _is_at_rest(config: RewardConfig, state: RewardState, seen: Observation, value: float) -> bool:
    """Whether nothing is going on that a calm value could be part of, or end."""
    _, was, baseline, _, run, fall, tracks, others, _, _, episode, trip = state
    spread, metrics = seen.spread, seen.metrics
    return (
        fall is None
        and (run is None or (run.length < _SHORT and not run.rollouts))
        and episode is None
        and trip is None
        and was is not None
        and baseline.seen >= config.warmup_steps
        and (value != 0.0 or value != baseline.last)
        and ((not tracks and others is None) or _no_witness(state))
        and ((not metrics and spread is None) or not _same_spread(state, seen, value))
        and (config.min_reward is None or value >= config.min_reward)
    )


def _calm(config: RewardConfig, state: RewardState, seen: Observation, value: float) -> RewardState:
    """The state after a calm value at rest, which is learned and no more: most steps of a healthy run."""
    _, was, baseline, learned, run, _, tracks, others, _, _, _, _ = state
    if value == baseline.last:
        assert was is not None
        run = Run(value, 2, was) if run is None else Run(value, run.length + 1, run.first_step)
    else:
        run = None
    baseline = absorb(config, baseline, value, False)
    step = seen.step
    if step >= learned.due or not learned.decided:
        baseline, learned = learn(config, baseline, learned, step, value, seen.ok)
    fields = (seen.attempt, step, baseline, learned, run, None, tracks, others, 0, 0, None, None)
    return _new(RewardState, fields)


def _with_witnesses(state: RewardState, seen: Observation) -> RewardState:
    attempt, step, baseline, learned, run, fall, tracks, others, *rest = state
    tracks = witnesses.follow(tracks, seen)
    others = witnesses.testify(others, tracks, seen)
    return _new(RewardState, (attempt, step, baseline, learned, run, fall, tracks, others, *rest))


def _no_witness(state: RewardState) -> bool:
    """Whether no second witness speaks, and no metric is far from where it usually is."""
    others = state.witnesses
    return (others is None or not (others.infra or others.weights)) and (
        not state.tracks or witnesses.are_quiet(state.tracks)
    )


def silence(config: RewardConfig, quiet_s: float) -> Verdict | None:
    """The verdict on a stream that has been silent for `quiet_s` seconds, or None while that is fine."""
    if config.no_step_for_s is None or quiet_s <= config.no_step_for_s:
        return None
    evidence = (("quiet_s", quiet_s), ("no_step_for_s", config.no_step_for_s))
    return Verdict(level=Level.WARN, reason=Reason.REWARD_MISSING, evidence=evidence)


def acknowledge(state: RewardState) -> RewardState:
    """
    The state after a person let the stream go on.

    Whether they mended something or the new level is right, the next values say: back at the baseline, or a
    level that stays becomes the baseline. In between nothing is held.
    """
    baseline, trip = release(state.baseline), state.trip
    if trip is not None and trip.level is not None:
        let_go = trip._replace(back_nats=0.0, accepted=0)
        return state._replace(baseline=baseline, run=None, fall=None, episode=None, trip=let_go)
    if state.fall is not None and state.fall.active:
        values = [v for _, v in state.fall.tail]
        baseline = adopt(baseline, sum(values) / len(values), min(len(values), 20))
    return state._replace(baseline=baseline, run=None, fall=None, episode=None, trip=None)


def _restarted(state: RewardState, seen: Observation) -> RewardState:
    """Back at an older step: its level then is the baseline; no suspicion is carried over."""
    baseline, learned = release(state.baseline), state.learned
    back = state.step is not None and seen.step < state.step
    level = level_at(learned, seen.step)
    if back and level is not None:
        baseline = adopt(baseline, min(level, baseline.level), min(baseline.weight, 10.0))
        history = tuple(past for past in learned.history if past[0] <= seen.step)
        learned = learned._replace(history=history, due=history[-1][0] + learned.stride)
    elif back and learned.start_n:
        # Back in the run's first steps, of which only the mean is known: they are learned anew.
        level = min(learned.start_sum / learned.start_n, baseline.level)
        baseline = adopt(baseline, level, min(baseline.weight, 4.0))
        learned = learned._replace(start_n=0, start_sum=0.0, history=(), due=-1)
    return state._replace(
        attempt=seen.attempt, baseline=baseline, learned=learned, run=None, fall=None, episode=None, trip=None
    )


def _unknown(config: RewardConfig, state: RewardState, seen: Observation) -> tuple[RewardState, Verdict]:
    streak = state.unknown_streak + 1
    state = state._replace(attempt=seen.attempt, step=seen.step, unknown_streak=streak)
    if state.trip is not None and state.trip.accepted is None:
        return state, _still(state.trip, Level.HOLD, ())
    if streak < config.unknown_streak_warn:
        return _quiet(state), _OK
    return _warned(state, seen, Reason.REWARD_MISSING, None, (("rows_without_value", float(streak)),))


def _not_finite(state: RewardState, seen: Observation, reason: Reason) -> tuple[RewardState, Verdict]:
    trip = state.trip or Trip(reason, _kind(state, seen), seen.step, seen.step, None)
    state = state._replace(
        attempt=seen.attempt,
        step=seen.step,
        trip=trip._replace(back_nats=0.0, accepted=None),
        episode=None,
        run=None,
        fall=None,
        baseline=release(state.baseline),
        unknown_streak=0,
    )
    return state, Verdict(
        level=Level.HOLD, reason=reason, kind=trip.kind, onset_step=trip.onset_step, tripped=True
    )


def _judged(
    config: RewardConfig, state: RewardState, seen: Observation, value: float
) -> tuple[RewardState, Verdict]:
    """The verdict on a finite value while nothing is tripped (or only something that was not a number)."""
    baseline, learned, before = state.baseline, state.learned, state.fall
    model = model_of(config, baseline, learned, seen.ok)
    ok = seen.ok or baseline.rollouts or 1
    run = runs.constant_run(config, model, state, state.fall, seen.step, value, ok)
    fall = None
    if model is not None and (state.fall is not None or value < model.level):
        fall = falls.after(config, model, _start_level(model, learned), state.fall, seen.step, value)
    if _is_uneventful(config, state, seen, value, model, run, fall):
        verdict = _OK
    else:
        held = _hold(config, state, seen, value, model, run, fall)
        if held is not None:
            return _tripped(state, seen, value, held)
        if state.fall is not None and state.fall.active and fall is None:
            state = state._replace(episode=None)  # the reward is back where it was
        state, verdict = _warning(config, state._replace(run=run, fall=fall), seen, value, model)
        baseline, learned, run, fall = state.baseline, state.learned, state.run, state.fall
    if model is not None and before is not None and fall is None:
        learned = _dipped(config, learned, model, before)
    # What a warned-about fall shows is not learned; its level is adopted as a whole, or not at all.
    if fall is None or not fall.active:
        suspicious = (run is not None and run.evidence > _SUSPICIOUS_NATS) or (
            fall is not None and (falls.nats(fall) > _SUSPICIOUS_NATS or fall.near > _SUSPICIOUS_NATS)
        )
        baseline = absorb(config, baseline, value, suspicious)
        if not suspicious and (seen.step >= learned.due or not learned.decided):
            baseline, learned = learn(config, baseline, learned, seen.step, value, seen.ok)
    else:
        baseline = baseline._replace(last=value)
    if state.trip is not None:
        verdict = _recovered(verdict)
    fields = (seen.attempt, seen.step, baseline, learned, run, fall, state.tracks, state.witnesses, 0)
    return _new(RewardState, (*fields, state.same_spread, state.episode, None)), verdict


def _dipped(config: RewardConfig, learned: Learned, model: Model, fall: Fall) -> Learned:
    """What is learned from a fall that ended by itself: how deep and how long they are in this run."""
    dip = falls.dip_in(model, fall.tail)
    if dip is None or dip[0] > config.curriculum_grace_steps:
        return learned
    steps, mean, last = dip
    old = learned.dips
    if old is None or last - old.last_step > _DIPS_MEMORY:
        return learned._replace(dips=Dips(1, steps, steps * mean, mean, steps, last))
    return learned._replace(
        dips=Dips(
            old.number + 1,
            old.steps + steps,
            old.total + steps * mean,
            min(old.lowest, mean),
            max(old.longest, steps),
            last,
        )
    )


def _is_usual(learned: Learned, model: Model, step: int, part: falls.Segment) -> bool:
    """Whether this run came back by itself, more than once and lately, from a fall as deep and as long."""
    dips = learned.dips
    if dips is None or dips.number < _USUAL_DIPS or step - dips.last_step > _DIPS_MEMORY:
        return False
    slack = model.sigma / part.steps**0.5
    return part.steps <= 2 * dips.longest and part.level >= dips.lowest - slack


def _is_uneventful(
    config: RewardConfig,
    state: RewardState,
    seen: Observation,
    value: float,
    model: Model | None,
    run: Run | None,
    fall: Fall | None,
) -> bool:
    """Whether it is plain that this observation is neither held nor warned about."""
    if run is not None and (
        run.evidence >= config.warn_nats
        or not runs.is_natural(config, state.baseline, run)
        or (
            value == 0.0
            and _is_streak(config, run.length)
            and not runs.is_sparse(model, state.baseline, run.length)
        )
    ):
        return False
    if fall is not None and (
        fall.active or falls.nats(fall) >= _WITNESSED_NATS or fall.near >= _WITNESSED_NATS
    ):
        return False
    return (
        state.episode is None
        and _no_witness(state)
        and not _same_spread(state, seen, value)
        and (state.fall is None or not state.fall.active)
        and (config.min_reward is None or value >= config.min_reward)
    )


def _is_streak(config: RewardConfig, zeros: int) -> bool:
    warn, hold = config.zero_streak_warn, config.zero_streak_hold
    return (warn is not None and zeros >= warn) or (hold is not None and zeros >= hold)


def _start_level(model: Model, learned: Learned) -> float | None:
    """The run's starting level, where a return to it would be a real fall and more than noise."""
    if learned.start_n < 5:
        return None
    level = learned.start_sum / learned.start_n
    height = model.level - model.floor
    if (
        level > model.level - 0.15 * height
        or (learned.dips is not None and learned.dips.number >= _USUAL_DIPS and level >= learned.dips.lowest)
        or level < model.floor + 0.03 * height
        or level <= 0.0 < model.rollouts
    ):
        return None
    return level if model.shares or model.level - level > 1.5 * model.sigma else None


# --- Holds


def _hold(
    config: RewardConfig,
    state: RewardState,
    seen: Observation,
    value: float,
    model: Model | None,
    run: Run | None,
    fall: Fall | None,
) -> Verdict | None:
    if run is not None and run.evidence >= config.run_nats:
        onset = run.first_step
        if model is not None and fall is not None and fall.tail[0][0] < onset:
            onset = min(onset, falls.segment(model, fall.tail).leaves_at)
        figures = (
            ("value", value),
            ("run_length", float(run.length)),
            ("nats", run.evidence),
            ("threshold_nats", config.run_nats),
            ("baseline", state.baseline.level),
        )
        return _held(state, seen, Reason.REWARD_COLLAPSE, onset, figures)
    if model is not None and fall is not None:
        held = _hold_of_fall(config, state, seen, model, fall)
        if held is not None:
            return held
    streak = config.zero_streak_hold
    long_enough = value == 0.0 and streak is not None and run is not None and run.length >= streak
    if long_enough and run is not None and not runs.is_sparse(model, state.baseline, run.length):
        zeros = (("zeros", float(run.length)), ("zero_streak_hold", float(streak or 0)))
        return _held(state, seen, Reason.ZERO_STREAK, run.first_step, zeros)
    if config.min_reward is not None and value < config.min_reward:
        return _held(
            state, seen, Reason.MIN_REWARD, seen.step, (("value", value), ("min_reward", config.min_reward))
        )
    return None


def _hold_of_fall(
    config: RewardConfig, state: RewardState, seen: Observation, model: Model, fall: Fall
) -> Verdict | None:
    strongest = falls.nats(fall)
    others = state.witnesses
    infra, weights = (others.infra, others.weights) if others is not None else (0.0, 0.0)
    witness = max(infra, weights)
    if fall.near < config.hold_nats and strongest + witness < config.hold_nats:
        return None
    part = falls.segment(model, fall.tail)
    if fall.near >= config.hold_nats:
        figures = _figures(config, model, fall.near, part)
        return _held(state, seen, Reason.REWARD_COLLAPSE, part.leaves_at, figures)
    if strongest >= _WITNESSED_NATS and witness >= _WITNESS_NATS:
        figures = (*_figures(config, model, strongest, part), ("witness_nats", witness))
        stale = weights > infra or (infra < _WITNESS_NATS and _odds_of_start(state, model, part) > 1)
        reason = Reason.REWARD_START_LEVEL if stale else Reason.REWARD_PARTIAL_LOSS
        return _held(state, seen, reason, part.onset, figures)
    if strongest < config.hold_nats:
        return None
    least, most = _START_STEPS
    if fall.start >= config.hold_nats and part.trend_nats < _SUSPICIOUS_NATS and least <= part.steps <= most:
        odds = _odds_of_start(state, model, part)
        if odds >= _START_ODDS * (1 + 2 * state.learned.switches):
            start_level = state.learned.start_sum / state.learned.start_n
            figures = (
                *_figures(config, model, fall.start, part),
                ("starting_level", start_level),
                ("odds", odds),
            )
            return _held(state, seen, Reason.REWARD_START_LEVEL, part.onset, figures)
    left = (part.end - model.floor) / max(model.level - model.floor, 1e-12)
    # A floor that is only the lowest value so far moves with every wobble: then the noise is the measure.
    measured = model.shares or model.floor == 0.0 or model.level - part.end > _DECAYED_SIGMAS * model.sigma
    decayed = measured and left <= _DECAYED
    if part.steps >= _TREND_STEPS and part.trend_nats >= _TREND_NATS and decayed:
        figures = (
            *_figures(config, model, strongest, part),
            ("slope", part.slope),
            ("trend_nats", part.trend_nats),
        )
        return _held(state, seen, Reason.REWARD_DECAY, part.leaves_at, figures)
    return None


def _odds_of_start(state: RewardState, model: Model, part: falls.Segment) -> float:
    learned = state.learned
    if learned.start_n == 0:
        return 0.0
    return falls.start_odds(model, part, learned.start_sum / learned.start_n, learned.start_n)


def _figures(config: RewardConfig, model: Model, nats: float, part: falls.Segment) -> Figures:
    return (
        ("level", part.level),
        ("baseline", model.level),
        ("steps", float(part.steps)),
        ("nats", nats),
        ("threshold_nats", config.hold_nats),
    )


def _held(state: RewardState, seen: Observation, reason: Reason, onset: int, evidence: Figures) -> Verdict:
    return Verdict(
        level=Level.HOLD,
        reason=reason,
        kind=_kind(state, seen),
        onset_step=onset,
        evidence=evidence,
        tripped=True,
    )


def _kind(state: RewardState, seen: Observation) -> Kind:
    """Infrastructure when a second witness says so; policy when only that moved; else unknown."""
    others = state.witnesses
    if others is not None and (others.infra >= _WITNESS_NATS or others.weights >= _WITNESS_NATS):
        return Kind.INFRA
    complete = others is not None and others.complete
    watched = complete or Witness.SERVERS_HEALTHY in seen.witnesses
    if watched and witnesses.policy_moved(state.tracks, complete):
        return Kind.POLICY
    return Kind.UNKNOWN


def _tripped(
    state: RewardState, seen: Observation, value: float, verdict: Verdict
) -> tuple[RewardState, Verdict]:
    onset = seen.step if verdict.onset_step is None else verdict.onset_step
    state = state._replace(
        attempt=seen.attempt,
        step=seen.step,
        baseline=release(state.baseline),
        run=None,
        fall=None,
        unknown_streak=0,
        episode=None,
        trip=Trip(verdict.reason, verdict.kind, seen.step, onset, value),
    )
    return state, verdict


# --- After a hold


def _while_tripped(
    config: RewardConfig, state: RewardState, seen: Observation, value: float
) -> tuple[RewardState, Verdict]:
    """The verdict while an incident is open: is the stream back at the baseline from before it?"""
    trip = state.trip
    assert trip is not None
    assert trip.level is not None
    model = model_of(config, state.baseline, state.learned, seen.ok)
    gained = _BACK_NATS if model is None else _back_nats(model, trip.level, value)
    if config.min_reward is not None and value < config.min_reward:
        gained = -_BACK_NATS
    back = max(0.0, trip.back_nats + gained)
    if back >= _BACK_NATS:
        baseline = absorb(config, state.baseline, value, False)
        state = state._replace(
            attempt=seen.attempt, step=seen.step, baseline=baseline, unknown_streak=0, trip=None
        )
        return state, _recovered(_OK)
    if trip.accepted is not None:
        return _let_go(state, seen, value, trip._replace(back_nats=back))
    trip = trip._replace(back_nats=back, level=value if back == 0.0 else trip.level)
    state = state._replace(attempt=seen.attempt, step=seen.step, unknown_streak=0, trip=trip)
    figures = (("value", value), ("baseline", state.baseline.level), ("back_nats", back))
    return state, _still(trip, Level.WARN if back > 0.0 else Level.HOLD, figures)


def _let_go(state: RewardState, seen: Observation, value: float, trip: Trip) -> tuple[RewardState, Verdict]:
    """A value that is not back at the baseline, let go by a person; enough of them are the new baseline."""
    assert trip.level is not None
    count = 1 + (trip.accepted or 0)
    level = trip.level + (value - trip.level) / count
    decided = count >= _ACCEPTED
    baseline = adopt(state.baseline, level, float(count)) if decided else state.baseline
    still = None if decided else trip._replace(level=level, accepted=count)
    state = state._replace(
        attempt=seen.attempt, step=seen.step, baseline=baseline, unknown_streak=0, trip=still
    )
    return state, _OK


def _still(trip: Trip, level: Level, evidence: Figures) -> Verdict:
    return Verdict(
        level=level,
        reason=trip.reason,
        kind=trip.kind,
        onset_step=trip.onset_step,
        evidence=evidence,
        tripped=True,
    )


def _recovered(verdict: Verdict) -> Verdict:
    return Verdict(
        level=verdict.level,
        reason=verdict.reason,
        kind=verdict.kind,
        onset_step=verdict.onset_step,
        evidence=verdict.evidence,
        recovered=True,
    )


def _back_nats(model: Model, bad: float, value: float) -> float:
    """Nats for the baseline against a level half-way between it and the incident's."""
    middle = 0.5 * (model.level + min(bad, model.level))
    if model.shares:
        p, m = max(model.level, 1e-6), max(middle, 1e-7)
        if p - m < 1e-3:
            return _BACK_NATS if value >= m else -_BACK_NATS
        return model.effective * (value * log(p / m) + (1 - value) * (log1p(-p) - log1p(-m)))
    if value >= model.level:
        return _BACK_NATS
    shift = max((model.level - middle) / model.sigma, 1.0)
    return -falls.student_nats((value - model.level) / model.sigma, shift)


# --- Warnings


def _warning(
    config: RewardConfig, state: RewardState, seen: Observation, value: float, model: Model | None
) -> tuple[RewardState, Verdict]:
    """The state with its episode, and a warning when one is warranted."""
    state = state._replace(same_spread=_same_spread(state, seen, value))
    if model is not None and state.fall is not None:
        fallen = _warning_of_fall(config, state, seen, model, state.fall)
        if fallen is not None:
            return fallen
        if state.fall.active:  # the grace is over, and the new level accepted
            recent = [v for _, v in state.fall.tail[-20:]]
            baseline = adopt(state.baseline, sum(recent) / len(recent), float(len(recent)))
            learned = state.learned._replace(switches=state.learned.switches + 1)
            return state._replace(baseline=baseline, learned=learned, fall=None, run=None, episode=None), _OK
    run = state.run
    if run is not None:
        figures: Figures = (("value", value), ("run_length", float(run.length)))
        streak = config.zero_streak_warn
        long_enough = value == 0.0 and streak is not None and run.length >= streak
        if long_enough and not runs.is_sparse(model, state.baseline, run.length):
            return _warned(state, seen, Reason.ZERO_STREAK, run.first_step, figures)
        if run.evidence >= config.warn_nats:
            figures = (*figures, ("nats", run.evidence))
            return _warned(state, seen, Reason.REWARD_COLLAPSE, run.first_step, figures)
        stuck = runs.stuck_nats(config, model, state.baseline, run) if model is not None else 0.0
        if stuck >= config.stuck_nats:
            return _warned(state, seen, Reason.REWARD_STUCK, run.first_step, (*figures, ("nats", stuck)))
    if state.same_spread >= 3:
        same = (("steps", float(state.same_spread)), ("value", value))
        return _warned(state, seen, Reason.REWARD_VARIANCE_COLLAPSE, None, same)
    if (moved := witnesses.warned(state.tracks)) is not None:
        reason, track = moved
        return _warned(state, seen, reason, None, (("scales", track.z), ("usual", track.mean)))
    return _quiet(state), _OK


def _warning_of_fall(
    config: RewardConfig, state: RewardState, seen: Observation, model: Model, fall: Fall
) -> tuple[RewardState, Verdict] | None:
    """The warning about a fall, None when there is none to give (any more)."""
    strongest = falls.nats(fall)
    if not fall.active and strongest < config.warn_nats:
        return None
    part = falls.segment(model, fall.tail)
    if not fall.active:
        fall = fall._replace(active=True, onset=part.leaves_at, age=1)
    elif fall.age >= config.curriculum_grace_steps and part.trend_nats < _TREND_NATS:
        return None
    state = state._replace(fall=fall)
    news = strongest >= config.warn_nats and not _is_usual(state.learned, model, seen.step, part)
    if state.episode is None and not news:
        return state, _OK
    reason = Reason.REWARD_LEVEL_FALL
    if part.trend_nats >= _TREND_NATS:
        reason = Reason.REWARD_DECAY
    elif fall.start >= strongest and _odds_of_start(state, model, part) > 1:
        reason = Reason.REWARD_START_LEVEL
    return _warned(state, seen, reason, fall.onset, _figures(config, model, strongest, part))


def _same_spread(state: RewardState, seen: Observation, value: float) -> int:
    """Steps in a row in which all rollouts scored the same although they usually do not."""
    std = seen.spread[0] if seen.spread is not None else seen.metrics.get("reward_std")
    if std is None or not isfinite(std):
        return state.same_spread
    usual = next(
        (track.mean for track in state.tracks if track.name == "reward_std" and track.known > 10), 0.0
    )
    extreme = value in {0.0, 1.0} or value >= state.baseline.high or value <= state.baseline.low
    return state.same_spread + 1 if std < 0.02 * usual and not extreme else 0


def _warned(
    state: RewardState, seen: Observation, reason: Reason, onset: int | None, evidence: Figures
) -> tuple[RewardState, Verdict]:
    episode = state.episode or Episode(reason, seen.step)
    if episode.quiet:
        episode = episode._replace(quiet=0)
    verdict = Verdict(
        level=Level.WARN, reason=reason, kind=_kind(state, seen), onset_step=onset, evidence=evidence
    )
    return state._replace(episode=episode), verdict


def _quiet(state: RewardState) -> RewardState:
    """The state after a step without a warning; enough of them end the episode."""
    episode = state.episode
    if episode is None:
        return state
    if episode.quiet + 1 >= _EPISODE_GAP:
        return state._replace(episode=None)
    return state._replace(episode=episode._replace(quiet=episode.quiet + 1))
