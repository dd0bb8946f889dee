"""
How a token is drawn.

Promise: with a `sampling_seed` the drawn tokens depend on weights, prompt, parameters and that seed alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stepguard_grpo.server.sampling import Sampling


def draw(logits: NDArray[np.float32], sampling: Sampling, *, seed: int, position: int) -> tuple[int, float]:
    """
    One token and its log-probability under the tempered distribution (before top-p, top-k and min-p cut it).

    logits: [vocabulary]. The draw is a function of its arguments: a retracted request may draw again.
    """
    greedy = sampling.temperature < 1e-6
    scaled = logits.astype(np.float64) / (1.0 if greedy else sampling.temperature)
    scaled -= scaled.max()
    log_probs = scaled - np.log(np.exp(scaled).sum())
    token = int(np.argmax(log_probs)) if greedy else _pick(np.exp(log_probs), sampling, seed, position)
    return token, float(log_probs[token])


def _pick(probs: NDArray[np.float64], sampling: Sampling, seed: int, position: int) -> int:
    order = np.argsort(-probs, kind="stable")
    kept = probs[order]
    if sampling.top_k != -1:
        kept[sampling.top_k :] = 0.0
    kept[np.cumsum(kept) - kept > sampling.top_p] = 0.0
    kept[kept < kept[0] * sampling.min_p] = 0.0
    cumulative = np.cumsum(kept)
    uniform = np.random.default_rng((seed & (2**63 - 1), position)).random() * cumulative[-1]
    return int(order[min(np.searchsorted(cumulative, uniform, side="right"), len(order) - 1)])
