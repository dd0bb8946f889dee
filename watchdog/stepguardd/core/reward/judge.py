"""
The judgement on one observation after another: OK, a warning, or hold this batch.

Pure: no clock, no I/O, no randomness, no logging. The order of the questions is the order of their weight. Not a
number at all? Then: is it a constant where none belongs, next to nothing, the starting level, a fall that a second
witness confirms, or one that goes on and on? Each of these holds. A fall that settles at a new level is a warning,
with a grace in which a hold needs a second witness; after it the new level is accepted.

A held or refused observation never enters the baseline. After a hold the judgement stays tripped until the stream is
back at the baseline from before the incident; a new attempt (rollback, relaunch) or `acknowledge` ends it as well.
"""

from __future__ import annotations

from math import isfinite, log, log1p

from stepguardd.core.reasons import Reason
from stepguardd.core.reward import falls, runs, witnesses
from stepguardd.core.reward.baseline import Model, absorb, adopt, learn, level_at, model_of, release
from stepguardd.core.reward.model import (
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

_OK = Verdict()
_NO_RUN = Run()
_SUSPICIOUS_NATS = 2.0
_BACK_NATS = 3.0  # 20 to 1 that the stream is back
_EPISODE_GAP = 10  # quiet steps that end a warning
_WITNESSED_NATS = 3.0  # what the reward itself must say for a second witness to count
_WITNESS_NATS = 4.0
_START_ODDS = 5.0
_START_STEPS = 4, 8
_TREND_NATS = 7.0
_TREND_COUNT = 8
_DECAYED = 0.36  # of the baseline's height


def start(config: RewardConfig) -> RewardState:
    """The state before the first observation."""
    assert config.run_nats > 0
    return RewardState()


def observe(config: RewardConfig, state: RewardState, seen: Observation) -> tuple[RewardState, Verdict]:
    """
    The state and the verdict after one observation.

    Args:
        config: the settings; the same for every call on one state, or a hold's threshold moves under its evidence.
        state: from `start` or the last call.
        seen: the observation. Steps that go back, or an attempt that grew, are a restart from an older checkpoint.

    """
    if state.step is not None and (seen.attempt != state.attempt or seen.step < state.step):
        state = _restarted(state, seen)
    tracks, others = state.tracks, state.witnesses
    if (
        seen.metrics
        or seen.failed is not None
        or seen.witnesses
        or others.infra
        or others.weights
        or seen.spread
    ):
        tracks = witnesses.follow(tracks, seen)
        others = witnesses.testify(others, tracks, seen)
        if (fault := witnesses.broken(seen)) is not None:
            state = state._replace(tracks=tracks, witnesses=others)
            return _not_finite(state, seen, fault[0])
        if state.tracks is not tracks or state.witnesses != others:
            state = state._replace(tracks=tracks, witnesses=others)
    value = seen.value
    if value is None:
        return _unknown(config, state, seen)
    if not isfinite(value):
        return _not_finite(state, seen, Reason.REWARD_NOT_FINITE)
    if state.trip is not None and state.trip.level is not None:
        return _while_tripped(config, state, seen, value)
    return _judged(config, state, seen, value)


def silence(config: RewardConfig, quiet_s: float) -> Verdict | None:
    """The verdict on a stream from which nothing has come for `quiet_s` seconds, or None while that is fine."""
    if config.no_step_for_s is None or quiet_s <= config.no_step_for_s:
        return None
    evidence = (("quiet_s", quiet_s), ("no_step_for_s", config.no_step_for_s))
    return Verdict(level=Level.WARN, reason=Reason.REWARD_MISSING, evidence=evidence)


def acknowledge(state: RewardState) -> RewardState:
    """The state after a person said that the present level is right: it becomes the baseline, and nothing is open."""
    baseline = release(state.baseline)
    trip = state.trip
    if trip is not None and trip.level is not None:
        baseline = adopt(baseline, trip.level, 4.0)
    elif state.fall.active:
        values = [v for _, v in state.fall.tail]
        baseline = adopt(baseline, sum(values) / len(values), min(len(values), 20))
    return state._replace(baseline=baseline, run=_NO_RUN, fall=falls.NO_FALL, episode=None, trip=None)


def _restarted(state: RewardState, seen: Observation) -> RewardState:
    """Back at an older step: the level that the run had there is the baseline, and no suspicion is carried over."""
    baseline, learned = release(state.baseline), state.learned
    level = level_at(learned, seen.step)
    if level is not None and state.step is not None and seen.step < state.step:
        baseline = adopt(baseline, min(level, baseline.level), min(baseline.weight, 10.0))
        learned = learned._replace(history=tuple(past for past in learned.history if past[0] <= seen.step))
    return state._replace(
        attempt=seen.attempt,
        baseline=baseline,
        learned=learned,
        run=_NO_RUN,
        fall=falls.NO_FALL,
        episode=None,
        trip=None,
    )


def _unknown(config: RewardConfig, state: RewardState, seen: Observation) -> tuple[RewardState, Verdict]:
    streak = state.unknown_streak + 1
    state = state._replace(attempt=seen.attempt, step=seen.step, unknown_streak=streak)
    if state.trip is not None:
        return state, Verdict(
            level=Level.HOLD,
            reason=state.trip.reason,
            kind=state.trip.kind,
            onset_step=state.trip.onset_step,
            tripped=True,
        )
    if streak < config.unknown_streak_warn:
        return _quiet(state), _OK
    return _warned(state, seen, Reason.REWARD_MISSING, None, (("rows_without_value", float(streak)),))


def _not_finite(state: RewardState, seen: Observation, reason: Reason) -> tuple[RewardState, Verdict]:
    trip = state.trip or Trip(reason, _kind(state, seen), seen.step, seen.step, None)
    state = state._replace(
        attempt=seen.attempt,
        step=seen.step,
        trip=trip._replace(back_nats=0.0),
        episode=None,
        run=_NO_RUN,
        fall=falls.NO_FALL,
        baseline=release(state.baseline),
        unknown_streak=0,
    )
    verdict = Verdict(
        level=Level.HOLD, reason=reason, kind=trip.kind, onset_step=trip.onset_step, tripped=True
    )
    return state, verdict


def _judged(
    config: RewardConfig, state: RewardState, seen: Observation, value: float
) -> tuple[RewardState, Verdict]:
    baseline, learned, fall, run = state.baseline, state.learned, state.fall, state.run
    step, ok = seen.step, seen.ok
    model = model_of(config, baseline, learned, ok)
    same = run.length > 0 and value == run.value
    if model is None or value < model.level or same or fall.half or fall.quarter or fall.near or fall.start:
        was_active = fall.active
        run = runs.constant_run(config, model, baseline, fall, run, step, value, ok or baseline.rollouts or 1)
        if model is not None:
            fall = falls.after(config, model, _start_level(model, learned), fall, step, value)
        held = _hold(config, state, seen, value, model, run, fall)
        if held is not None:
            return _tripped(config, state, seen, value, held)
        new, verdict = _warning(config, state, seen, value, model, run, fall)
        if verdict.level == Level.OK and was_active and not new.fall.active:
            new = new._replace(episode=None)
        return _absorbed(config, new, seen, value, verdict)
    if config.min_reward is not None and value < config.min_reward:
        return _tripped(config, state, seen, value, _min_reward(config, seen, value))
    run = Run(value, 1, step)
    if state.tracks or state.episode is not None:
        new, verdict = _warning(config, state, seen, value, model, run, fall)
        return _absorbed(config, new, seen, value, verdict)
    baseline = absorb(config, baseline, value, False)
    if not learned.decided or step >= learned.history[-1][0] + learned.stride:
        baseline, learned = learn(config, baseline, learned, step, value, ok)
    trip = state.trip
    state = RewardState(seen.attempt, step, baseline, learned, run, fall, (), state.witnesses)
    return state, (_OK if trip is None else Verdict(recovered=True))


def _absorbed(
    config: RewardConfig, state: RewardState, seen: Observation, value: float, verdict: Verdict
) -> tuple[RewardState, Verdict]:
    """The state with the value learned, or held back while a test is suspicious of it."""
    run, fall, learned = state.run, state.fall, state.learned
    suspicious = (
        fall.active
        or falls.nats(fall) > _SUSPICIOUS_NATS
        or fall.near > _SUSPICIOUS_NATS
        or run.evidence > _SUSPICIOUS_NATS
    )
    baseline = state.baseline
    if not fall.active:
        baseline = absorb(config, baseline, value, suspicious)
        if not suspicious:
            baseline, learned = learn(config, baseline, learned, seen.step, value, seen.ok)
    if state.trip is not None:
        verdict = Verdict(
            level=verdict.level,
            reason=verdict.reason,
            kind=verdict.kind,
            evidence=verdict.evidence,
            recovered=True,
        )
    state = RewardState(
        seen.attempt,
        seen.step,
        baseline,
        learned,
        run,
        fall,
        state.tracks,
        state.witnesses,
        0,
        state.same_spread,
        state.episode,
        None,
    )
    return state, verdict


def _start_level(model: Model, learned: Learned) -> float | None:
    """The run's starting level, where a return to it would be a fall of more than an eighth and more than noise."""
    if learned.start_n < 5:
        return None
    level = learned.start_sum / learned.start_n
    height = model.level - model.floor
    if level > model.level - 0.15 * height or level < model.floor + 0.03 * height:
        return None
    return level if model.shares or model.level - level > 1.5 * model.sigma else None


# --- Holds


def _hold(
    config: RewardConfig,
    state: RewardState,
    seen: Observation,
    value: float,
    model: Model | None,
    run: Run,
    fall: Fall,
) -> Verdict | None:
    if run.evidence >= config.run_nats:
        onset = run.first_step
        if fall.tail and model is not None and fall.tail[0][0] < onset:
            onset = min(onset, falls.segment(model, fall.tail).leaves_at)
        evidence = (
            ("value", value),
            ("run_length", float(run.length)),
            ("nats", run.evidence),
            ("threshold_nats", config.run_nats),
            ("baseline", state.baseline.level),
        )
        return _held(state, seen, Reason.REWARD_COLLAPSE, onset, evidence)
    if model is not None and fall.tail:
        held = _hold_of_fall(config, state, seen, model, fall)
        if held is not None:
            return held
    streak = config.zero_streak_hold
    if (
        streak is not None
        and value == 0.0
        and run.length >= streak
        and not runs.is_sparse(model, state.baseline)
    ):
        zeros = (("zeros", float(run.length)), ("zero_streak_hold", float(streak)))
        return _held(state, seen, Reason.ZERO_STREAK, run.first_step, zeros)
    if config.min_reward is not None and value < config.min_reward:
        return _min_reward(config, seen, value)
    return None


def _hold_of_fall(
    config: RewardConfig, state: RewardState, seen: Observation, model: Model, fall: Fall
) -> Verdict | None:
    others = state.witnesses
    strongest = falls.nats(fall)
    if fall.near >= config.hold_nats:
        part = falls.segment(model, fall.tail)
        return _held(
            state, seen, Reason.REWARD_COLLAPSE, part.leaves_at, _figures(config, model, fall.near, part)
        )
    witness = max(others.infra, others.weights)
    if strongest >= _WITNESSED_NATS and witness >= _WITNESS_NATS and strongest + witness >= config.hold_nats:
        part = falls.segment(model, fall.tail)
        evidence = (*_figures(config, model, strongest, part), ("witness_nats", witness))
        reason = Reason.REWARD_PARTIAL_LOSS
        if others.weights > others.infra or (
            fall.start >= strongest and _odds_of_start(state, model, part) > 1
        ):
            reason = Reason.REWARD_START_LEVEL
        return _held(state, seen, reason, part.onset, evidence)
    if strongest < config.hold_nats:
        return None
    part = falls.segment(model, fall.tail)
    least, most = _START_STEPS
    flat = part.trend_nats < _SUSPICIOUS_NATS
    if fall.start >= config.hold_nats and flat and least <= part.steps <= most:
        odds = _odds_of_start(state, model, part)
        if odds >= _START_ODDS:
            evidence = (
                *_figures(config, model, fall.start, part),
                ("starting_level", state.learned.start_sum / state.learned.start_n),
                ("odds", odds),
            )
            return _held(state, seen, Reason.REWARD_START_LEVEL, part.onset, evidence)
    left = (part.end - model.floor) / max(model.level - model.floor, 1e-12)
    if part.steps >= _TREND_COUNT and part.trend_nats >= _TREND_NATS and left <= _DECAYED:
        evidence = (
            *_figures(config, model, strongest, part),
            ("slope", part.slope),
            ("trend_nats", part.trend_nats),
        )
        return _held(state, seen, Reason.REWARD_DECAY, part.leaves_at, evidence)
    return None


def _odds_of_start(state: RewardState, model: Model, part: falls.Segment) -> float:
    learned = state.learned
    if learned.start_n == 0:
        return 0.0
    return falls.start_odds(model, part, learned.start_sum / learned.start_n, learned.start_n)


def _figures(
    config: RewardConfig, model: Model, nats: float, part: falls.Segment
) -> tuple[tuple[str, float], ...]:
    return (
        ("level", part.level),
        ("baseline", model.level),
        ("steps", float(part.steps)),
        ("nats", nats),
        ("threshold_nats", config.hold_nats),
    )


def _min_reward(config: RewardConfig, seen: Observation, value: float) -> Verdict:
    evidence = (("value", value), ("min_reward", config.min_reward or 0.0))
    return Verdict(
        level=Level.HOLD, reason=Reason.MIN_REWARD, onset_step=seen.step, evidence=evidence, tripped=True
    )


def _held(
    state: RewardState, seen: Observation, reason: Reason, onset: int, evidence: tuple[tuple[str, float], ...]
) -> Verdict:
    return Verdict(
        level=Level.HOLD,
        reason=reason,
        kind=_kind(state, seen),
        onset_step=onset,
        evidence=evidence,
        tripped=True,
    )


def _kind(state: RewardState, seen: Observation) -> Kind:
    """Infrastructure when a second witness says so; policy when it moved and nothing else did; else not decidable."""
    others = state.witnesses
    if others.infra >= _WITNESS_NATS or others.weights >= _WITNESS_NATS:
        return Kind.INFRA
    watched = others.complete or Witness.SERVERS_HEALTHY in seen.witnesses
    if watched and witnesses.policy_moved(state.tracks, others.complete):
        return Kind.POLICY
    return Kind.UNKNOWN


def _tripped(
    config: RewardConfig, state: RewardState, seen: Observation, value: float, verdict: Verdict
) -> tuple[RewardState, Verdict]:
    onset = verdict.onset_step if verdict.onset_step is not None else seen.step
    trip = Trip(verdict.reason, verdict.kind, seen.step, onset, value)
    state = state._replace(
        attempt=seen.attempt,
        step=seen.step,
        baseline=release(state.baseline),
        run=_NO_RUN,
        fall=falls.NO_FALL,
        unknown_streak=0,
        episode=None,
        trip=trip,
    )
    assert config.hold_nats > 0
    return state, verdict


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
        state = state._replace(trip=None, run=Run(value, 1, seen.step), unknown_streak=0)
        return _absorbed(config, state, seen, value, Verdict(recovered=True))
    trip = trip._replace(back_nats=back, level=value if back == 0.0 else trip.level)
    state = state._replace(attempt=seen.attempt, step=seen.step, unknown_streak=0, trip=trip)
    return state, Verdict(
        level=Level.WARN if back > 0.0 else Level.HOLD,
        reason=trip.reason,
        kind=trip.kind,
        onset_step=trip.onset_step,
        evidence=(("value", value), ("baseline", state.baseline.level), ("back_nats", back)),
        tripped=True,
    )


def _back_nats(model: Model, bad: float, value: float) -> float:
    """Nats for the baseline against a level half-way between it and the incident's."""
    middle = 0.5 * (model.level + min(bad, model.level))
    if model.shares:
        p, m = max(model.level, 1e-6), max(middle, 1e-7)
        if p - m < 1e-3:
            return _BACK_NATS if value >= m else -_BACK_NATS
        return model.effective * (value * log(p / m) + (1 - value) * (log1p(-p) - log1p(-m)))
    shift = max((model.level - middle) / model.sigma, 1.0)
    z = (value - model.level) / model.sigma
    if z > 0:
        return _BACK_NATS
    return 4.5 * (log1p((z + shift) ** 2 / 8.0) - log1p(z * z / 8.0))


# --- Warnings


def _warning(
    config: RewardConfig,
    state: RewardState,
    seen: Observation,
    value: float,
    model: Model | None,
    run: Run,
    fall: Fall,
) -> tuple[RewardState, Verdict]:
    """The state with this observation's run and fall, and a warning when one is warranted."""
    baseline = state.baseline
    if model is not None and fall.tail:
        if not fall.active and falls.nats(fall) >= config.warn_nats:
            part = falls.segment(model, fall.tail)
            fall = fall._replace(active=True, onset=part.leaves_at, age=1)
        if fall.active:
            part = falls.segment(model, fall.tail)
            if fall.age >= config.curriculum_grace_steps and part.trend_nats < _TREND_NATS:
                recent = [v for _, v in fall.tail[-20:]]
                baseline = adopt(baseline, sum(recent) / len(recent), float(len(recent)))
                fall = falls.NO_FALL
                state = state._replace(baseline=baseline)
            else:
                state = state._replace(run=run, fall=fall, same_spread=_same_spread(state, seen, value))
                reason = Reason.REWARD_DECAY if part.trend_nats >= _TREND_NATS else Reason.REWARD_LEVEL_FALL
                if fall.start >= falls.nats(fall) and _odds_of_start(state, model, part) > 1:
                    reason = Reason.REWARD_START_LEVEL
                return _warned(
                    state, seen, reason, fall.onset, _figures(config, model, falls.nats(fall), part)
                )
    state = state._replace(run=run, fall=fall, same_spread=_same_spread(state, seen, value))
    streak = config.zero_streak_warn
    if streak is not None and value == 0.0 and run.length >= streak and not runs.is_sparse(model, baseline):
        return _warned(state, seen, Reason.ZERO_STREAK, run.first_step, (("zeros", float(run.length)),))
    if run.evidence >= config.warn_nats:
        evidence = (("value", value), ("run_length", float(run.length)), ("nats", run.evidence))
        return _warned(state, seen, Reason.REWARD_COLLAPSE, run.first_step, evidence)
    if model is not None and run.length > 3:
        stuck = runs.stuck_nats(config, model, baseline, run)
        if stuck >= config.stuck_nats:
            evidence = (("value", value), ("run_length", float(run.length)), ("nats", stuck))
            return _warned(state, seen, Reason.REWARD_STUCK, run.first_step, evidence)
    if state.same_spread >= 3:
        same = (("steps", float(state.same_spread)), ("value", value))
        return _warned(state, seen, Reason.REWARD_VARIANCE_COLLAPSE, None, same)
    if (moved := witnesses.warned(state.tracks)) is not None:
        reason, track = moved
        return _warned(state, seen, reason, None, (("scales", track.z), ("usual", track.mean)))
    return _quiet(state), _OK


def _same_spread(state: RewardState, seen: Observation, value: float) -> int:
    """Steps in a row in which all rollouts scored the same although they usually do not, away from the extremes."""
    std = seen.spread[0] if seen.spread is not None else seen.metrics.get("reward_std")
    if std is None or not isfinite(std):
        return state.same_spread
    usual = next(
        (track.mean for track in state.tracks if track.name == "reward_std" and track.known > 10), 0.0
    )
    extreme = value in {0.0, 1.0} or value >= state.baseline.high or value <= state.baseline.low
    return state.same_spread + 1 if std < 0.02 * usual and not extreme else 0


def _warned(
    state: RewardState,
    seen: Observation,
    reason: Reason,
    onset: int | None,
    evidence: tuple[tuple[str, float], ...],
) -> tuple[RewardState, Verdict]:
    episode = state.episode or Episode(reason, seen.step)
    if episode.quiet:
        episode = episode._replace(quiet=0)
    verdict = Verdict(
        level=Level.WARN, reason=reason, kind=_kind(state, seen), onset_step=onset, evidence=evidence
    )
    return state._replace(episode=episode), verdict


def _quiet(state: RewardState) -> RewardState:
    episode = state.episode
    if episode is None:
        return state
    if episode.quiet + 1 >= _EPISODE_GAP:
        return state._replace(episode=None)
    return state._replace(episode=episode._replace(quiet=episode.quiet + 1))
