"""The guard with a living daemon: every order is obeyed at every call, once, and acknowledged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from guard.virtual_daemon import VirtualDaemon, VirtualTime
from stepguard.calls import CallFailed, CallOk
from stepguard.gate import Order, Phase, TrainerHalf
from stepguard.guard import Guard
from stepguard.isolation import Aborted
from stepguard.orders import RollbackRequested, StopRequested

Guards = Callable[..., Guard]


def trainer(daemon: VirtualDaemon) -> TrainerHalf:
    half = daemon.page.trainer()
    assert half is not None
    return half


async def value(result: Any) -> Any:
    return result


def gathered(guard: Guard, step: int) -> None:
    asyncio.run(guard.gather([value(1)]))


CALLS: dict[str, Callable[[Guard, int], object]] = {
    "gather": gathered,
    "admit": lambda guard, step: guard.admit(step, ["a"], rewards=[1.0]),
    "before_step": lambda guard, step: guard.before_step(step),
    "after_step": lambda guard, step: guard.after_step(step),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_go_is_no_wait(guards: Guards, daemon: VirtualDaemon, time: VirtualTime, call: Any) -> None:
    guard = guards()
    before = time.ns
    call(guard, 1)
    assert time.ns - before < 1e9 / 100
    assert trainer(daemon).acked_generation == 1


@every_call
def test_hold_waits_for_go_and_shows_it(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime, call: Any
) -> None:
    guard = guards()
    daemon.order(Order.HOLD, "server_dead")
    seen: list[TrainerHalf] = []
    time.after(10, lambda: seen.append(trainer(daemon)))
    time.after(20, lambda: daemon.order(Order.GO))
    before = time.ns
    call(guard, 188)
    assert 20 <= (time.ns - before) / 1e9 < 20.2
    assert [(half.phase, half.acked_generation) for half in seen] == [(Phase.HELD, 2)]
    assert trainer(daemon).acked_generation == 3
    assert trainer(daemon).phase is not Phase.HELD
    assert [(ack["order"], ack["generation"]) for ack in daemon.of_kind("ack")] == [("HOLD", 2), ("GO", 3)]


@every_call
def test_resync_is_carried_out_once_then_waits(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime, call: Any
) -> None:
    guard, resynced = guards(), []
    guard.on_resync(lambda: resynced.append(time.ns))
    daemon.order(Order.RESYNC, "weights")
    time.after(3, lambda: daemon.order(Order.GO))
    call(guard, 5)
    call(guard, 6)
    assert len(resynced) == 1
    acks = [ack for ack in daemon.of_kind("ack") if ack["order"] == "RESYNC"]
    assert {(ack["generation"], ack["ok"], ack["detail"]) for ack in acks} == {(2, True, "")}
    assert 2 <= len(acks) <= 4, "repeated while it waits, in case the first was lost"


@every_call
def test_rollback_always_raises_and_begins_a_new_attempt(
    guards: Guards, daemon: VirtualDaemon, call: Any
) -> None:
    guard, loaded = guards(), []
    guard.on_rollback(lambda path, step: loaded.append((path, step)))
    daemon.order(Order.ROLLBACK, "poison", target_step=180, target_path="/ckpt/180")
    with pytest.raises(RollbackRequested) as raised:
        call(guard, 188)
    assert (raised.value.step, raised.value.path, raised.value.reloaded) == (180, "/ckpt/180", True)
    assert loaded == [("/ckpt/180", 180)]
    assert (trainer(daemon).attempt, guard.attempt, trainer(daemon).acked_generation) == (1, 1, 2)
    daemon.time.after(1, lambda: daemon.order(Order.GO))
    call(guard, 181)
    assert loaded == [("/ckpt/180", 180)]


@every_call
def test_stop_raises_every_time(guards: Guards, daemon: VirtualDaemon, call: Any) -> None:
    guard = guards()
    daemon.order(Order.STOP, "locked_out")
    for _ in range(2):
        with pytest.raises(StopRequested, match="locked_out"):
            call(guard, 1)
    assert trainer(daemon).acked_generation == 2


@every_call
def test_save_then_stop(guards: Guards, daemon: VirtualDaemon, time: VirtualTime, call: Any) -> None:
    guard, saved = guards(), []
    guard.on_save(lambda: saved.append(1))
    daemon.order(Order.SAVE, "locked_out")
    time.after(2, lambda: daemon.order(Order.STOP, "locked_out"))
    with pytest.raises(StopRequested):
        call(guard, 1)
    assert saved == [1]
    assert [ack["order"] for ack in daemon.of_kind("ack") if ack["generation"] == 3] == ["STOP"]


def test_every_generation_met_in_one_hold_is_acknowledged(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    guard.on_resync(lambda: None)
    daemon.order(Order.HOLD, "server_dead")
    time.after(1, lambda: daemon.order(Order.HOLD, "restarting"))
    time.after(2, lambda: daemon.order(Order.RESYNC, "weights"))
    time.after(3, lambda: daemon.order(Order.HOLD, "canary"))
    time.after(4, lambda: daemon.order(Order.GO))
    guard.before_step(1)
    acks = dict.fromkeys((ack["order"], ack["generation"]) for ack in daemon.of_kind("ack"))
    assert list(acks) == [("HOLD", 2), ("HOLD", 3), ("RESYNC", 4), ("HOLD", 5), ("GO", 6)]


def test_a_handler_that_raises_is_a_failed_acknowledgement_and_not_a_dead_trainer(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    guard, calls = guards(), []

    def broken() -> None:
        calls.append(1)
        raise ConnectionError("NCCL is gone")

    guard.on_resync(broken)
    daemon.order(Order.RESYNC, "weights")
    time.after(3, lambda: daemon.order(Order.RESYNC, "weights, again"))
    time.after(6, lambda: daemon.order(Order.GO))
    guard.before_step(1)
    assert len(calls) == 2, "once a generation"
    details = {
        (ack["generation"], ack["ok"], ack["detail"])
        for ack in daemon.of_kind("ack")
        if ack["order"] == "RESYNC"
    }
    assert details == {
        (2, False, "ConnectionError: NCCL is gone"),
        (3, False, "ConnectionError: NCCL is gone"),
    }
    assert "in broken" in caplog.text


def test_a_rollback_whose_handler_raises_is_left_to_the_trainer(
    guards: Guards, daemon: VirtualDaemon
) -> None:
    guard = guards()

    def broken(path: str | None, step: int | None) -> None:
        raise OSError("no such checkpoint")

    guard.on_rollback(broken)
    daemon.order(Order.ROLLBACK, "poison", target_step=3, target_path="/c")
    with pytest.raises(RollbackRequested) as raised:
        guard.before_step(9)
    assert not raised.value.reloaded
    assert [ack["ok"] for ack in daemon.of_kind("ack") if ack["order"] == "ROLLBACK"] == [False]


def test_without_a_handler_resync_and_save_fail_and_rollback_is_raised(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    daemon.order(Order.RESYNC)
    time.after(1, lambda: daemon.order(Order.SAVE))
    time.after(2, lambda: daemon.order(Order.ROLLBACK, target_step=1))
    with pytest.raises(RollbackRequested) as raised:
        guard.before_step(2)
    assert (raised.value.reloaded, raised.value.path) == (False, None)
    outcomes = {ack["order"]: (ack["ok"], ack["detail"]) for ack in daemon.of_kind("ack")}
    assert outcomes == {
        "RESYNC": (False, "no handler for RESYNC"),
        "SAVE": (False, "no handler for SAVE"),
        "ROLLBACK": (True, "no handler: raised to the trainer"),
    }


def test_a_handler_may_use_the_guard(guards: Guards, daemon: VirtualDaemon, time: VirtualTime) -> None:
    guard, resynced = guards(), []

    def handler() -> None:
        with guard.phase(Phase.SYNC):
            guard.weights("188")
            guard.before_step(188)
        resynced.append(1)

    guard.on_resync(handler)
    daemon.order(Order.RESYNC)
    time.after(1, lambda: daemon.order(Order.GO))
    guard.before_step(188)
    assert resynced == [1]
    assert trainer(daemon).weight_version == "188"


def test_a_coroutine_function_is_no_handler(guards: Guards) -> None:
    async def handler() -> None:
        pass

    class Callable_:  # noqa: N801
        async def __call__(self) -> None:
            pass

    for wrong in (handler, Callable_()):
        with pytest.raises(TypeError, match="on_resync takes a plain function"):
            guards(None).on_resync(wrong)


def test_several_gathers_that_wait_together_carry_out_an_order_once(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard, resynced = guards(), []
    guard.on_resync(lambda: resynced.append(1))
    daemon.order(Order.RESYNC)
    time.after(2, lambda: daemon.order(Order.GO))

    async def work() -> list[Any]:
        return await asyncio.gather(*(guard.gather([value(index)]) for index in range(8)))

    assert asyncio.run(work()) == [[index] for index in range(8)]
    assert resynced == [1]
    assert trainer(daemon).phase is Phase.REWARD


def test_a_gather_that_may_not_start_closes_its_coroutines(guards: Guards, daemon: VirtualDaemon) -> None:
    guard = guards()
    daemon.order(Order.STOP, "enough")

    async def work() -> None:
        task = asyncio.ensure_future(asyncio.Event().wait())
        with pytest.raises(StopRequested):
            await guard.gather([value(1), [value(2), task]])
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())


def test_cancelling_a_held_gather_starts_nothing_and_leaves_no_hold_behind(
    guards: Guards, daemon: VirtualDaemon
) -> None:
    async def waits(seconds: float) -> None:
        await asyncio.Event().wait()

    guard = guards(async_sleep=waits)
    daemon.order(Order.HOLD, "server_dead")

    async def work() -> None:
        task = asyncio.ensure_future(guard.gather([value(1)]))
        await asyncio.sleep(0)
        assert trainer(daemon).phase is Phase.HELD
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert trainer(daemon).phase is not Phase.HELD

    asyncio.run(work())


def test_a_stop_inside_a_trajectory_leaves_gather_as_it_is(guards: Guards, daemon: VirtualDaemon) -> None:
    guard = guards()

    async def trajectory() -> None:
        daemon.order(Order.STOP, "enough")
        guard.before_step(1)

    async def work() -> None:
        with pytest.raises(StopRequested):
            await guard.gather([trajectory(), asyncio.Event().wait()])

    asyncio.run(work())


def test_the_trainers_half_follows_the_loop(guards: Guards, daemon: VirtualDaemon, time: VirtualTime) -> None:
    guard = guards()
    phases = []

    async def rollout() -> str:
        phases.append(trainer(daemon).phase)
        return "text"

    outcomes = asyncio.run(guard.gather([rollout(), rollout()]))
    phases.append(trainer(daemon).phase)
    with guard.phase(Phase.EVAL):
        phases.append(trainer(daemon).phase)
    guard.admit(4, outcomes, rewards=[1.0, 0.0], weight_versions=["3", "3"])
    guard.before_step(4)
    phases.append(trainer(daemon).phase)
    guard.after_step(4, reward=0.5, weight_version="4")
    guard.phase(Phase.SYNC)
    guard.beat()
    assert phases == [Phase.ROLLOUT, Phase.ROLLOUT, Phase.REWARD, Phase.EVAL, Phase.TRAIN]
    half = trainer(daemon)
    assert (half.step, half.phase, half.beats, half.last_reward) == (4, Phase.SYNC, 1, 0.5)
    assert (half.rollouts_ok, half.rollouts_failed, half.weight_version) == (2, 0, "4")
    assert half.progress > 5


def test_reports_say_what_happened(guards: Guards, daemon: VirtualDaemon) -> None:
    guard = guards()
    guard.on_save(lambda: None)
    guard.on_resync(lambda: None)
    guard.before_step(7)
    guard.after_step(
        7, reward=float("nan"), metrics={"grad_norm": 0.5, "kl": float("inf"), "note": "x"}, weight_version=8
    )
    guard.saved(7, "/ckpt/7", norms={"w": 1})
    hello, step, saved = (daemon.of_kind(kind)[-1] for kind in ("hello", "step", "saved"))
    assert hello["handles"] == ["resync", "save"]
    assert (step["step"], step["reward"], step["weight_version"]) == (7, "NaN", "8")
    assert step["metrics"] == {"grad_norm": 0.5, "kl": "Infinity"}
    assert (saved["step"], saved["path"], saved["norms"]) == (7, "/ckpt/7", {"w": 1.0})
    assert trainer(daemon).handles_resync
    assert not trainer(daemon).handles_rollback


def test_odd_steps_and_rewards_are_taken_as_they_can_be(guards: Guards, daemon: VirtualDaemon) -> None:
    guard = guards()

    class Tensor:
        def __float__(self) -> float:
            return 0.25

        def __int__(self) -> int:
            return 12

    guard.before_step(-1)
    guard.before_step(3.0)  # type: ignore[arg-type]
    assert trainer(daemon).step == 3
    guard.before_step(Tensor())  # type: ignore[arg-type]
    assert (trainer(daemon).step, trainer(daemon).phase) == (12, Phase.TRAIN)
    guard.after_step(Tensor(), reward=Tensor())  # type: ignore[arg-type]
    guard.after_step(None, reward="much")  # type: ignore[arg-type]
    assert [(report["step"], report["reward"]) for report in daemon.of_kind("step")] == [
        (12, 0.25),
        (12, None),
    ]


def test_call_reports_its_failures(guards: Guards, daemon: VirtualDaemon) -> None:
    guard = guards()

    async def fail() -> None:
        raise ConnectionResetError("actor died")

    async def work() -> None:
        assert await guard.call(value(3), timeout_s=1) == CallOk(3)
        assert isinstance(await guard.call(fail(), timeout_s=1, what="reward"), CallFailed)

    asyncio.run(work())
    assert [(report["what"], report["error"]) for report in daemon.of_kind("call_failed")] == [
        ("reward", "error")
    ]


def test_a_relaunch_is_a_new_attempt_and_repeats_no_order(guards: Guards, daemon: VirtualDaemon) -> None:
    first = guards()
    daemon.order(Order.ROLLBACK, "poison", target_step=1, target_path="/c")
    with pytest.raises(RollbackRequested):
        first.before_step(3)
    first.close()
    second, loaded = guards(), []
    second.on_rollback(lambda path, step: loaded.append(step))
    assert second.attempt == 2
    daemon.time.after(1, lambda: daemon.order(Order.GO))
    second.before_step(2)
    assert loaded == []


def test_a_daemon_that_lost_its_count_is_obeyed_again(guards: Guards, daemon: VirtualDaemon) -> None:
    guard, resynced = guards(), []
    guard.on_resync(lambda: resynced.append(1))
    daemon.generation = 50
    daemon.order(Order.GO)
    guard.before_step(1)
    daemon.generation = 1
    daemon.order(Order.RESYNC)
    daemon.time.after(1, lambda: daemon.order(Order.GO))
    guard.before_step(2)
    assert resynced == [1]


def test_a_lost_acknowledgement_is_sent_again(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    guard.on_resync(lambda: None)
    daemon.die()
    daemon.alive = True
    daemon.order(Order.RESYNC)
    time.after(2, daemon.listen)
    time.after(6, lambda: daemon.order(Order.GO))
    guard.before_step(1)
    assert guard.reports_dropped > 0, "nothing was lost"
    assert ("RESYNC", True) in [(ack["order"], ack["ok"]) for ack in daemon.of_kind("ack")]


def test_a_hold_and_its_end_are_one_line_each(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    guard = guards()
    guard.before_step(1)
    daemon.order(Order.HOLD, "server_dead")
    time.after(30, lambda: daemon.order(Order.GO))
    with caplog.at_level(logging.INFO, "stepguard"):
        guard.before_step(2)
    assert [record.getMessage() for record in caplog.records] == [
        "holding at step 2: server_dead",
        "going on after 30.1 s on hold (generation 3)",
    ]


def test_aborted_is_public_and_what_a_failed_rollout_becomes(guards: Guards) -> None:
    async def fail() -> None:
        raise ValueError

    outcomes = asyncio.run(guards(None).gather([fail()]))
    assert isinstance(outcomes[0], Aborted)


def test_rollouts_wait_for_the_gate_and_say_since_when_they_ran(
    daemon: VirtualDaemon, time: VirtualTime, guards: Callable[..., Guard]
) -> None:
    guard = guards()
    daemon.order(Order.HOLD, "server_dead")
    time.after(30, lambda: daemon.order(Order.GO))
    asked_s = time.ns / 1e9
    with guard.rollouts(1):
        began_s = time.ns / 1e9
        trainer = daemon.page.trainer()
        assert trainer is not None
        assert (trainer.phase, trainer.step) == (Phase.ROLLOUT, 1)
        time.sleep(7)
    assert began_s >= asked_s + 30
    guard.admit(1, ["a"])
    (batch,) = daemon.of_kind("batch")
    assert batch["began"] == pytest.approx(began_s)
