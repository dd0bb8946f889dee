"""The alias table: the reward of every trainer is found, and nothing is taken for it that is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepguardd.sources.reward.aliases import ALIASES, Signal, canonical, find_reward_metric

TRAINERS = {
    "verl": (
        ["actor/pg_loss", "critic/rewards/mean", "critic/score/mean", "critic/score/max", "timing_s/step"],
        "critic/score/mean",
    ),
    "verl, validating": (
        ["val-core/openai/gsm8k/reward/mean@1", "critic/rewards/mean"],
        "critic/rewards/mean",
    ),
    "slime": (["rollout/raw_reward", "rollout/rewards", "eval/aime", "train/ppo_kl"], "rollout/raw_reward"),
    "AReaL": (
        ["ppo_actor/task_reward/avg", "ppo_actor/task_reward/max", "grpo-eval/task_reward/avg"],
        "ppo_actor/task_reward/avg",
    ),
    "AReaL, older": (
        ["grpo_actor/task_reward/avg", "grpo_actor/final_reward/avg"],
        "grpo_actor/task_reward/avg",
    ),
    "AReaL, documented": (["ppo/actor/task_reward", "ppo/actor/loss"], "ppo/actor/task_reward"),
    "AReaL, by itself": (["task_reward"], "task_reward"),
    "TRL under W&B": (
        ["train/reward", "train/reward_std", "train/rewards/f/mean", "train/loss"],
        "train/reward",
    ),
    "TRL": (["reward", "rewards/f/mean", "kl"], "reward"),
    "TRL, one function": (
        ["train/rewards/accuracy/mean", "train/rewards/accuracy/std"],
        "train/rewards/accuracy/mean",
    ),
    "OpenRLHF": (["train/rollout/reward_mean", "train/rollout/reward_std"], "train/rollout/reward_mean"),
    "prime-rl": (
        ["train/agg/all/math/reward/mean", "train/agg/effective/math/reward/mean", "optim/grad_norm"],
        "train/agg/effective/math/reward/mean",
    ),
    "SkyRL": (["reward/avg_raw_reward", "reward/mean_positive_reward"], "reward/avg_raw_reward"),
    "NeMo-RL": (["train/reward", "validation/reward"], "train/reward"),
    "only an evaluation": (["eval/reward", "test/reward", "eval/task_reward/avg"], None),
    "nothing known": (["accuracy", "speed"], None),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_reward_of_every_trainer_is_found(trainer):
    names, reward = TRAINERS[trainer]
    assert find_reward_metric(names) == reward
    assert find_reward_metric(reversed(names)) == reward


@pytest.mark.parametrize(
    ("name", "signal"),
    [
        ("train/loss", Signal.LOSS),
        ("actor/pg_loss", Signal.LOSS),
        ("actor/grad_norm", Signal.GRAD_NORM),
        ("optim/grad_norm", Signal.GRAD_NORM),
        ("actor/entropy", Signal.ENTROPY),
        ("train/kl", Signal.KL),
        ("actor/ppo_kl", Signal.KL),
        ("response_length/mean", Signal.RESPONSE_LENGTH),
        ("train/completions/mean_length", Signal.RESPONSE_LENGTH),
        ("response_length/clip_ratio", Signal.CLIP_RATIO),
        ("response/aborted_ratio", Signal.ABORTED_RATIO),
        ("train/train_rollout_logprob_abs_diff", Signal.LOGPROB_DIFF),
        ("train/global_step", Signal.STEP),
        ("train/reward_std", Signal.REWARD_STD),
        ("train/frac_reward_zero_std", Signal.ZERO_STD),
        ("ppo_actor/task_reward/avg", Signal.REWARD),
        ("eval/loss", None),
        ("timing_s/step", None),
    ],
)
def test_what_a_metric_means(name, signal):
    assert canonical(name) is signal


def test_no_name_stands_in_two_rows_of_the_table():
    named = [alias for aliases in ALIASES.values() for alias in aliases]
    assert len(named) == len(set(named))


@given(names=st.lists(st.text(max_size=20), max_size=20))
def test_any_names_are_no_trouble(names):
    chosen = find_reward_metric(names)
    assert chosen is None or chosen in names
    for name in names:
        canonical(name)
