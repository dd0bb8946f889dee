"""
The other metrics of a step, and what they testify.

Loss and gradient norm only matter when they are not finite. Entropy, KL, response length and clip ratio say
whether the policy moved; the share of aborted rollouts and the guard's counts say whether rollouts fail; the
gap between the trainer's and the server's log-probabilities says whether the server has the right weights.
The last two are second witnesses: they turn an open question about a fall into a hold, and alone they only
warn.
"""

from __future__ import annotations

from math import isfinite, log

from stepguardd.core.reasons import Reason
from stepguardd.core.reward.model import Observation, Track, Witness, Witnesses

__all__ = ["CANONICAL", "are_quiet", "broken", "failing_share", "follow", "policy_moved", "testify", "warned"]

CANONICAL = (
    "entropy",
    "kl",
    "response_length",
    "clip_ratio",
    "aborted_ratio",
    "logprob_diff",
    "reward_std",
)
"""The followed metrics. `loss` and `grad_norm` are only checked for being finite."""

_new = tuple.__new__

_COMPLETE = Witnesses(complete=True)
_HUGE = 1e12  # no metric; what is larger says nothing
_SETTLING = 10  # observations before a metric's movement means anything
_MEMORY = 40
_FAR = 6.0  # scales
_FADE = 0.7  # a witness loses this share of its nats per observation
_CERTAIN = 12.0  # nats: no witness alone outweighs the budget of a hold
_SERVER_NATS = 7.0  # a server is unhealthy in one healthy step of a thousand
_WEIGHTS_NATS = 7.0
_USUAL_FAILURES = 0.02  # so many failing rollouts are nobody's concern

# The least change that matters, as (share of the mean, absolute).
_MATTERS = {
    "entropy": (0.3, 0.02),
    "kl": (1.0, 0.001),
    "response_length": (0.3, 1.0),
    "clip_ratio": (0.0, 0.1),
    "aborted_ratio": (0.0, 0.05),
    "logprob_diff": (1.0, 0.005),
    "reward_std": (0.5, 0.001),
}
_WARNINGS = {
    "entropy": Reason.ENTROPY_SHIFT,
    "kl": Reason.KL_SHIFT,
    "response_length": Reason.LENGTH_SHIFT,
    "clip_ratio": Reason.CLIP_RATIO_SHIFT,
    "aborted_ratio": Reason.ABORTED_RATIO,
    "logprob_diff": Reason.LOGPROB_MISMATCH,
}


def broken(seen: Observation) -> tuple[Reason, float] | None:
    """A loss or gradient norm that is not a finite number."""
    for name, reason in (("loss", Reason.LOSS_NOT_FINITE), ("grad_norm", Reason.GRAD_NOT_FINITE)):
        value = seen.metrics.get(name)
        if value is not None and not isfinite(value):
            return reason, value
    return None


def failing_share(seen: Observation) -> float | None:
    """The share of the batch that failed: the guard's counts, else the trainer's metric, else None."""
    if seen.failed is not None and seen.ok is not None and seen.failed + seen.ok > 0:
        return seen.failed / (seen.failed + seen.ok)
    ratio = seen.metrics.get("aborted_ratio")
    return ratio if ratio is not None and 0.0 <= ratio <= 1.0 else None


def follow(tracks: tuple[Track, ...], seen: Observation) -> tuple[Track, ...]:
    """The tracks after one observation. A metric that is absent or not finite leaves its track as it was."""
    after = [
        track if (value := _value(track.name, seen)) is None else _followed(track, value) for track in tracks
    ]
    if len(tracks) < len(CANONICAL):
        known = [track.name for track in tracks]
        offered = [name for name in seen.metrics if name in _MATTERS and name not in known]
        if seen.failed is not None and "aborted_ratio" not in known:
            offered.append("aborted_ratio")
        if seen.spread is not None and "reward_std" not in known:
            offered.append("reward_std")
        for name in dict.fromkeys(offered):
            if (value := _value(name, seen)) is not None:
                after.append(Track(name, 1, value))  # noqa: PERF401 - once in a run
    return tuple(after)


