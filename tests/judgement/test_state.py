"""
The state is plain, bounded, finite and readable back from JSON; the short way for calm values is no other.
"""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from judgement.curves import climb, healthy, judged, shares
from stepguardd.core.reward import (
    Level,
    Observation,
    RewardConfig,
    RewardState,
    Spread,
    Witness,
    judge,
    observe,
    start,
)
from stepguardd.core.reward.baseline import absorb, absorb_any, is_calm, is_mature

STATES = TypeAdapter(RewardState)
VALUES = st.one_of(
    st.none(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -1.0, 1.0, 0.5, 0.03125, 1e300, -1e300, 5e-324]),
    st.integers(0, 32).map(lambda k: k / 32),
)
OBSERVATIONS = st.builds(
    Observation,
    attempt=st.integers(0, 3),
    step=st.integers(0, 200),
    value=VALUES,
    ok=st.one_of(st.none(), st.integers(0, 64)),
    failed=st.one_of(st.none(), st.integers(0, 64)),
    spread=st.one_of(st.none(), st.builds(Spread, st.floats(), st.floats(), st.floats())),
    metrics=st.dictionaries(
        st.sampled_from(["loss", "entropy", "kl", "aborted_ratio", "logprob_diff", "reward_std", "unknown"]),
        st.floats(),
        max_size=4,
    ),
    witnesses=st.frozensets(st.sampled_from(list(Witness)), max_size=2),
)


def numbers(value: object):
    if isinstance(value, float):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from numbers(part)


@settings(max_examples=30, deadline=None)
@given(st.lists(OBSERVATIONS, max_size=30))
def test_nothing_that_can_be_observed_breaks_the_state(seen: list[Observation]) -> None:
    config = RewardConfig()
    state = start(config)
    for observation in seen:
        state, verdict = observe(config, state, observation)
        assert verdict.level in set(Level)
        assert not any(math.isnan(n) or math.isinf(n) for n in numbers(state)), state
    text = STATES.dump_json(state)
    assert STATES.validate_json(text) == state


def test_a_state_read_back_from_json_goes_on_alike() -> None:
    config = RewardConfig()
    values = [*healthy(1), *shares(random.Random(2), 32, [0.4] * 20), 0.0, 0.0, *healthy(3)]
    entropy = [random.Random(9).uniform(0.4, 0.5) for _ in values]
    cut = 210
    state, _ = judged(values[:cut], config, entropy=entropy)
    again = STATES.validate_json(STATES.dump_json(state))
    assert again == state
    direct, one = judged(values[cut:], config, state=state, first=cut, entropy=entropy[cut:])
    resumed, other = judged(values[cut:], config, state=again, first=cut, entropy=entropy[cut:])
    assert one == other
    assert direct == resumed


def test_the_state_does_not_grow() -> None:
    rng = random.Random(4)
    rates = [0.0] * 500 + climb(1000, 0.0, 0.8) + [0.5] * 500 + [0.2] * 500
    values = shares(rng, 32, rates)
    column = [rng.random() for _ in values]
    config = RewardConfig()
    state = start(config)
    for i, value in enumerate(values):
        state, _ = observe(
            config, state, Observation(0, i, value, metrics={"entropy": column[i], "kl": column[i]})
        )
        if i % 50 == 0:
            assert len(STATES.dump_json(state)) < 12_000


@pytest.mark.parametrize("seed", range(4))
def test_the_short_way_for_calm_values_decides_like_the_long_one(seed: int) -> None:
    """Wherever a calm value takes the short way, the long one comes to the same state and verdict."""
    rng = random.Random(seed)
    values = [
        *shares(rng, 32, climb(300, 0.1, 0.8)),
        *[rng.gauss(0.5, 0.05) for _ in range(100)],
        *shares(rng, 8, [0.7] * 200),
        *shares(rng, 32, [0.35] * 50),
        *[0.0] * 10,
        *shares(rng, 32, [0.7] * 100),
    ]
    config = RewardConfig()
    state, took_the_short_way = start(config), 0
    for i, value in enumerate(values):
        seen = Observation(0, i, value)
        if is_calm(state.baseline, state.learned, value) and judge._is_at_rest(config, state, seen, value):
            took_the_short_way += 1
            short = judge._calm(config, state, seen, value)
            long, verdict = judge._judged(config, state, seen, value)
            assert verdict.level is Level.OK
            assert list(numbers(short)) == pytest.approx(list(numbers(long)), rel=1e-9, abs=1e-12), i
        state, _ = observe(config, state, seen)
    assert took_the_short_way > 200


@given(st.integers(0, 2**32), st.sampled_from([0, 32]))
@settings(max_examples=30, deadline=None)
def test_the_short_arithmetic_is_the_long_one(seed: int, rollouts: int) -> None:
    rng = random.Random(seed)
    config = RewardConfig()
    make = (lambda: rng.randrange(14, 31) / 32) if rollouts else (lambda: rng.gauss(3.0, 0.4))
    state, _ = judged([make() for _ in range(150)], config)
    baseline, tried = state.baseline, 0
    for _ in range(30):
        value = make()
        if value != baseline.last and is_mature(baseline, config.memory_steps):
            tried += 1
            quick = absorb(config, baseline, value, suspicious=False)
            whole = absorb_any(config, baseline, value, suspicious=False)
            assert list(numbers(quick)) == pytest.approx(list(numbers(whole)), rel=1e-9)
        baseline = absorb(config, baseline, value, suspicious=False)
    assert tried


def test_verdicts_carry_plain_figures() -> None:
    _, verdicts = judged([*healthy(5), 0.0])
    json.dumps(dict(verdicts[-1].evidence), allow_nan=False)
