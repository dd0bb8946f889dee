"""
What the metrics of each trainer are called, and which one is the reward.

One table of names and globs, in order of preference, read off the trainers themselves (verl, ROLL, slime,
miles, AReaL, TRL, OpenRLHF, prime-rl, SkyRL, NeMo-RL; versions in docs/signals.md). Names drift: a glob
covers the spellings that are known. Promises no guess outside the table; what is not in it has to be named in
the config.
"""

import re
from collections.abc import Iterable
from enum import Enum
from fnmatch import translate
from functools import cache


class Signal(Enum):
    """What a metric means, whatever its name."""

    REWARD = "reward"
    REWARD_STD = "reward_std"
    ZERO_STD = "zero_std"
    LOSS = "loss"
    GRAD_NORM = "grad_norm"
    ENTROPY = "entropy"
    KL = "kl"
    RESPONSE_LENGTH = "response_length"
    CLIP_RATIO = "clip_ratio"
    ABORTED_RATIO = "aborted_ratio"
    LOGPROB_DIFF = "logprob_diff"
    STEP = "step"


# The order within a row is the order of preference. Evaluation metrics are never the training reward: see
# _EVALUATION.
ALIASES: dict[Signal, tuple[str, ...]] = {
    Signal.REWARD: (
        "critic/score/mean",  # verl, ROLL: before the KL penalty
        "*/task_reward/avg",  # AReaL: ppo_actor, grpo_actor, ppo/actor
        "task_reward/avg",
        "*/task_reward",  # AReaL's documentation
        "task_reward",
        "rollout/raw_reward",  # slime, miles
        "reward/avg_raw_reward",  # SkyRL
        "train/agg/effective/*/reward/mean",  # prime-rl
        "train/agg/all/*/reward/mean",
        "train/rollout/reward_mean",  # OpenRLHF
        "rollout/reward_mean",
        "train/reward",  # TRL under W&B
        "reward",  # TRL, NeMo-RL
        "train/reward/mean",
        "train/reward_mean",
        "reward/mean",
        "reward_mean",
        "reward/all/mean",  # prime-rl, older
        "critic/rewards/mean",  # verl, ROLL: after the KL penalty
        "rollout/rewards",
        "rollout/reward",
        "*/final_reward/avg",
        "train/mean_reward",
        "mean_reward",
        "avg_reward",
        "episode_reward_mean",
        "train/rewards/mean",
        "rewards/mean",
        "rewards",
        "score/mean",
        "score",
        "train/rewards/*/mean",  # TRL: one reward function
        "rewards/*/mean",
        "return",
        "returns/mean",
    ),
    Signal.REWARD_STD: (
        "train/reward_std",
        "reward_std",
        "critic/score/std",
        "*/task_reward/std",
        "rollout/reward_std",
        "train/rollout/reward_std",
        "reward/std",
    ),
    Signal.ZERO_STD: (
        "train/frac_reward_zero_std",
        "frac_reward_zero_std",
        "rollout/zero_std/*",
        "reward/num_zero_variance_filtered",
    ),
    Signal.LOSS: (
        "train/loss",
        "loss",
        "actor/pg_loss",
        "actor/loss",
        "train/pg_loss",
        "*_actor/loss/avg",
        "*_actor/actor_loss/avg",
        "policy/policy_loss",
        "train/policy_loss",
        "policy_loss",
        "loss/mean",
    ),
    Signal.GRAD_NORM: (
        "train/grad_norm",
        "grad_norm",
        "actor/grad_norm",
        "optim/grad_norm",
        "policy/raw_grad_norm",
        "policy/grad_norm",
        "*/grad_norm",
        "*/grad_norm/avg",
    ),
    Signal.ENTROPY: (
        "train/entropy",
        "entropy",
        "actor/entropy",
        "actor/entropy_loss",
        "entropy/*/mean",
        "entropy/mean",
        "policy/policy_entropy",
        "train/entropy_loss",
        "*_actor/entropy/avg",
        "rollout/entropy",
    ),
    Signal.KL: (
        "train/kl",
        "kl",
        "actor/ppo_kl",
        "train/ppo_kl",
        "actor/kl_loss",
        "train/kl_loss",
        "critic/kl",
        "actor/reward_kl_penalty",
        "*_actor/kl_rewards/avg",
        "*_actor/approx_kl/avg",
        "policy/policy_kl",
        "rollout/kl",
        "train/approx_kl",
        "mismatch_kl/*/mean",
        "mismatch_kl/mean",
    ),
    Signal.RESPONSE_LENGTH: (
        "response_length/mean",
        "train/completions/mean_length",
        "completions/mean_length",
        "rollout/response_len/mean",
        "rollout/response_lengths",
        "rollout/response_length",
        "*/seq_len/avg",
        "train/response_length",
        "generate/avg_num_tokens",
        "train/agg/all/*/completion_len/mean",
        "train/agg/effective/*/completion_len/mean",
        "mean_gen_tokens_per_sample",
    ),
    Signal.CLIP_RATIO: (
        "response_length/clip_ratio",
        "train/completions/clipped_ratio",
        "completions/clipped_ratio",
        "train/clip_ratio/region_mean",
        "clip_ratio/region_mean",
        "actor/pg_clipfrac",
        "train/pg_clipfrac",
        "rollout/truncated_ratio",
        "rollout/truncated_rate",
        "train/rollout/truncated_rate",
        "*_actor/clip_ratio/avg",
        "train/clip_ratio",
        "clip_ratio",
        "policy/ppo_clip_ratio",
    ),
    Signal.ABORTED_RATIO: (
        "response/aborted_ratio",
        "rollout/aborted_ratio",
        "*/aborted_ratio",
        "aborted_ratio",
        "train/agg/all/*/has_error/mean",
    ),
    Signal.LOGPROB_DIFF: (
        "train/train_rollout_logprob_abs_diff",
        "training/rollout_probs_diff_mean",
        "rollout_corr/*kl",
        "train/sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/mean",
        "policy/rollout_train_logprobs_abs_diff_mean",
        "token_mult_prob_error",
    ),
    Signal.STEP: (
        "train/global_step",
        "global_step",
        "training/global_step",
        "rollout/step",
        "train/step",
        "step",
        "_step",
        "iteration",
    ),
}

_EVALUATION = re.compile(r"(?:^|[/_-])(?:eval|evaluation|val|validation|test)(?:[-_/]|$)")


@cache
def _patterns(signal: Signal) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(translate(glob)) for glob in ALIASES[signal])


def rank(signal: Signal, name: str) -> int | None:
    """Return how far down its row of the table a name first matches, 0 the best; None where it does not."""
    if _EVALUATION.search(name):
        return None
    return next((at for at, pattern in enumerate(_patterns(signal)) if pattern.match(name)), None)


def find_reward_metric(names: Iterable[str]) -> str | None:
    """
    Choose the training reward among the names a run logs; None when the table knows none of them.

    Of two names with the same rank, the shorter and then the alphabetically first one is taken: always the
    same one.
    """
    known = [(at, len(name), name) for name in names if (at := rank(Signal.REWARD, name)) is not None]
    return min(known)[2] if known else None


def canonical(name: str) -> Signal | None:
    """Tell what a metric means by its name; None when the table does not say."""
    return next((signal for signal in Signal if rank(signal, name) is not None), None)
