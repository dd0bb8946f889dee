"""admit: a batch is judged before its optimizer step, with a daemon or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from guard.virtual_daemon import VirtualDaemon, VirtualTime
from stepguard.gate import Order, Phase
from stepguard.guard import Guard
from stepguard.isolation import Aborted
from stepguard.orders import RollbackRequested, StopRequested

Guards = Callable[..., Guard]
Daemons = Callable[..., VirtualDaemon]
BAD = Aborted(ValueError())


def zeros_are_garbage(batch: dict[str, Any]) -> str | None:
    return "reward_collapse" if batch["reward"] and batch["reward"]["max"] == 0 else None


def test_a_good_batch_is_published_judged_and_admitted_within_milliseconds(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    before = time.ns
    batch = guard.admit(188, ["a", BAD] + ["b"] * 10, rewards=[1.0] + [0.5] * 11, weight_versions=[187] * 12)
    assert (batch.ok, batch.reason, batch.mask) == (True, None, [True, False] + [True] * 10)
    assert batch.rewards == [1.0, None] + [0.5] * 10
    assert time.ns - before < 5e6
    (report,) = daemon.of_kind("batch")
    assert report | {"reward": None, "began": None} == {
        "v": 1,
        "kind": "batch",
        "attempt": 0,
        "step": 188,
        "batch": 1,
        "ok": 11,
        "failed": 1,
        "dropped_groups": 0,
        "reward": None,
        "weight_versions": {"187": 12},
        "stale": 0,
        "refused": None,
        "began": None,
    }
    assert report["reward"]["max"] == 1.0


def test_incident_a_a_batch_of_zeros_is_refused_before_its_step_though_nothing_failed_here(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    daemon = daemons(judge=zeros_are_garbage)
    guard = guards()
    time.after(30, lambda: daemon.order(Order.GO, judged_ok=True))
    before = time.ns
    batch = guard.admit(188, ["a"] * 8, rewards=[0.0] * 8)
    assert (batch.ok, batch.reason) == (False, "reward_collapse")
    assert (time.ns - before) / 1e9 >= 29.9, "it held until the daemon let go"
    assert guard.admit(188, ["a"] * 8, rewards=[1.0] * 8).ok


def test_past_the_timeout_it_keeps_waiting_as_a_hold_while_the_daemon_lives(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    daemon = daemons(judge=None)
    guard = guards()
    phases: list[Phase] = []

    def look() -> None:
        half = daemon.page.trainer()
        assert half is not None
        phases.append(half.phase)

    def judge() -> None:
        daemon.judge = lambda batch: None

    time.after(0.1, look)
    time.after(100, look)
    time.after(200, judge)
    before = time.ns
    assert guard.admit(1, ["a"], rewards=[1.0]).ok
    assert 200 <= (time.ns - before) / 1e9 < 202
    assert phases == [Phase.UNKNOWN, Phase.HELD]
    assert 190 < len(daemon.of_kind("batch")) < 210, "repeated each second, in case it was lost"
    assert {report["batch"] for report in daemon.of_kind("batch")} == {1}


def test_when_the_daemon_dies_while_it_judges_the_local_verdict_counts(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    daemon = daemons(judge=None)
    guard = guards()
    time.after(1, daemon.die)
    assert guard.admit(1, ["a"]).ok
    assert not guard.admit(2, [BAD]).ok


def test_a_verdict_that_a_dying_daemon_left_on_the_page_counts(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    daemon = daemons(judge=zeros_are_garbage)
    guard = guards()
    guard.before_step(1)

    def judge_and_die() -> None:
        daemon.tick()
        daemon.die()
        time.ns += 60_000_000_000

    time.after(0.0001, judge_and_die)
    time.after(100, lambda: daemons().order(Order.GO))
    batch = guard.admit(1, ["a"], rewards=[0.0])
    assert (batch.ok, batch.reason) == (False, "reward_collapse")


def test_batch_numbers_go_on_where_the_page_is(guards: Guards, daemon: VirtualDaemon) -> None:
    first = guards()
    for step in range(3):
        first.admit(step, ["a"])
    first.close()
    guards().admit(3, ["a"])
    assert [report["batch"] for report in daemon.of_kind("batch")] == [1, 2, 3, 4]
    assert daemon.of_kind("batch")[-1]["attempt"] == 1


def test_a_refused_batch_is_reported_with_its_reason(guards: Guards, daemon: VirtualDaemon) -> None:
    guard = guards()
    batch = guard.admit(1, [BAD, "a"], rewards=[0, 1])
    assert (batch.ok, batch.reason) == (False, "failed_fraction")
    assert [report["refused"] for report in daemon.of_kind("batch")] == ["failed_fraction"]


def test_rollouts_of_weights_never_announced_are_refused_as_stale(
    guards: Guards, daemon: VirtualDaemon
) -> None:
    guard = guards()
    guard.weights("187")
    assert guard.admit(188, ["a"] * 4, weight_versions=["187"] * 4).ok
    guard.after_step(188, weight_version=188)
    batch = guard.admit(189, ["a"] * 4, weight_versions=["default"] * 4)
    assert (batch.ok, batch.reason) == (False, "stale_weights")
    assert guard.admit(189, ["a"] * 4, weight_versions=[188] * 4).ok
    assert [report["stale"] for report in daemon.of_kind("batch")] == [0, 4, 0]


def test_a_batch_that_met_a_hold_for_another_reason_is_still_good(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    guard.weights("187")
    daemon.order(Order.HOLD, "operator")
    time.after(5, lambda: daemon.order(Order.GO))
    assert guard.admit(188, ["a"] * 4, weight_versions=["187"] * 4).ok


def test_unless_the_weights_have_changed_meanwhile(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    daemon = daemons(judge=None)
    guard = guards()
    guard.weights("187")
    guard.on_resync(lambda: guard.weights("187-again"))

    def resync_then_judge() -> None:
        daemon.order(Order.RESYNC)
        daemon.judge = lambda batch: None

    time.after(1, resync_then_judge)
    time.after(3, lambda: daemon.order(Order.GO))
    batch = guard.admit(188, ["a"] * 4, weight_versions=["187"] * 4)
    assert (batch.ok, batch.reason) == (False, "stale_weights")
    assert batch.mask == [False] * 4


def test_a_rollback_while_the_verdict_is_awaited_is_raised_at_once(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    daemon = daemons(judge=None)
    guard = guards()
    guard.weights("188")
    time.after(1, lambda: daemon.order(Order.ROLLBACK, "poison", target_step=180, target_path="/c"))
    with pytest.raises(RollbackRequested):
        guard.admit(188, ["a"])
    daemon.judge = lambda batch: None
    time.after(1, lambda: daemon.order(Order.GO))
    assert guard.admit(181, ["a"], weight_versions=["180"]).ok, "what was announced before a rollback is void"


def test_a_step_on_a_refused_batch_is_said_as_an_error_once(
    guards: Guards, caplog: pytest.LogCaptureFixture
) -> None:
    guard = guards(None)
    assert not guard.admit(1, [BAD]).ok
    guard.before_step(1)
    guard.before_step(1)
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "refused (failed_fraction)" in errors[0].getMessage()
    assert guard.admit(1, ["a"]).ok
    guard.before_step(2)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == errors


def test_too_many_refused_batches_in_a_row_hold_without_any_daemon_and_then_stop(
    guards: Guards, time: VirtualTime
) -> None:
    guard = guards(None)
    assert not guard.admit(1, [BAD]).ok
    assert not guard.admit(1, [BAD]).ok
    before = time.ns
    with pytest.raises(StopRequested, match="refused_batches"):
        guard.admit(1, [BAD])
    assert 600 <= (time.ns - before) / 1e9 < 601


def test_a_good_batch_between_refused_ones_starts_the_count_anew(guards: Guards) -> None:
    guard = guards(None)
    for _ in range(5):
        assert not guard.admit(1, [BAD]).ok
        assert not guard.admit(1, [BAD]).ok
        assert guard.admit(1, ["a"]).ok


def test_the_guards_own_hold_ends_with_a_living_daemons_newer_go(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    time.after(50, lambda: daemon.order(Order.GO, "looked at"))
    before = time.ns
    for _ in range(3):
        assert not guard.admit(1, [BAD]).ok
    assert 50 <= (time.ns - before) / 1e9 < 51
    half = daemon.page.trainer()
    assert half is not None
    assert half.phase is not Phase.HELD
    guard.before_step(1)


def test_a_daemon_that_starts_can_lift_the_guards_own_hold(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    guard = guards()
    time.after(50, daemons)
    for _ in range(3):
        assert not guard.admit(1, [BAD]).ok
    assert guard.admit(1, ["a"]).ok


def test_where_the_daemon_holds_the_guard_does_not_count(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    daemon = daemons(judge=lambda batch: batch["refused"])
    guard = guards()
    for _ in range(9):
        time.after(2, lambda: daemon.order(Order.GO))
        before = time.ns
        assert not guard.admit(1, [BAD]).ok
        assert (time.ns - before) / 1e9 < 3


def test_began_is_before_the_first_rollout_of_the_batch(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    import asyncio

    guard = guards()
    seconds = []

    async def rollout(length_s: int) -> str:
        time.ns += length_s * 1_000_000_000
        return "a"

    for _ in range(2):
        seconds.append(time.ns / 1e9)
        outcomes = asyncio.run(guard.gather([rollout(3), rollout(2)]))
        asyncio.run(guard.gather([rollout(1)]))
        time.ns += 10_000_000_000
        guard.admit(1, outcomes)
    guard.admit(2, outcomes)
    began = [report["began"] for report in daemon.of_kind("batch")]
    assert began[:2] == pytest.approx(seconds, abs=0.1)
    assert began[2] == pytest.approx(time.ns / 1e9, abs=0.1)
