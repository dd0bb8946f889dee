"""
Admission: the verdict on a batch that needs nobody else.

Promise: pure functions. A failed member (aborted, stale, or with a reward that is missing or not finite) is
outside the mask, and outside every mean and standard deviation; it is never a 0 among the others. The mask
never has more members than live ones, and the shape of the batch stays.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stepguard.isolation import Aborted
from stepguard.prompts import Withheld
from stepguard.reports import RewardStats, number


class Refusal(StrEnum):
    """Why the local verdict refuses a batch."""

    EMPTY = "empty"
    FAILED_FRACTION = "failed_fraction"
    STALE_WEIGHTS = "stale_weights"
    NO_GROUP = "no_group"
    NOT_DIVISIBLE = "not_divisible"


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """
    What became of a batch.

    Args:
        ok: take the optimizer step; False: roll out again, this batch taught nothing.
        reason: why not; a local `Refusal` or the daemon's reason code.
        items: the outcomes as given, same shape.
        mask: True where a member counts, same shape as `items`.
        rewards: the rewards as floats, one a member in order, None where a member does not count; None if
            none were given.
        group_ids: one a member in order, as given or as the nesting says; None if there are no groups.

    """

    ok: bool
    reason: str | None
    items: list[Any]
    mask: list[Any]
    rewards: list[float | None] | None
    group_ids: list[Hashable] | None

    @property
    def flat_mask(self) -> list[bool]:
        """The mask, one a member in order."""
        return list(leaves(self.mask))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """
    Numbers in a form that adds up over ranks.

    Args:
        count: how many.
        mean: their mean, 0.0 of none.
        squares: the sum of their squared distances from the mean.
        least: the least.
        greatest: the greatest.

    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of these."""
        if not values:
            return cls()
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(count=len(values), mean=mean, squares=squares, least=min(values), greatest=max(values))

    def __add__(self, other: Spread) -> Spread:
        count = self.count + other.count
        if count == 0:
            return self
        apart = other.mean - self.mean
        return Spread(
            count=count,
            mean=self.mean + apart * other.count / count,
            squares=self.squares + other.squares + apart**2 * self.count * other.count / count,
            least=min(self.least, other.least),
            greatest=max(self.greatest, other.greatest),
        )

    def stats(self) -> RewardStats | None:
        """Mean, population standard deviation, least and greatest; None of none."""
        if self.count == 0:
            return None
        spread = math.sqrt(self.squares / self.count)
        return {
            "mean": number(self.mean),
            "std": number(spread),
            "min": number(self.least),
            "max": number(self.greatest),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """
    A batch in numbers; they add up over ranks.

    Args:
        ok: members that did not fail.
        failed: members that did, stale ones included; what was withheld on purpose is neither.
        stale: members generated with weights that are too old or unknown.
        kept: members in the mask.
        lone: members that did not fail and went with their group.
        dropped_groups: groups left with fewer than two live members.
        rewards: of the members that did not fail.
        weight_versions: how many members were generated with which; those without a version are left out.

    """

    ok: int
    failed: int
    stale: int
    kept: int
    lone: int
    dropped_groups: int
    rewards: Spread
    weight_versions: Counter[str]


def total(shares: Sequence[Tally]) -> Tally:
    """The tally of a batch that lies on several ranks."""
    if len(shares) == 1:
        return shares[0]
    return Tally(
        ok=sum(share.ok for share in shares),
        failed=sum(share.failed for share in shares),
        stale=sum(share.stale for share in shares),
        kept=sum(share.kept for share in shares),
        lone=sum(share.lone for share in shares),
        dropped_groups=sum(share.dropped_groups for share in shares),
        rewards=sum((share.rewards for share in shares), start=Spread()),
        weight_versions=sum((share.weight_versions for share in shares), start=Counter()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The local verdict on one rank's share of a batch; sequences have one entry a member."""

    tally: Tally
    mask: tuple[bool, ...]
    rewards: tuple[float | None, ...] | None
    group_ids: tuple[Hashable, ...] | None


def judge(
    outcomes: Sequence[Any],
    *,
    group_ids: Any = None,
    rewards: Any = None,
    weight_versions: Any = None,
    announced: Sequence[str] = (),
    max_staleness: int = 0,
    divisible_by: int = 1,
) -> Verdict:
    """
    Judge a batch.

    Args:
        outcomes: members, or lists of members; a list at the top level is a group, unless `group_ids` says
            otherwise.
        group_ids: one a member, or one a top-level item; members of one prompt share one.
        rewards: the same; numbers or None, tensors and arrays welcome.
        weight_versions: the same; None where a version is unknown.
        announced: versions the trainer has announced, newest last; none: nothing is stale.
        max_staleness: how many versions behind the newest still count.
        divisible_by: the mask keeps a multiple of this many members (ranks).

    Raises:
        ValueError: a sequence has another length than the batch.

    """
    members = list(leaves(outcomes))
    versions = _per_member("weight_versions", weight_versions, outcomes)
    scores = _per_member("rewards", rewards, outcomes)
    groups = _groups(group_ids, outcomes)
    stale = [_stale(version, announced, max_staleness) for version in versions or ()] or [False] * len(
        members
    )
    values = None if scores is None else [_finite(score) for score in scores]
    aborted = [isinstance(member, Aborted) for member in members]
    withheld = sum(
        isinstance(member, Aborted) and isinstance(member.exception, Withheld) for member in members
    )
    alive = [
        not (gone or old) and (values is None or values[index] is not None)
        for index, (gone, old) in enumerate(zip(aborted, stale, strict=True))
    ]
    by_group, dropped = _without_lone(alive, groups)
    mask = _divisible(by_group, groups, divisible_by)
    live = [value for value, counts in zip(values or (), alive, strict=False) if counts and value is not None]
    return Verdict(
        tally=Tally(
            ok=sum(alive),
            failed=len(members) - sum(alive) - withheld,
            stale=sum(old and not gone for gone, old in zip(aborted, stale, strict=True)),
            kept=sum(mask),
            lone=sum(alive) - sum(by_group),
            dropped_groups=dropped,
            rewards=Spread.of(live),
            weight_versions=Counter(str(version) for version in versions or () if version is not None),
        ),
        mask=tuple(mask),
        rewards=None
        if values is None
        else tuple(value if kept else None for value, kept in zip(values, mask, strict=True)),
        group_ids=None if groups is None else tuple(groups),
    )


