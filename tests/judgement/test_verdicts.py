"""What the judgement says about each kind of trouble, and about what only looks like it."""

import math
import random

import pytest

from judgement.curves import climb, first, healthy, incident_a, judged, shares
from stepguardd.core.reasons import Reason
from stepguardd.core.reward import (
    Kind,
    Level,
    Observation,
    RewardConfig,
    Spread,
    Witness,
    acknowledge,
    observe,
    silence,
    start,
)

SEEDS = range(6)


def median(delays: list[int | None]) -> float:
    """The middle delay, a miss counting as infinite."""
    ordered = sorted(math.inf if delay is None else delay for delay in delays)
    return ordered[len(ordered) // 2]


@pytest.mark.parametrize("seed", SEEDS)
def test_all_zero_after_a_healthy_07_is_held_on_that_very_step(seed: int) -> None:
    values = healthy(seed)
    _, verdicts = judged([*values, 0.0])
    assert [v.level for v in verdicts[:-1]] == [Level.OK] * len(values)
    assert verdicts[-1].level is Level.HOLD
    assert verdicts[-1].reason is Reason.REWARD_COLLAPSE
    assert verdicts[-1].onset_step == len(values)
    assert dict(verdicts[-1].evidence)["nats"] > 14


def test_incident_a_is_held_at_188_and_stays_held() -> None:
    values = incident_a()
    _, verdicts = judged(values)
    assert first(verdicts, Level.WARN) == 188
    assert verdicts[188].onset_step == 188
    assert all(v.tripped for v in verdicts[188:]), "a spike to the base model's level is no recovery"


@pytest.mark.parametrize(("rate", "least", "most"), [(0.08, 4, 8), (0.02, 15, 60)])
def test_rare_success_waits_as_long_as_the_likelihood_says(rate: float, least: int, most: int) -> None:
    delays = []
    for seed in SEEDS:
        values = shares(random.Random(seed), 32, [rate] * 300)
        _, verdicts = judged([*values, *[0.0] * 80])
        assert first(verdicts[:300], Level.WARN) is None
        delays.append(first(verdicts[300:], Level.HOLD))
    assert least <= median(delays) <= most


def test_ten_zeros_in_a_row_at_two_per_cent_are_nothing() -> None:
    values = shares(random.Random(4), 32, [0.02] * 300)
    while values[-1] == 0.0:
        values.pop()
    _, verdicts = judged([*values, *[0.0] * 10])
    assert {v.level for v in verdicts} == {Level.OK}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_held_at_once(bad: float) -> None:
    state, verdicts = judged([*healthy(1), bad])
    assert verdicts[-1].level is Level.HOLD
    assert verdicts[-1].reason is Reason.REWARD_NOT_FINITE
    _, after = judged([0.69], state=state, first=300)
    assert after[0].recovered


def test_nan_on_the_first_step_of_a_run_is_held() -> None:
    _, verdicts = judged([math.nan])
    assert verdicts[0].level is Level.HOLD


@pytest.mark.parametrize(
    ("name", "reason"), [("loss", Reason.LOSS_NOT_FINITE), ("grad_norm", Reason.GRAD_NOT_FINITE)]
)
def test_a_loss_or_gradient_that_is_no_number_is_held_at_once(name: str, reason: Reason) -> None:
    values = healthy(2)
    column = [0.1] * (len(values) - 1) + [math.nan]
    _, verdicts = judged(values, **{name: column})
    assert verdicts[-2].level is Level.OK
    assert (verdicts[-1].level, verdicts[-1].reason) == (Level.HOLD, reason)


def shaped(seed: int, steps: int = 200, scale: float = 1.0, offset: float = 0.0) -> list[float | None]:
    rng = random.Random(seed)
    return [scale * (rng.gauss(level, 0.1) + offset) for level in climb(steps, -0.6, 0.5)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_floor_of_a_shaped_reward_is_held_at_once(seed: int) -> None:
    _, verdicts = judged([*shaped(seed), -1.0])
    assert verdicts[-1].level is Level.HOLD
    assert verdicts[-1].reason is Reason.REWARD_COLLAPSE
    assert first(verdicts[:-1], Level.WARN) is None


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (37.0, 2.0), (0.02, -5.0)])
def test_any_other_constant_far_below_is_held_within_a_few_steps(scale: float, offset: float) -> None:
    floor = scale * (-1.31 + offset)
    _, verdicts = judged([*shaped(3, scale=scale, offset=offset), *[floor] * 6])
    assert (first(verdicts, Level.HOLD) or 0) - 200 in range(5)


