"""
The trainer with its guard, under a virtual daemon: it holds, re-syncs, rolls back, saves and stops, and
trains on no garbage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from grpo.test_training import FaultyServer, OneFails, config, go_down, same_bits, truths, weights
from guard.virtual_daemon import VirtualDaemon, VirtualTime, virtual_guard
from stepguard import Guard
from stepguard.gate import Order
from stepguard_grpo.config import Failures
from stepguard_grpo.local import LocalServer
from stepguard_grpo.train import Outcome, RunRecord, train


@pytest.fixture
def time() -> VirtualTime:
    return VirtualTime()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def daemon(run_dir: Path, time: VirtualTime) -> Iterator[VirtualDaemon]:
    daemon = VirtualDaemon(run_dir, time)
    yield daemon
    daemon.close()


@pytest.fixture
def guards(run_dir: Path, time: VirtualTime) -> Iterator[Callable[..., Guard]]:
    with ExitStack() as stack:

        def make(place: Path | None = run_dir) -> Guard:
            return stack.enter_context(virtual_guard(place, time))

        yield make


def run(server: LocalServer, root: Path, guard: Guard, **more: Any) -> RunRecord:
    return train(config(root, guard=True, **more), sampler=server, sync=server, guard=guard)


def undisturbed(base_model: Path, root: Path, **more: Any) -> RunRecord:
    server = LocalServer(base_model)
    return train(config(root, **more), sampler=server, sync=server)


def resyncs(daemon: VirtualDaemon) -> list[bool]:
    """Whether each RESYNC was carried out, by generation: acknowledgements are repeated until heard."""
    acks = {ack["generation"]: ack["ok"] for ack in daemon.of_kind("ack") if ack["order"] == "RESYNC"}
    return [acks[generation] for generation in sorted(acks)]


def test_without_a_run_dir_the_guard_still_isolates(
    base_model: Path, tmp_path: Path, guards: Callable[..., Guard]
) -> None:
    record = run(OneFails(base_model), tmp_path, guards(None), steps=3)
    assert (record.steps, record.garbage_steps, record.refused_batches) == (3, 0, 0)
    assert [truth.failed_in_loss for truth in truths(tmp_path)] == [0, 0, 0]


def test_one_raising_trajectory_costs_one_trajectory(
    base_model: Path, tmp_path: Path, guards: Callable[..., Guard]
) -> None:
    """Incident D, guarded: no hold, the run goes on, the member is masked."""
    record = run(LocalServer(base_model), tmp_path, guards(None), steps=4, raise_in_rollout=3)
    assert (record.outcome, record.steps, record.garbage_steps) == (Outcome.FINISHED, 4, 0)


def test_reports_name_step_reward_and_version(
    base_model: Path, tmp_path: Path, guards: Callable[..., Guard], daemon: VirtualDaemon
) -> None:
    run(LocalServer(base_model), tmp_path, guards(), steps=2, save_every=2)
    batches, steps, saved = (daemon.of_kind(kind) for kind in ("batch", "step", "saved"))
    assert [batch["weight_versions"] for batch in batches] == [{"0": 16}, {"1": 16}]
    assert [step["weight_version"] for step in steps] == ["1", "2"]
    assert [step["reward"] for step in steps] == [truth.reward_mean_true for truth in truths(tmp_path)]
    assert saved[0]["path"].endswith("checkpoint-2")
    assert all(norm > 0 for norm in saved[0]["norms"].values())


def test_a_dead_server_costs_no_step_and_resync_brings_the_weights_back(
    base_model: Path, tmp_path: Path, guards: Callable[..., Guard], daemon: VirtualDaemon, time: VirtualTime
) -> None:
    """Incident A, guarded: hold, restart with base weights, re-sync, go; all ends as if undisturbed."""
    guard = guards()
    server = FaultyServer(base_model, after_3=go_down)

    def recover(batch: dict[str, Any]) -> str | None:
        if batch["failed"] == 0:
            return None
        time.after(1.0, server.restart)
        time.after(1.1, lambda: daemon.order(Order.RESYNC, "weights"))
        time.after(2.0, lambda: daemon.order(Order.GO, "recovered"))
        return "server_down"

    daemon.judge = recover
    record = run(server, tmp_path / "guarded", guard, steps=6, save_every=6)
    assert server.fired == ["3"]
    assert (record.steps, record.garbage_steps) == (6, 0)
    assert (record.refused_batches, record.resyncs) == (1, 1)
    assert server.rebuilds == 2  # at the start, and in answer to RESYNC
    assert resyncs(daemon) == [True]
    undisturbed(base_model, tmp_path / "undisturbed", steps=6, save_every=6)
    first, second = (tmp_path / name / "checkpoints/checkpoint-6" for name in ("guarded", "undisturbed"))
    assert same_bits(weights(first), weights(second))


def test_a_failed_resync_is_acknowledged_as_failed(
    base_model: Path, tmp_path: Path, guards: Callable[..., Guard], daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    server = FaultyServer(base_model, after_1=go_down)
    daemon.judge = lambda batch: "server_down" if batch["failed"] else None
    time.after(0.5, lambda: daemon.order(Order.RESYNC, "too early"))
    time.after(1.0, server.restart)
    time.after(1.5, lambda: daemon.order(Order.RESYNC, "again"))
    time.after(2.0, lambda: daemon.order(Order.GO, "recovered"))
    record = run(server, tmp_path, guard, steps=2)
    assert resyncs(daemon) == [False, True]
    assert (record.steps, record.garbage_steps) == (2, 0)


def test_a_server_back_with_base_weights_is_refused_and_healed(
    base_model: Path, tmp_path: Path, guards: Callable[..., Guard], daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    server = FaultyServer(base_model, after_3=LocalServer.restart)

    def heal(batch: dict[str, Any]) -> str | None:
        if batch["stale"] == 0:
            return None
        time.after(0.5, lambda: daemon.order(Order.RESYNC, "stale"))
        time.after(1.0, lambda: daemon.order(Order.GO, "recovered"))
        return "stale_weights"

    daemon.judge = heal
    record = run(server, tmp_path, guard, steps=5)
    assert server.fired == ["3"]
    assert (record.steps, record.garbage_steps, record.refused_batches, record.resyncs) == (5, 0, 1, 1)


def test_zeros_that_the_trainer_made_are_refused_by_the_daemon(
    base_model: Path, tmp_path: Path, guards: Callable[..., Guard], daemon: VirtualDaemon, time: VirtualTime
) -> None:
    """The trainer scores failures 0 and never calls gather; the verdict on the batch still comes in time."""
    guard = guards()
    server = FaultyServer(base_model, after_3=go_down)

    def judge(batch: dict[str, Any]) -> str | None:
        if batch["reward"]["max"] > 0:
            return None
        time.after(0.5, server.restart)
        time.after(0.6, lambda: daemon.order(Order.RESYNC, "weights"))
        time.after(1.0, lambda: daemon.order(Order.GO, "recovered"))
        return "reward_zero"

    daemon.judge = judge
    record = run(server, tmp_path, guard, steps=5, failures=Failures.ZERO, groups=8, group_size=8)
    assert server.fired == ["3"]
    assert (record.steps, record.garbage_steps, record.refused_batches) == (5, 0, 1)


def test_rollback_reloads_in_place_and_starts_a_new_attempt(
    base_model: Path, tmp_path: Path, guards: Callable[..., Guard], daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    target = tmp_path / "checkpoints" / "checkpoint-4"
    ordered = []

    def judge(batch: dict[str, Any]) -> str | None:
        if batch["step"] == 7 and not ordered:
            ordered.append(batch["step"])
            time.after(
                0.5,
                lambda: daemon.order(Order.ROLLBACK, "poison", target_step=4, target_path=str(target)),
            )
            time.after(1.0, lambda: daemon.order(Order.GO, "rolled back"))
            return "poison"
        return None

    daemon.judge = judge
    server = LocalServer(base_model)
    record = run(server, tmp_path, guard, steps=8, save_every=2)
    assert ordered == [7]
    assert (record.rollbacks, record.attempt, record.last_step, record.garbage_steps) == (1, 1, 8, 0)
    assert [(truth.attempt, truth.step) for truth in truths(tmp_path)] == [
        *((0, step) for step in range(1, 7)),
        *((1, step) for step in range(5, 9)),
    ]
    assert server.pushes == [*"0123456", *"45678"]  # the old weights went to the server too
    undisturbed(base_model, tmp_path / "undisturbed", steps=8, save_every=8)
    other = tmp_path / "undisturbed" / "checkpoints" / "checkpoint-8"
    assert same_bits(weights(tmp_path / "checkpoints" / "checkpoint-8"), weights(other))


def test_save_then_stop_ends_in_order_and_resumes(
    base_model: Path, tmp_path: Path, guards: Callable[..., Guard], daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()

    def judge(batch: dict[str, Any]) -> str | None:
        if batch["step"] == 4:
            time.after(0.5, lambda: daemon.order(Order.SAVE, "night"))
            time.after(1.0, lambda: daemon.order(Order.STOP, "night"))
            return "night"
        return None

    daemon.judge = judge
    record = run(LocalServer(base_model), tmp_path, guard, steps=6)
    assert (record.outcome, record.last_step) == (Outcome.STOPPED, 3)
    assert [report["step"] for report in daemon.of_kind("saved")] == [3]  # by SAVE; STOP has nothing to add
    resumed = undisturbed(base_model, tmp_path, steps=6)
    assert (resumed.resumed_from, resumed.last_step, resumed.garbage_steps) == (3, 6, 0)


def test_rollback_before_the_first_checkpoint_goes_to_the_very_start(
    base_model: Path, tmp_path: Path, guards: Callable[..., Guard], daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    ordered = []

    def judge(batch: dict[str, Any]) -> str | None:
        if batch["step"] == 3 and not ordered:
            ordered.append(batch["step"])
            time.after(0.5, lambda: daemon.order(Order.ROLLBACK, "poison", target_step=1))
            time.after(1.0, lambda: daemon.order(Order.GO, "rolled back"))
            return "poison"
        return None

    daemon.judge = judge
    run(LocalServer(base_model), tmp_path, guard, steps=4, save_every=4)
    assert [truth.step for truth in truths(tmp_path)] == [1, 2, 1, 2, 3, 4]
    undisturbed(base_model, tmp_path / "undisturbed", steps=4, save_every=4)
    other = tmp_path / "undisturbed" / "checkpoints" / "checkpoint-4"
    assert same_bits(weights(tmp_path / "checkpoints" / "checkpoint-4"), weights(other))