def _value(name: str, seen: Observation) -> float | None:
    """What an observation says about a followed metric; None when it says nothing that can be used."""
    if name == "aborted_ratio":
        return failing_share(seen)
    value = seen.spread[0] if name == "reward_std" and seen.spread is not None else seen.metrics.get(name)
    return value if value is not None and -_HUGE < value < _HUGE else None


def _followed(track: Track, value: float) -> Track:
    name, count, mean, scale, _, high_for, moved_ago = track
    if moved_ago >= 0:
        moved_ago += 1
    deviation = value - mean
    share, least = _MATTERS[name]
    size = abs(mean)
    z = deviation / max(scale, 0.02 * size, 0.1 * least)
    if count >= _SETTLING and (z > _FAR or z < -_FAR) and abs(deviation) > share * size + least:
        direction = 1 if deviation > 0 else -1
        high_for = high_for + direction if high_for * direction > 0 else direction
        if abs(high_for) <= 15:
            return Track(name, count, mean, scale, z, high_for, 0)
        return Track(name, _SETTLING, value, scale, z, 0, 0)  # this is how things are now
    weight = min(count + 1, _MEMORY)
    mean += deviation / weight
    spread = abs(deviation)
    if count > _SETTLING and spread > 5 * scale:
        spread = 5 * scale
    scale += (1.2533 * spread - scale) / weight
    return _new(Track, (name, count + 1, mean, scale, z, 0, moved_ago))


def are_quiet(tracks: tuple[Track, ...]) -> bool:
    """Whether no metric is far from where it usually is."""
    return not any(track.high_for for track in tracks)


def testify(before: Witnesses | None, tracks: tuple[Track, ...], seen: Observation) -> Witnesses | None:
    """
    The second witnesses after one observation; None when there is nothing to say.

    Args:
        before: as they were.
        tracks: the metrics, this observation included.
        seen: the observation.

    """
    infra, weights = (before.infra * _FADE, before.weights * _FADE) if before is not None else (0.0, 0.0)
    if seen.witnesses:
        if Witness.SERVER_UNHEALTHY in seen.witnesses:
            infra = max(infra, _SERVER_NATS)
        if Witness.WEIGHTS_SUSPECT in seen.witnesses:
            weights = max(weights, _WEIGHTS_NATS)
    failing = failing_share(seen)
    for track in tracks:
        if track.name == "aborted_ratio" and failing is not None and failing > _USUAL_FAILURES:
            infra = max(infra, _failing_nats(track, failing, seen))
        elif track.name == "logprob_diff" and track.high_for > 0:
            weights = max(weights, min(_CERTAIN, track.z))
    complete = failing is not None and failing <= _USUAL_FAILURES
    if infra < 0.1 and weights < 0.1:
        return _COMPLETE if complete else None
    return Witnesses(infra, weights, complete)


def _failing_nats(track: Track, failing: float, seen: Observation) -> float:
    """
    Evidence that more rollouts fail than usual: the divergence from the usual share, for half the rollouts
    (they fail together).
    """
    usual = max(track.mean if track.high_for or track.known > 3 else 0.0, _USUAL_FAILURES)
    if failing < usual + 0.05:
        return 0.0
    rollouts = min((seen.ok or 0) + (seen.failed or 0) or 32, 64)
    rest = (1 - failing) * log((1 - failing) / (1 - usual)) if failing < 1 else 0.0
    return min(_CERTAIN, 0.5 * rollouts * (failing * log(failing / usual) + rest))


def policy_moved(tracks: tuple[Track, ...], complete: bool) -> bool:
    """
    Whether entropy or KL moved far of late; response length counts too when all rollouts are known to be
    complete.
    """
    telling = ("entropy", "kl", "response_length", "clip_ratio") if complete else ("entropy", "kl")
    return any(track.name in telling and 0 <= track.moved_ago <= 20 for track in tracks)


def warned(tracks: tuple[Track, ...]) -> tuple[Reason, Track] | None:
    """A metric that has been far away for three observations in a row."""
    for track in tracks:
        reason = _WARNINGS.get(track.name)
        if reason is None:
            continue
        one_sided = track.name in {"clip_ratio", "aborted_ratio", "logprob_diff", "kl"}
        if track.high_for >= 3 or (track.high_for <= -3 and not one_sided):
            return reason, track
    return None