@pytest.mark.parametrize("seed", SEEDS)
def test_half_of_the_rollouts_lost_is_a_warning_without_a_witness(seed: int) -> None:
    values = [*healthy(seed), *shares(random.Random(seed + 50), 32, [0.35] * 12)]
    _, verdicts = judged(values)
    warned = first(verdicts, Level.WARN)
    assert warned is not None
    assert 200 <= warned <= 204
    assert verdicts[warned].reason in {Reason.REWARD_LEVEL_FALL, Reason.REWARD_START_LEVEL}


def test_half_of_the_rollouts_lost_is_held_with_the_aborted_ratio() -> None:
    delays = []
    for seed in SEEDS:
        values = [*healthy(seed), *shares(random.Random(seed + 50), 32, [0.35] * 12)]
        rng = random.Random(seed)
        aborted = [rng.choice([0.0, 0.0, 0.03]) for _ in range(200)] + [
            rng.uniform(0.4, 0.6) for _ in range(12)
        ]
        _, verdicts = judged(values, aborted_ratio=aborted)
        assert first(verdicts[:200], Level.WARN) is None
        at = first(verdicts, Level.HOLD)
        assert at is not None
        assert verdicts[at].reason is Reason.REWARD_PARTIAL_LOSS
        assert verdicts[at].kind is Kind.INFRA
        delays.append(at - 200)
    assert median(delays) <= 1


def observed(config: RewardConfig, state, values, **fields):
    verdicts = []
    for i, value in enumerate(values):
        state, verdict = observe(config, state, Observation(0, 200 + i, value, **fields))
        verdicts.append(verdict)
    return state, verdicts


@pytest.mark.parametrize(
    "fields",
    [
        {"ok": 32, "failed": 32},
        {"witnesses": frozenset({Witness.SERVER_UNHEALTHY})},
        {"witnesses": frozenset({Witness.WEIGHTS_SUSPECT})},
    ],
    ids=["the guard's counts", "a failing server", "unproven weights"],
)
def test_a_fall_is_held_with_any_second_witness(fields: dict) -> None:
    config = RewardConfig()
    state, _ = judged(healthy(3), config)
    _, verdicts = observed(config, state, shares(random.Random(9), 32, [0.35] * 6), **fields)
    held = first(verdicts, Level.HOLD)
    assert held is not None
    assert held <= 2
    assert verdicts[held].kind is Kind.INFRA


def test_failing_rollouts_alone_only_warn() -> None:
    """A trainer that masks failures has a healthy reward and loses nothing but speed."""
    values = healthy(4)
    _, verdicts = judged([*values, *values[-20:]], aborted_ratio=[0.0] * 200 + [0.5] * 20)
    assert first(verdicts, Level.HOLD) is None
    warned = first(verdicts, Level.WARN)
    assert warned is not None
    assert verdicts[warned].reason is Reason.ABORTED_RATIO


def test_a_fall_to_the_starting_level_is_held_within_six_steps() -> None:
    delays = []
    for seed in range(9):
        rng = random.Random(seed)
        good = shares(rng, 32, [0.35] * 10 + climb(190, 0.35, 0.8))
        _, verdicts = judged([*good, *shares(rng, 32, [0.35] * 12)])
        assert first(verdicts[:200], Level.HOLD) is None
        at = first(verdicts[200:], Level.HOLD)
        if at is not None:
            assert verdicts[200 + at].reason is Reason.REWARD_START_LEVEL
            assert abs((verdicts[200 + at].onset_step or 0) - 200) <= 1
        assert (first(verdicts[200:], Level.WARN) or 0) <= 2
        delays.append(at)
    assert median(delays) <= 5


def test_a_jump_of_the_logprob_gap_is_the_witness_of_stale_weights() -> None:
    values = [*healthy(5), *shares(random.Random(3), 32, [0.45] * 6)]
    rng = random.Random(1)
    gap = [rng.uniform(0.01, 0.012) for _ in range(200)] + [0.2] * 6
    _, verdicts = judged(values, logprob_diff=gap)
    at = first(verdicts, Level.HOLD)
    assert at is not None
    assert at <= 203
    assert verdicts[at].reason is Reason.REWARD_START_LEVEL
    assert verdicts[at].kind is Kind.INFRA


