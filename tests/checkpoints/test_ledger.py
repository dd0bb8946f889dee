"""The ledger and the choice: pure, so that any history may be tried."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepguardd.core.choice import Candidate, Refusal, choose, explain
from stepguardd.core.ledger import (
    HEALTHY_STEPS,
    LedgerRow,
    after_step,
    after_vetting,
    newest_proven,
    norm_warnings,
    plan_pins,
    proven,
)
from stepguardd.core.verdict import Depth, Finding, Verdict, Vetting


def row(step: int, **more) -> LedgerRow:
    base = LedgerRow(step=step, attempt=0, path=f"/c/{step}", verdict=Verdict.GOOD, size_bytes=100)
    return replace(base, **{"healthy_steps": HEALTHY_STEPS, **more})


def vetting(verdict: Verdict, reason: str = "why") -> Vetting:
    return Vetting(verdict=verdict, finding=Finding.WHOLE, reason=reason, size_bytes=7, depth=Depth.FULL)


# --- choosing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("newest", "why"),
    [
        (row(50), Refusal.INSIDE_INCIDENT),
        (row(45), Refusal.INSIDE_INCIDENT),
        (row(40, verdict=Verdict.BAD), Refusal.BAD),
        (row(40, verdict=Verdict.INCOMPLETE), Refusal.INCOMPLETE),
        (row(40, verdict=Verdict.UNKNOWN), Refusal.UNKNOWN),
        (row(40, healthy_steps=HEALTHY_STEPS - 1), Refusal.NOT_PROVEN),
        (row(40, set_aside=True), Refusal.SET_ASIDE),
        (row(40, gone=True), Refusal.GONE),
    ],
)
def test_each_refusal_is_explained_and_the_next_one_is_chosen(newest: LedgerRow, why: Refusal) -> None:
    choice = newest_proven([newest, row(30), row(20)], onset_step=45)
    assert choice.chosen is not None
    assert choice.chosen.step == 30
    assert [refused.why for refused in choice.refused] == [why]
    assert explain(choice)[0].startswith(f"step {newest.step} ")


def test_a_pinned_one_that_rotation_took_may_be_chosen() -> None:
    choice = newest_proven([row(40, gone=True, pinned_path="/p/40"), row(30)], onset_step=45)
    assert choice.chosen is not None
    assert choice.chosen.step == 40


def test_a_step_saved_again_in_a_later_attempt_counts_as_it_is_now() -> None:
    old, new = row(40, set_aside=True), row(40, attempt=1, verdict=Verdict.BAD)
    assert newest_proven([new, old], onset_step=99).refused[0].why is Refusal.BAD


def test_offline_good_is_enough() -> None:
    candidate = Candidate(step=3, path="/c/3", verdict=Verdict.GOOD, reason="")
    assert choose([candidate], before_step=4).chosen == candidate
    assert choose([candidate], before_step=3).chosen is None


def test_a_slot_that_tells_no_step_is_never_chosen() -> None:
    choice = choose([Candidate(step=None, path="/c", verdict=Verdict.GOOD, reason="")], before_step=9)
    assert choice.chosen is None
    assert explain(choice) == ["/c does not tell its step"]


ROWS = st.lists(
    st.builds(
        row,
        st.integers(0, 60),
        verdict=st.sampled_from(Verdict),
        healthy_steps=st.integers(0, 8),
        set_aside=st.booleans(),
        gone=st.booleans(),
        attempt=st.integers(0, 2),
        pinned_path=st.none() | st.just("/p"),
    ),
    max_size=12,
    unique_by=lambda r: (r.attempt, r.step),
)


@given(ROWS, st.integers(0, 70))
@settings(max_examples=200, deadline=None)
def test_whatever_the_history_the_chosen_one_is_proven_and_from_before(
    rows: list[LedgerRow], onset: int
) -> None:
    choice = newest_proven(rows, onset_step=onset)
    fit = [r for r in rows if r.step < onset and proven(r)]
    if choice.chosen is not None:
        assert any(r.step == choice.chosen.step for r in fit)
        assert all(refused.step > choice.chosen.step for refused in choice.refused)
    newest_attempts = {r.step: r for r in sorted(rows, key=lambda r: r.attempt)}
    best = max((r.step for r in newest_attempts.values() if r in fit), default=None)
    assert (choice.chosen.step if choice.chosen else None) == best


# --- proof --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_proven_by_healthy_steps_without_a_break() -> None:
    rows = {10: row(10, healthy_steps=0)}

    def steps(outcomes: str) -> None:
        for number, outcome in enumerate(outcomes):
            for changed in after_step(
                list(rows.values()), attempt=0, step=11 + number, healthy=outcome == "+"
            ):
                rows[changed.step] = changed

    steps("++++-")
    assert not proven(rows[10])
    steps("++++")
    assert not proven(rows[10])
    steps("+")
    assert proven(rows[10])
    steps("-")
    assert proven(rows[10])


def test_steps_of_another_attempt_or_before_it_prove_nothing() -> None:
    start = [row(10, healthy_steps=0)]
    assert after_step(start, attempt=1, step=11, healthy=True) == []
    assert after_step(start, attempt=0, step=10, healthy=True) == []


def test_the_trainers_own_norms_stand_in_for_files_too_large_to_read() -> None:
    start = row(10, verdict=Verdict.UNKNOWN, norms=(("actor", 3.0),))
    assert after_vetting(start, vetting(Verdict.UNKNOWN, "too large")).verdict is Verdict.GOOD
    assert after_vetting(start, vetting(Verdict.BAD)).verdict is Verdict.BAD
    assert after_vetting(start, vetting(Verdict.INCOMPLETE)).verdict is Verdict.INCOMPLETE
    broken = replace(start, norms=(("actor", float("nan")),))
    assert after_vetting(broken, vetting(Verdict.GOOD)).verdict is Verdict.BAD
    assert after_vetting(replace(start, norms=()), vetting(Verdict.UNKNOWN)).verdict is Verdict.UNKNOWN


def test_norms_that_no_optimizer_could_reach_are_a_warning() -> None:
    before = row(10, norms=(("actor", 3.0), ("critic", 1.0)))
    assert norm_warnings(before, row(20, norms=(("actor", 3.1), ("critic", 1.0)))) == []
    assert (
        "actor is 300 at step 20, 3 at step 10"
        in norm_warnings(before, row(20, norms=(("actor", 300.0),)))[0]
    )
    assert len(norm_warnings(before, row(20, norms=(("actor", 0.0),)))) == 1


# --- pinning, planned ---------------------------------------------------------------------------------------


def test_the_last_two_proven_are_pinned_and_older_pins_released() -> None:
    rows = [row(10, pinned_path="/p/10"), row(20, pinned_path="/p/20"), row(30), row(40, healthy_steps=0)]
    plan = plan_pins(rows, copies=False, budget_bytes=0, free_bytes=0)
    assert [r.step for r in plan.pin] == [30]
    assert [r.step for r in plan.release] == [10]
    assert plan.refused == ()


def test_copies_keep_to_the_budget_and_the_disk_and_nothing_is_released_for_want_of_room() -> None:
    rows = [row(10, pinned_path="/p/10"), row(20), row(30)]
    plan = plan_pins(rows, copies=True, budget_bytes=100, free_bytes=10_000)
    assert ([r.step for r in plan.pin], [r.step for r, _ in plan.refused]) == ([30], [20])
    assert "budget" in plan.refused[0][1]
    assert plan.release == ()
    plan = plan_pins(rows, copies=True, budget_bytes=10_000, free_bytes=105)
    assert plan.pin == ()
    assert "of the disk may be used" in plan.refused[0][1]


@given(ROWS, st.integers(0, 400), st.integers(0, 400), st.booleans())
@settings(max_examples=150, deadline=None)
def test_pins_never_cost_more_than_allowed(
    rows: list[LedgerRow], budget: int, free: int, copies: bool
) -> None:
    plan = plan_pins(rows, copies=copies, budget_bytes=budget, free_bytes=free)
    if copies:
        assert sum(r.size_bytes for r in plan.pin) <= min(budget, free - free // 10)
    assert all(proven(r) for r in plan.pin)
    assert len(plan.pin) <= 2
    assert not {(r.attempt, r.step) for r in plan.pin} & {(r.attempt, r.step) for r in plan.release}
