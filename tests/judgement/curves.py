"""Small curves for the tests, each from a seed of its own."""

import random

from stepguardd.core.reward import Level, Observation, RewardConfig, RewardState, Verdict, observe, start

Values = list[float | None]


def shares(rng: random.Random, rollouts: int, rates: list[float]) -> Values:
    return [sum(rng.random() < rate for _ in range(rollouts)) / rollouts for rate in rates]


def climb(steps: int, low: float, high: float, by: float = 0.6) -> list[float]:
    return [low + (high - low) * min(1.0, i / (by * steps)) for i in range(steps)]


def healthy(seed: int, steps: int = 200, rollouts: int = 32, high: float = 0.7) -> Values:
    return shares(random.Random(seed), rollouts, climb(steps, 0.3, high))


def judged(
    values: Values,
    config: RewardConfig | None = None,
    state: RewardState | None = None,
    first: int = 0,
    **beside: list,
) -> tuple[RewardState, list[Verdict]]:
    """The verdicts on values at consecutive steps; `beside` holds a column for each metric."""
    config = config or RewardConfig()
    state = state or start(config)
    verdicts = []
    for i, value in enumerate(values):
        metrics = {name: column[i] for name, column in beside.items() if column[i] is not None}
        state, verdict = observe(config, state, Observation(0, first + i, value, metrics=metrics))
        verdicts.append(verdict)
    return state, verdicts


def first(verdicts: list[Verdict], level: Level) -> int | None:
    return next((i for i, verdict in enumerate(verdicts) if verdict.level >= level), None)


def incident_a(seed: int = 5) -> Values:
    """0.3 to 0.8 by step 188, exactly 0 until 680, then short spikes to the base model's level."""
    rng = random.Random(seed)
    learned = shares(rng, 64, climb(188, 0.3, 0.8))
    spikes = [rng.uniform(0.40, 0.45) if i % 40 < 3 else 0.0 for i in range(120)]
    return [*learned, *[0.0] * (680 - 188), *spikes]