def test_a_slow_decay_warns_early_and_is_held_before_it_is_over() -> None:
    alarms, holds = [], []
    for seed in SEEDS:
        fading = [0.7 * (1 - i / 40) for i in range(1, 41)]
        values = [*healthy(seed), *shares(random.Random(seed + 9), 32, fading)]
        _, verdicts = judged(values)
        alarms.append(first(verdicts[200:], Level.WARN))
        holds.append(first(verdicts[200:], Level.HOLD))
    assert median(alarms) <= 15
    assert median(holds) <= 35


def test_a_value_that_does_not_move_is_warned_about_and_not_held() -> None:
    values = healthy(6, rollouts=64)
    _, verdicts = judged([*values, *[values[-1]] * 30])
    warned = first(verdicts, Level.WARN)
    assert warned is not None
    assert warned - 200 <= 9
    assert verdicts[warned].reason is Reason.REWARD_STUCK
    assert first(verdicts, Level.HOLD) is None


def test_all_rollouts_scoring_the_same_is_a_variance_collapse() -> None:
    config = RewardConfig()
    rng = random.Random(2)
    state = start(config)
    for i in range(60):
        spread = Spread(rng.uniform(0.2, 0.3), 0.0, 1.0)
        state, verdict = observe(config, state, Observation(0, i, rng.uniform(0.4, 0.6), spread=spread))
        assert verdict.level is Level.OK
    verdicts = []
    for i in range(5):
        seen = Observation(0, 60 + i, rng.uniform(0.45, 0.55), spread=Spread(0.0, 0.5, 0.5))
        state, verdict = observe(config, state, seen)
        verdicts.append(verdict)
    assert Reason.REWARD_VARIANCE_COLLAPSE in {v.reason for v in verdicts}


# --- What is legitimate


@pytest.mark.parametrize("seed", SEEDS)
def test_hundreds_of_zeros_at_the_start_and_then_a_breakthrough_are_fine(seed: int) -> None:
    rates = [0.0] * 300 + [0.003] * 100 + climb(300, 0.003, 0.7)
    _, verdicts = judged(shares(random.Random(seed), 32, rates))
    assert first(verdicts, Level.HOLD) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_curriculum_switch_is_one_warning_and_then_the_new_level(seed: int) -> None:
    rng = random.Random(seed)
    rates = climb(200, 0.2, 0.8) + [0.5] * 60
    state, verdicts = judged(shares(rng, 64, rates))
    assert first(verdicts, Level.HOLD) is None
    warned = first(verdicts, Level.WARN)
    assert warned is not None
    assert 200 <= warned <= 206
    assert state.episode is None
    assert state.baseline.level == pytest.approx(0.5, abs=0.08)
    _, after = judged([0.0], state=state, first=260)
    assert after[0].level is Level.HOLD, "the new level protects as the old one did"


def test_saturation_at_one_is_not_stuck() -> None:
    _, verdicts = judged(shares(random.Random(1), 32, climb(200, 0.5, 1.0) + [1.0] * 400))
    assert {v.level for v in verdicts} == {Level.OK}


@pytest.mark.parametrize("seed", SEEDS)
def test_four_rollouts_a_step_are_too_few_for_quick_alarms(seed: int) -> None:
    _, verdicts = judged(shares(random.Random(seed), 4, climb(800, 0.3, 0.7)))
    assert first(verdicts, Level.HOLD) is None


def test_gaps_are_neither_zeros_nor_alarms() -> None:
    values = healthy(7, steps=300)
    values[100:140] = [None] * 40
    _, verdicts = judged(values)
    assert {v.level for v in verdicts} == {Level.OK}


def test_a_restart_at_an_older_step_is_judged_by_the_level_of_that_step() -> None:
    config = RewardConfig()
    rng = random.Random(8)
    rates = climb(300, 0.1, 0.9, by=1.0)
    state, _ = judged(shares(rng, 64, rates), config)
    redone, verdicts = judged(shares(rng, 64, rates[120:]), config, state=state, first=120)
    assert first(verdicts, Level.WARN) is None
    assert redone.baseline.level == pytest.approx(0.85, abs=0.1)


# --- After a hold


def test_what_was_refused_teaches_the_baseline_nothing() -> None:
    state, _ = judged(healthy(9))
    level = state.baseline.level
    held, verdicts = judged([0.0] * 300, state=state, first=200)
    assert all(v.level is Level.HOLD for v in verdicts)
    assert held.baseline.level == level


