"""
What weights show of themselves: a server's own word on its version, a checksum, a greedy answer.

The version is a label that anybody may stick on. A greedy answer and a checksum come from the weights
themselves, but have to be known from somewhere: from an earlier proof of the same version, or from another
replica that serves it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .events import GreedyToken, WeightsLook
from .reasons import Reason

ANSWERS_KEPT = 8
LOG_PROB_TOLERANCE = 0.1
"""In nats: bfloat16, batching and kernels move a log-probability by hundredths, other weights by far more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownAnswer:
    """What a version answered when it was proven. In another attempt its name may stand for other weights."""

    attempt: int
    version: str
    tokens: tuple[GreedyToken, ...]


def learned(
    known: tuple[KnownAnswer, ...], attempt: int, version: str, tokens: tuple[GreedyToken, ...]
) -> tuple[KnownAnswer, ...]:
    """The answers with this one among them, the newest last; one that is known already stays as it was."""
    if not tokens or answer(known, attempt, version) is not None:
        return known
    return (*known, KnownAnswer(attempt=attempt, version=version, tokens=tokens))[-ANSWERS_KEPT:]


def answer(known: tuple[KnownAnswer, ...], attempt: int, version: str) -> tuple[GreedyToken, ...] | None:
    """What this version answers; None where it was never seen proven."""
    for one in known:
        if (one.attempt, one.version) == (attempt, version):
            return one.tokens
    return None


def disagree(one: tuple[GreedyToken, ...], other: tuple[GreedyToken, ...]) -> bool:
    """
    Whether two greedy answers cannot come from the same weights.

    They are compared up to the first token that differs. Where its two candidates were about as likely, it
    was a near-tie, which rounding alone decides.
    """
    for mine, theirs in zip(one, other, strict=False):
        unsure = mine.log_prob is None or theirs.log_prob is None
        if unsure:
            if mine.token != theirs.token:
                return True
            continue
        assert mine.log_prob is not None
        assert theirs.log_prob is not None
        if abs(mine.log_prob - theirs.log_prob) > LOG_PROB_TOLERANCE:
            return True
        if mine.token != theirs.token:
            return False
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Contradiction:
    """What speaks against weights of the right version, and the other server where it is one against one."""

    reason: Reason
    text: str
    peer: str | None = None


def contradiction(
    own: WeightsLook, peer: WeightsLook | None, known: tuple[GreedyToken, ...] | None
) -> Contradiction | None:
    """
    What speaks against a server's weights, although their version is right; None where nothing does.

    Args:
        own: what the server under proof showed.
        peer: what another one showed that serves the same version.
        known: what that version answered when it was proven.

    """
    if known is not None and own.greedy and disagree(own.greedy, known):
        text = f"{own.server} says it serves {own.version} and does not answer as {own.version} did"
        return Contradiction(reason=Reason.ANSWER_DIFFERS, text=text)
    if peer is None or peer.version != own.version:
        return None
    if None not in {own.checksum, peer.checksum} and own.layout == peer.layout:
        if own.checksum != peer.checksum:
            sums = f"{(own.checksum or '')[:12]} and {(peer.checksum or '')[:12]}"
            text = f"{own.server} and {peer.server} both say {own.version}, with checksums {sums}"
            return Contradiction(reason=Reason.CHECKSUM_DIFFERS, text=text, peer=peer.server)
    elif own.greedy and peer.greedy and disagree(own.greedy, peer.greedy):
        text = f"{own.server} and {peer.server} both say {own.version} and answer differently"
        return Contradiction(reason=Reason.ANSWER_DIFFERS, text=text, peer=peer.server)
    return None


def alike(own: WeightsLook, peer: WeightsLook | None) -> bool:
    """Whether two servers showed the same weights, and not merely nothing that tells them apart."""
    if peer is None or own.version is None or contradiction(own, peer, None) is not None:
        return False
    summed = None not in {own.checksum, peer.checksum} and own.layout == peer.layout
    return own.version == peer.version and (summed or bool(own.greedy and peer.greedy))


def newest(versions: Iterable[str | None]) -> str | None:
    """The version that none of them is newer than; of those that cannot be compared, the first."""
    found: str | None = None
    for version in versions:
        if version is not None and (found is None or older(found, version)):
            found = version
    return found


def number(version: str) -> tuple[str, int] | None:
    """A version's prefix and the number at its end; None for one without a number, as `base`."""
    digits = len(version) - len(version.rstrip("0123456789"))
    if not 0 < digits <= 18 or not version.isascii():
        return None
    return version[:-digits], int(version[-digits:])


def older(version: str, than: str) -> bool:
    """Whether one version is certainly older than another: the same prefix, a smaller number."""
    one, other = number(version), number(than)
    return one is not None and other is not None and one[0] == other[0] and one[1] < other[1]