def refusal(tally: Tally, max_failed_fraction: float) -> Refusal | None:
    """The fuse: whether a batch with these numbers is refused, and why."""
    members = tally.ok + tally.failed
    if members == 0:
        return Refusal.EMPTY
    if tally.failed > max_failed_fraction * members:
        others = tally.failed - tally.stale
        return Refusal.FAILED_FRACTION if others > max_failed_fraction * members else Refusal.STALE_WEIGHTS
    if tally.kept == 0:
        return Refusal.NO_GROUP if tally.lone == tally.ok else Refusal.NOT_DIVISIBLE
    return None


def group_advantages(
    rewards: Sequence[float | None],
    group_ids: Sequence[Hashable],
    mask: Sequence[bool],
    *,
    scale: bool = True,
    epsilon: float = 1e-6,
) -> list[float]:
    """
    Group-relative advantages (GRPO, arXiv:2402.03300) over the live members alone.

    Args:
        rewards: one a member.
        group_ids: one a member.
        mask: one a member; the others are outside the mean and the standard deviation.
        scale: divide by the group's sample standard deviation.
        epsilon: added to it.

    Returns:
        One a member: 0.0 outside the mask, and in a group with fewer than two live members.

    """
    alive: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, (group, counts) in enumerate(zip(group_ids, mask, strict=True)):
        if counts:
            alive[group].append(index)
    out = [0.0] * len(rewards)
    for indices in alive.values():
        values = [float(value) for index in indices if (value := rewards[index]) is not None]
        if len(values) < 2 or len(values) < len(indices):
            continue
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
        for index, value in zip(indices, values, strict=True):
            out[index] = (value - mean) / (spread + epsilon) if scale else value - mean
    return out


def leaves(items: Iterable[Any]) -> Iterable[Any]:
    """The members of nested lists, in order."""
    for item in items:
        if isinstance(item, list):
            yield from leaves(item)
        else:
            yield item


def shaped(flat: Sequence[Any], like: Iterable[Any]) -> list[Any]:
    """A flat sequence in the shape of nested lists."""
    entries = iter(flat)

    def fill(items: Iterable[Any]) -> list[Any]:
        return [fill(item) if isinstance(item, list) else next(entries) for item in items]

    return fill(like)


def _per_member(name: str, given: Any, outcomes: Sequence[Any]) -> list[Any] | None:
    """One entry a member, from one a member (flat or nested) or one a top-level item."""
    if given is None:
        return None
    plain = given.tolist() if hasattr(given, "tolist") else list(given)
    flat = list(leaves(plain))
    sizes = [sum(1 for _ in leaves([item])) for item in outcomes]
    if len(flat) == sum(sizes):
        return flat
    if len(flat) == len(sizes):
        return [entry for entry, size in zip(flat, sizes, strict=True) for _ in range(size)]
    raise ValueError(f"admit: {name} has {len(flat)} entries for a batch of {sum(sizes)} members")


def _groups(group_ids: Any, outcomes: Sequence[Any]) -> list[Hashable] | None:
    if group_ids is not None or not any(isinstance(item, list) for item in outcomes):
        return _per_member("group_ids", group_ids, outcomes)
    return _per_member("group_ids", range(len(outcomes)), outcomes)


def _finite(score: Any) -> float | None:
    """A reward, or None for what is none."""
    if score is None or isinstance(score, str | bytes):
        return None
    try:
        value = float(score)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _stale(version: Any, announced: Sequence[str], max_staleness: int) -> bool:
    """Whether a version is known to be too old; one that was never announced is (a server's base weights)."""
    if version is None or not announced:
        return False
    return str(version) not in announced[-(max_staleness + 1) :]


def _without_lone(alive: Sequence[bool], groups: Sequence[Hashable] | None) -> tuple[list[bool], int]:
    """The mask without groups that were left with fewer than two live members, and how many these are."""
    if groups is None:
        return list(alive), 0
    size = Counter(groups)
    left = Counter(group for group, lives in zip(groups, alive, strict=True) if lives)
    lone = {group for group in size if size[group] > 1 and left[group] < 2}
    return [lives and group not in lone for group, lives in zip(groups, alive, strict=True)], len(lone)


def _divisible(mask: Sequence[bool], groups: Sequence[Hashable] | None, divisible_by: int) -> list[bool]:
    """The mask cut to a multiple: from the largest group its last member, never down to one of several."""
    out = list(mask)
    kept: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, counts in enumerate(mask):
        if counts:
            kept[index if groups is None else groups[index]].append(index)
    while sum(out) % max(1, divisible_by):
        group = max(kept, key=lambda name: (len(kept[name]), kept[name][-1]))
        going = kept[group][-1:] if len(kept[group]) > 2 else kept[group]
        for index in going:
            out[index] = False
        kept[group] = kept[group][: -len(going)]
        if not kept[group]:
            del kept[group]
    return out
