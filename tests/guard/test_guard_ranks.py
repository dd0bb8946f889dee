"""Several ranks decide alike: rank 0 reads the page, the others do what it says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from guard.virtual_daemon import VirtualDaemon, VirtualTime, virtual_guard
from stepguard.gate import Order
from stepguard.guard import Guard
from stepguard.isolation import Aborted
from stepguard.orders import RollbackRequested, StopRequested

WORLD = 3
BAD = Aborted(ValueError())


class Group:
    """A process group of threads: every rank must take part in every collective."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(WORLD, timeout=20)
        self._values: list[Any] = [None] * WORLD
        self.broadcasts = 0

    def collect(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def broadcast(self, rank: int, value: Any) -> Any:
        self.broadcasts += rank == 0
        assert rank == 0 or value is None
        return self.collect(rank, value)[0]


class Ranks:
    """One guard a rank; rank 0's waits move the daemon's clock."""

    def __init__(self, run_dir: Path, time: VirtualTime, collects: bool) -> None:
        self.group = Group()
        self.guards = [
            virtual_guard(
                run_dir,
                time if rank == 0 else VirtualTime(),
                rank=rank,
                world=WORLD,
                broadcast=lambda value, rank=rank: self.group.broadcast(rank, value),
                collect=(lambda value, rank=rank: self.group.collect(rank, value)) if collects else None,
            )
            for rank in range(WORLD)
        ]

    def all(self, work: Callable[[int, Guard], Any]) -> list[Any]:
        """Run on every rank at once; what was raised is returned."""

        def one(rank: int) -> Any:
            try:
                return work(rank, self.guards[rank])
            except (StopRequested, RollbackRequested) as order:
                return order

        with ThreadPoolExecutor(WORLD) as pool:
            return list(pool.map(one, range(WORLD)))


@pytest.fixture
def ranks(tmp_path: Path, time: VirtualTime, daemon: VirtualDaemon) -> Iterator[Callable[..., Ranks]]:
    with ExitStack() as stack:

        def make(collects: bool = True) -> Ranks:
            made = Ranks(tmp_path, time, collects)
            for guard in made.guards:
                stack.enter_context(guard)
            return made

        yield make


def test_all_ranks_hold_and_go_on_together(ranks: Any, daemon: VirtualDaemon, time: VirtualTime) -> None:
    several = ranks()
    daemon.order(Order.HOLD, "server_dead")
    time.after(30, lambda: daemon.order(Order.GO))
    several.all(lambda rank, guard: guard.before_step(1))
    assert [ack["order"] for ack in daemon.of_kind("ack")] == ["HOLD", "GO"]
    assert 30 <= several.group.broadcasts <= 33, "held ranks ask once a second"


def test_every_rank_runs_the_handler_and_one_failure_fails_the_order(
    ranks: Any, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    several = ranks()
    ran: list[int] = []

    def handler(rank: int) -> None:
        ran.append(rank)
        if rank == 2:
            raise ConnectionError("no peer")

    for rank, guard in enumerate(several.guards):
        guard.on_resync(lambda rank=rank: handler(rank))
    daemon.order(Order.RESYNC)
    time.after(2, lambda: daemon.order(Order.GO))
    several.all(lambda rank, guard: guard.before_step(1))
    assert sorted(ran) == [0, 1, 2]
    details = {(ack["ok"], ack["detail"]) for ack in daemon.of_kind("ack") if ack["order"] == "RESYNC"}
    assert details == {(False, "rank 2: ConnectionError: no peer")}


def test_rollback_and_stop_are_raised_on_every_rank(ranks: Any, daemon: VirtualDaemon) -> None:
    several = ranks()
    daemon.order(Order.ROLLBACK, "poison", target_step=180, target_path="/c")
    raised = several.all(lambda rank, guard: guard.admit(1, ["a"]))
    assert [(type(order), order.step, order.path) for order in raised] == [
        (RollbackRequested, 180, "/c")
    ] * WORLD
    assert [guard.attempt for guard in several.guards] == [1] * WORLD
    daemon.order(Order.STOP, "enough")
    assert [type(order) for order in several.all(lambda rank, guard: guard.before_step(1))] == [
        StopRequested
    ] * WORLD


def test_a_batch_on_several_ranks_is_judged_as_one(ranks: Any, daemon: VirtualDaemon) -> None:
    several = ranks()
    shares = [["a"] * 10, ["a"] * 10, ["a"] * 6 + [BAD] * 4]
    got = several.all(lambda rank, guard: guard.admit(1, shares[rank], rewards=[float(rank)] * 10))
    assert [(batch.ok, batch.reason) for batch in got] == [(False, "failed_fraction")] * WORLD
    assert [sum(batch.mask) for batch in got] == [10, 10, 6]
    (report,) = daemon.of_kind("batch")
    assert (report["ok"], report["failed"], report["reward"]["max"]) == (26, 4, 2.0)
    shares[2] = ["a"] * 9 + [BAD]
    assert [batch.ok for batch in several.all(lambda rank, guard: guard.admit(1, shares[rank]))] == [
        True
    ] * WORLD


def test_without_collect_rank_0_speaks_for_all(ranks: Any, daemon: VirtualDaemon) -> None:
    several = ranks(collects=False)
    shares = [["a"] * 4, [BAD] * 4, ["a"] * 4]
    assert [b.ok for b in several.all(lambda rank, guard: guard.admit(1, shares[rank]))] == [True] * WORLD
    shares = [[BAD] * 4, ["a"] * 4, ["a"] * 4]
    assert [b.ok for b in several.all(lambda rank, guard: guard.admit(1, shares[rank]))] == [False] * WORLD


def test_the_daemons_refusal_reaches_every_rank(ranks: Any, daemon: VirtualDaemon, time: VirtualTime) -> None:
    several = ranks()
    daemon.judge = lambda batch: "reward_collapse"
    time.after(10, lambda: daemon.order(Order.GO))
    got = several.all(lambda rank, guard: guard.admit(188, ["a"], rewards=[0.0]))
    assert [(batch.ok, batch.reason) for batch in got] == [(False, "reward_collapse")] * WORLD


def test_a_late_verdict_is_awaited_together_and_what_is_ordered_meanwhile_is_done_together(
    ranks: Any, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    several = ranks()
    daemon.judge = None
    resynced: list[int] = []
    for rank, guard in enumerate(several.guards):
        guard.on_resync(lambda rank=rank: resynced.append(rank))

    def judge() -> None:
        daemon.judge = lambda batch: None

    time.after(5, lambda: daemon.order(Order.RESYNC))
    time.after(8, lambda: daemon.order(Order.GO))
    time.after(20, judge)
    assert [batch.ok for batch in several.all(lambda rank, guard: guard.admit(1, ["a"]))] == [True] * WORLD
    assert sorted(resynced) == [0, 1, 2]
    assert several.group.broadcasts < 40


def test_too_many_refused_batches_stop_every_rank(ranks: Any, daemon: VirtualDaemon) -> None:
    several = ranks()

    def work(rank: int, guard: Guard) -> None:
        for _ in range(3):
            guard.admit(1, [BAD])

    assert [type(order) for order in several.all(work)] == [StopRequested] * WORLD


def test_calls_that_are_not_collective_do_not_obey(ranks: Any, daemon: VirtualDaemon) -> None:
    several = ranks()
    daemon.order(Order.STOP, "enough")
    several.guards[0].after_step(1)
    assert several.group.broadcasts == 0


def test_ranks_without_a_broadcast_are_warned_and_leave_the_page_to_rank_0(
    tmp_path: Path, daemon: VirtualDaemon, time: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    with virtual_guard(tmp_path, time, rank=1, world=2) as guard:
        guard.before_step(1)
        guard.beat()
    assert "pass Guard(broadcast=...)" in caplog.text
    assert daemon.page.trainer() is None
