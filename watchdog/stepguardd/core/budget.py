"""
How often a remedy may be tried: a sliding window and a growing wait.

The history is part of the state, so a restart of the daemon refills nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """
    Times at which something was spent, oldest first, and how many in a row since the run was last well.

    `streak` drives the wait alone; the window alone decides whether there is any left.
    """

    spent_at: tuple[float, ...] = ()
    streak: int = 0
    last: float | None = None


def left(budget: Budget, *, now: float, limit: int, window_s: float) -> int:
    """How many may still be spent within the window."""
    return max(0, limit - sum(1 for at in budget.spent_at if now - at < window_s))


def spend(budget: Budget, *, now: float, limit: int, window_s: float) -> Budget:
    """The budget with one more spent; what has left the window is forgotten."""
    recent = tuple(at for at in budget.spent_at if now - at < window_s)[-(limit - 1) :] if limit > 1 else ()
    return Budget(spent_at=(*recent, now), streak=budget.streak + 1, last=now)


def wait_s(budget: Budget, *, first_s: float, max_s: float, jitter: float) -> float:
    """
    The wait before the next try: none for the first, then `first_s`, doubling up to `max_s`.

    The jitter, a share of the wait, comes from the streak by the golden ratio: spread as evenly as chance
    would, and the same in every replay.
    """
    if budget.streak <= 1:
        return 0.0
    wait = min(max_s, first_s * 2.0 ** min(budget.streak - 2, 30))
    return wait * (1.0 + jitter * (budget.streak * 0.6180339887498949 % 1.0))


def recovered(budget: Budget, *, now: float, healthy_reset_s: float) -> Budget:
    """The streak ends once the run has been well for long enough; the window is left alone."""
    if budget.last is None or now - budget.last < healthy_reset_s:
        return budget
    return Budget(spent_at=budget.spent_at, streak=0, last=None)