def test_the_same_step_rolled_out_again_is_a_new_observation() -> None:
    config = RewardConfig()
    state, _ = judged(healthy(10), config)
    state, refused = observe(config, state, Observation(0, 200, 0.0))
    assert refused.level is Level.HOLD
    state, again = observe(config, state, Observation(0, 200, 0.71875))
    assert again.level is Level.OK
    assert again.recovered
    assert not again.tripped
    _, next_one = observe(config, state, Observation(0, 201, 0.6875))
    assert (next_one.level, next_one.recovered) == (Level.OK, False)


def test_the_base_models_level_is_no_recovery() -> None:
    state, _ = judged([*healthy(11, high=0.8), 0.0])
    _, verdicts = judged([0.42, 0.44, 0.41, 0.0, 0.43], state=state, first=201)
    assert not any(v.recovered for v in verdicts)
    assert all(v.tripped for v in verdicts)


def test_a_new_attempt_ends_the_incident_and_a_server_still_broken_begins_it_anew() -> None:
    config = RewardConfig()
    state, _ = judged([*healthy(12), 0.0], config)
    state, verdict = observe(config, state, Observation(1, 180, 0.6875))
    assert not verdict.tripped
    _, verdict = observe(config, state, Observation(1, 181, 0.0))
    assert verdict.level is Level.HOLD


def test_a_person_can_say_that_the_new_level_is_right() -> None:
    config = RewardConfig()
    state, _ = judged([*healthy(13), 0.0, 0.0], config)
    rng = random.Random(3)
    _, verdicts = judged(shares(rng, 32, [0.02] * 20), config, state=acknowledge(state), first=300)
    assert first(verdicts, Level.HOLD) is None


def test_a_person_who_mended_it_gets_the_old_baseline_back() -> None:
    """The next total loss is held at once, as the first one was: nobody said that zero is normal."""
    config = RewardConfig()
    state, _ = judged([*healthy(13), 0.0, 0.0], config)
    level = state.baseline.level
    mended = shares(random.Random(14), 32, [0.7] * 3)
    state, verdicts = judged(mended, config, state=acknowledge(state), first=300)
    assert {v.level for v in verdicts} == {Level.OK}
    assert state.baseline.level == pytest.approx(level, abs=0.05)
    _, again = observe(config, state, Observation(0, 303, 0.0))
    assert again.level is Level.HOLD


def test_what_is_not_a_number_is_held_although_a_person_let_a_level_go() -> None:
    config = RewardConfig()
    state, _ = judged([*healthy(13), 0.0], config)
    state, unknown = observe(config, acknowledge(state), Observation(0, 300, None))
    assert unknown.level is Level.OK
    _, broken = observe(config, state, Observation(0, 301, float("nan")))
    assert broken.level is Level.HOLD


def test_a_run_that_begins_again_at_its_first_step_is_judged_as_a_beginning() -> None:
    """Relaunched without a checkpoint: its starting level is no sign of stale weights."""
    config = RewardConfig()
    rng = random.Random(8)
    state, _ = judged(shares(rng, 64, climb(60, 0.2, 0.5, by=1.0)), config)
    redone, verdicts = judged(shares(rng, 64, climb(60, 0.2, 0.5, by=1.0)), config, state=state, first=1)
    assert first(verdicts, Level.WARN) is None
    _, lost = observe(config, redone, Observation(0, 61, 0.0))
    assert lost.level is Level.HOLD


# --- Infra or policy


def test_reward_gone_while_everything_completes_and_entropy_moved_is_policy() -> None:
    rng = random.Random(5)
    values = [*healthy(14), *shares(rng, 32, [0.7 * (1 - i / 15) for i in range(1, 16)] + [0.0] * 5)]
    entropy = [rng.uniform(0.9, 1.0) for _ in range(200)] + [max(0.02, 0.9 - 0.1 * i) for i in range(20)]
    _, verdicts = judged(values, entropy=entropy, aborted_ratio=[0.0] * 220)
    at = first(verdicts, Level.HOLD)
    assert at is not None
    assert verdicts[at].kind is Kind.POLICY


def test_reward_gone_and_nothing_else_known_is_undecided() -> None:
    _, verdicts = judged([*healthy(15), 0.0])
    assert verdicts[-1].kind is Kind.UNKNOWN


def test_reward_gone_with_every_rollout_aborted_is_infrastructure() -> None:
    _, verdicts = judged([*healthy(16), 0.0], aborted_ratio=[0.0] * 200 + [1.0])
    assert verdicts[-1].kind is Kind.INFRA


# --- The user's plain rules


