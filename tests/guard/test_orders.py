"""What an order means: GO, HOLD and the daemon's death, as one pure function."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from stepguard.gate import DaemonHalf, Order
from stepguard.orders import CarryOut, Go, Hold, RollbackRequested, Stop, StopRequested, next_act
from stepguard.settings import GuardSettings

S = 1_000_000_000
NOW = 1000 * S
HALF = DaemonHalf(order=Order.GO, generation=5, reason="why", lease_deadline_ns=NOW + 5 * S)
DEAD = NOW - 1


def act(
    half: DaemonHalf | None,
    *,
    acked: int = 4,
    held_s: float | None = None,
    self_held: str | None = None,
    lost: str = "continue",
) -> Go | Hold | CarryOut | Stop:
    return next_act(
        half,
        now_ns=NOW,
        acked_generation=acked,
        held_since_ns=None if held_s is None else int(NOW - held_s * S),
        self_held=self_held,
        settings=GuardSettings(on_daemon_lost=lost),  # type: ignore[arg-type]
    )


def test_go_lasts_until_the_lease_ends() -> None:
    assert act(HALF) == Go(until_ns=NOW + 5 * S, generation=5, lost=False)


def test_go_with_an_expired_lease_goes_on_or_holds_as_configured() -> None:
    gone = replace(HALF, lease_deadline_ns=DEAD)
    assert act(gone) == Go(until_ns=NOW + S, generation=5, lost=True)
    assert act(gone, lost="hold") == Hold(reason="daemon_lost", generation=5, lost=True, ordered=False)
    assert isinstance(act(replace(gone, lease_deadline_ns=1), lost="hold", held_s=600), Stop)


def test_without_a_page_there_is_no_daemon() -> None:
    assert act(None) == Go(until_ns=NOW + S, generation=0, lost=True)
    assert act(None, lost="hold") == Hold(reason="daemon_lost", generation=0, lost=True, ordered=False)
    assert isinstance(act(None, lost="hold", held_s=600), Stop)


def test_a_living_daemons_hold_holds_for_ever() -> None:
    held = replace(HALF, order=Order.HOLD)
    assert act(held, held_s=1e6) == Hold(reason="why", generation=5, lost=False, ordered=True)


def test_an_orphaned_hold_outlives_its_daemon_for_orphan_hold_s_and_then_stops() -> None:
    held = replace(HALF, order=Order.HOLD, lease_deadline_ns=NOW - 500 * S)
    assert isinstance(act(held), Hold)
    assert isinstance(act(held, held_s=599), Hold)
    assert isinstance(act(held, held_s=700), Hold)
    assert isinstance(act(replace(held, lease_deadline_ns=NOW - 600 * S), held_s=700), Stop)
    assert isinstance(act(replace(held, lease_deadline_ns=1), held_s=1), Hold), "counted from when it was met"


@pytest.mark.parametrize("order", [Order.RESYNC, Order.ROLLBACK, Order.SAVE])
@pytest.mark.parametrize("deadline_ns", [NOW + S, DEAD])
def test_work_is_carried_out_once_and_then_held(order: Order, deadline_ns: int) -> None:
    half = replace(HALF, order=order, target_step=180, target_path="/ckpt", lease_deadline_ns=deadline_ns)
    assert act(half) == CarryOut(
        order=order, generation=5, reason="why", target_step=180, target_path="/ckpt"
    )
    assert isinstance(act(half, acked=5), Hold)


def test_stop_stops_again_and_again_and_a_dead_daemons_stop_says_how_to_go_on() -> None:
    assert act(replace(HALF, order=Order.STOP), acked=9) == Stop(reason="why", generation=5, ordered=True)
    stale = act(replace(HALF, order=Order.STOP, lease_deadline_ns=NOW - 60 * S))
    assert isinstance(stale, Stop)
    assert "60 s" in stale.reason
    assert "remove the gate page" in stale.reason


def test_the_guards_own_hold_outranks_go_and_ends_in_a_stop() -> None:
    assert act(HALF, self_held="refused_batches") == Hold(
        reason="refused_batches", generation=5, lost=False, ordered=False
    )
    assert act(None, self_held="refused_batches") == Hold(
        reason="refused_batches", generation=0, lost=True, ordered=False
    )
    assert isinstance(act(HALF, self_held="refused_batches", held_s=600), Stop)
    assert isinstance(act(None, self_held="refused_batches", held_s=600), Stop)


def test_the_two_exceptions_survive_a_trip_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RollbackRequested(180, "/ckpt", True)))
    assert (error.step, error.path, error.reloaded) == (180, "/ckpt", True)
    assert str(error) == "roll back to step 180 (/ckpt), reloaded"
    assert pickle.loads(pickle.dumps(StopRequested("enough"))).reason == "enough"
