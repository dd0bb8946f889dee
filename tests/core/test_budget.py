"""How often a remedy may be tried, and how long is waited in between."""

from hypothesis import given
from hypothesis import strategies as st

from stepguardd.core.budget import Budget, left, recovered, spend, wait_s


@given(
    st.integers(min_value=1, max_value=6),
    st.floats(min_value=1, max_value=1000),
    st.lists(st.floats(min_value=0, max_value=500), max_size=60),
)
def test_no_window_ever_holds_more_than_the_budget(limit: int, window_s: float, gaps: list[float]) -> None:
    """Whoever asks before spending never spends more than the limit within any window."""
    now, budget, spent = 0.0, Budget(), []
    for gap in gaps:
        now += gap
        if left(budget, now=now, limit=limit, window_s=window_s) > 0:
            budget = spend(budget, now=now, limit=limit, window_s=window_s)
            spent.append(now)
        assert len(budget.spent_at) <= limit
    for index, start in enumerate(spent):
        within = [at for at in spent[index:] if at - start < window_s]
        assert len(within) <= limit


def test_the_first_try_waits_for_nothing_and_the_next_ones_longer_and_longer() -> None:
    waits = [
        wait_s(Budget(streak=streak), first_s=10, max_s=300, jitter=0.0)
        for streak in (0, 1, 2, 3, 4, 7, 8, 900)
    ]
    assert waits == [0, 0, 10, 20, 40, 300, 300, 300]


@given(st.integers(min_value=2, max_value=10_000))
def test_jitter_only_adds_and_only_its_share(streak: int) -> None:
    bare = wait_s(Budget(streak=streak), first_s=10, max_s=300, jitter=0.0)
    shaken = wait_s(Budget(streak=streak), first_s=10, max_s=300, jitter=0.2)
    assert bare <= shaken <= bare * 1.2


def test_health_ends_the_streak_and_refills_no_window() -> None:
    budget = spend(Budget(), now=0, limit=3, window_s=900)
    assert recovered(budget, now=599, healthy_reset_s=600) is budget
    rested = recovered(budget, now=600, healthy_reset_s=600)
    assert (rested.streak, rested.spent_at) == (0, (0,))
    assert left(rested, now=600, limit=3, window_s=900) == 2
