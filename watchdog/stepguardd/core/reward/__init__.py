"""The sequential tests on the reward stream: `observe(config, state, observation) -> (state, verdict)`."""

from stepguardd.core.reward.judge import acknowledge, observe, silence, start
from stepguardd.core.reward.model import (
    Kind,
    Level,
    Observation,
    RewardConfig,
    RewardState,
    Spread,
    Verdict,
    Witness,
)

__all__ = [
    "Kind",
    "Level",
    "Observation",
    "RewardConfig",
    "RewardState",
    "Spread",
    "Verdict",
    "Witness",
    "acknowledge",
    "observe",
    "silence",
    "start",
]