def test_zero_streaks_warn_and_hold_where_no_likelihood_can() -> None:
    """Three steps are too few for a baseline, and ten zeros after them still are too many."""
    _, verdicts = judged([0.6, 0.7, 0.65, *[0.0] * 10], RewardConfig(warmup_steps=100))
    assert first(verdicts, Level.WARN) == 3 + 5 - 1
    assert first(verdicts, Level.HOLD) == 3 + 10 - 1
    assert verdicts[-1].reason is Reason.ZERO_STREAK
    off = RewardConfig(warmup_steps=100, zero_streak_warn=None, zero_streak_hold=None)
    _, verdicts = judged([0.6, 0.7, 0.65, *[0.0] * 10], off)
    assert {v.level for v in verdicts} == {Level.OK}


def test_min_reward_holds_below_it() -> None:
    _, verdicts = judged([*healthy(17), 0.21875], RewardConfig(min_reward=0.25))
    assert verdicts[-1].reason in {Reason.MIN_REWARD, Reason.REWARD_COLLAPSE}
    _, verdicts = judged([0.3, 0.2], RewardConfig(min_reward=0.25))
    assert (verdicts[-1].level, verdicts[-1].reason) == (Level.HOLD, Reason.MIN_REWARD)


def test_rows_without_a_value_warn_when_they_are_many() -> None:
    _, verdicts = judged([*healthy(18), *[None] * 60])
    warned = first(verdicts, Level.WARN)
    assert warned == 200 + 49
    assert verdicts[warned].reason is Reason.REWARD_MISSING


def test_silence_is_only_judged_where_a_limit_is_set() -> None:
    assert silence(RewardConfig(), 1e9) is None
    config = RewardConfig(no_step_for_s=60)
    assert silence(config, 59.0) is None
    verdict = silence(config, 61.0)
    assert verdict is not None
    assert (verdict.level, verdict.reason) == (Level.WARN, Reason.REWARD_MISSING)


@pytest.mark.parametrize(
    "wrong",
    [
        {"false_alarm_steps": 0},
        {"warning_alarm_steps": math.nan},
        {"rollouts_per_step": 0},
        {"zero_streak_hold": 0},
        {"legitimate_fall": 1.5},
        {"no_step_for_s": -1.0},
        {"warmup_steps": 0},
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RewardConfig(**wrong)


def hard_batches(seed: int, steps: int = 1500, every: float = 0.03) -> list[float | None]:
    """A run of 0.8 in which a batch now and then is of a hard set: a twentieth of its rollouts succeeds."""
    rng = random.Random(seed)
    return shares(rng, 32, [0.05 if rng.random() < every else 0.8 for _ in range(steps)])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_used_to_hard_batches_is_neither_held_nor_warned_about_at_every_one(seed: int) -> None:
    values = hard_batches(seed)
    deep = [step for step, value in enumerate(values) if value is not None and value < 0.25]
    _, verdicts = judged(values)
    late = verdicts[750:]
    assert len([step for step in deep if step >= 750]) >= 10, "the batches that it is about"
    assert sum(verdict.level is Level.HOLD for verdict in late) <= 2
    assert sum(verdict.level is Level.WARN for verdict in late) <= len([s for s in deep if s >= 750]) // 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_used_to_hard_batches_is_still_held_within_three_zeros(seed: int) -> None:
    values = hard_batches(seed)
    while values[-1] is None or values[-1] < 0.5:
        values.pop()
    _, verdicts = judged([*values, *[0.0] * 10])
    assert first(verdicts[len(values) :], Level.HOLD) in {0, 1, 2}


def test_a_run_that_was_often_at_its_starting_level_is_not_held_for_being_there_again() -> None:
    """An epoch's data from easy to hard, again and again: a saw, not stale weights."""
    holds = 0
    for seed in SEEDS:
        rng = random.Random(seed)
        values = shares(rng, 128, [0.56 - 0.12 * (step % 125) / 125 for step in range(1500)])
        _, verdicts = judged(values)
        holds += sum(verdict.level is Level.HOLD for verdict in verdicts[750:])
    assert holds == 0


def test_a_smoothed_reward_that_wanders_is_no_decay() -> None:
    """Some logs carry a running mean: its neighbours are alike, and its lowest value so far is no floor."""
    rng = random.Random(3)
    smooth, value = [], 0.6
    for share in shares(rng, 32, [0.6] * 2000):
        assert share is not None
        value += 0.1 * (share - value)
        smooth.append(value)
    _, verdicts = judged(smooth)
    assert first(verdicts, Level.HOLD) is None
