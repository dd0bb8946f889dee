"""StepguardCallback on TRL's real GRPOTrainer, with a tiny policy on the CPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from frameworks.tiny_trl import copied, same, tiny_trainer, weights
from guard.virtual_daemon import VirtualDaemon, VirtualTime
from stepguard.gate import Order, Phase
from stepguard.guard import Guard
from stepguard.integrations.trl import StepguardCallback
from stepguard.orders import RollbackRequested, StopRequested

pytestmark = pytest.mark.filterwarnings("default")  # of TRL and what it stands on


class At(transformers.TrainerCallback):  # type: ignore[misc]
    """Does something once, when one event of one step comes; it counts how often that was."""

    def __init__(self, event: str, step: int, act: Callable[[], object]) -> None:
        self.fired = 0
        self._step = step
        self._act = act
        setattr(self, event, self._event)

    def _event(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._step and not self.fired:
            self.fired += 1
            self._act()


def steps(daemon: VirtualDaemon) -> list[int]:
    return [report["step"] for report in daemon.of_kind("step")]


def test_a_run_in_which_nothing_happens_trains_as_without_the_guard(
    tmp_path: Path, daemon: VirtualDaemon, guard: Guard
) -> None:
    bare = tiny_trainer(tmp_path / "bare")
    bare.train()
    guarded = tiny_trainer(tmp_path / "guarded", save_strategy="steps", save_steps=3)
    guarded.add_callback(StepguardCallback(guarded, guard))
    guarded.train()
    assert same(weights(bare), weights(guarded))
    assert steps(daemon) == [1, 2, 3, 4, 5, 6]
    batches = daemon.of_kind("batch")
    assert [(batch["step"], batch["ok"], batch["failed"]) for batch in batches] == [
        (step, 32, 0) for step in range(1, 7)
    ]
    logged = [row["reward"] for row in guarded.state.log_history if "reward" in row]
    assert [batch["reward"]["mean"] for batch in batches] == pytest.approx(logged)
    reported = daemon.of_kind("step")
    assert [report["reward"] for report in reported] == pytest.approx(logged)
    assert [report["metrics"]["grad_norm"] for report in reported] == pytest.approx(
        [row["grad_norm"] for row in guarded.state.log_history if "grad_norm" in row]
    )
    saved = daemon.of_kind("saved")
    assert [(report["step"], Path(report["path"]).is_dir()) for report in saved] == [(3, True), (6, True)]
    assert all(report["norms"]["parameters"] > 0 for report in saved)


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step"])
def test_a_hold_stops_before_the_optimizer_step_and_ends(
    event: str, tmp_path: Path, daemon: VirtualDaemon, time: VirtualTime, guard: Guard
) -> None:
    trainer = tiny_trainer(tmp_path)
    seen: dict[str, Any] = {}

    def hold() -> None:
        daemon.order(Order.HOLD, "server_dead")
        seen["held"] = weights(trainer)
        time.after(30, release)

    def release() -> None:
        seen["released"] = weights(trainer)
        daemon.order(Order.GO)

    at = At(event, 4, hold)
    trainer.add_callback(at)
    trainer.add_callback(StepguardCallback(trainer, guard))
    trainer.train()
    assert at.fired == 1
    assert same(seen["held"], seen["released"])
    assert not same(seen["held"], weights(trainer))
    assert [ack["order"] for ack in daemon.of_kind("ack")] == ["GO", "HOLD", "GO"]
    assert steps(daemon) == [1, 2, 3, 4, 5, 6]


def test_a_refused_batch_moves_nothing_and_is_generated_anew(
    tmp_path: Path, daemon: VirtualDaemon, time: VirtualTime, guard: Guard
) -> None:
    """A reward function that answers 0 while its server is away, as in the incident."""
    away = {"calls": 0}
    states: list[dict[str, Any]] = []

    def reward(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
        away["calls"] += 1
        if away["calls"] in (4, 5):
            states.append(
                {"weights": weights(trainer), "adam": adam(trainer), "step": trainer.state.global_step}
            )
            return [0.0] * len(prompts)
        return copied(prompts, completions)

    def judge(batch: dict[str, Any]) -> str | None:
        if away["calls"] not in (4, 5):
            return None
        time.after(20, lambda: daemon.order(Order.GO))
        return "reward_collapse"

    trainer = tiny_trainer(tmp_path, reward=reward)
    daemon.judge = judge
    callback = StepguardCallback(trainer, guard)
    trainer.add_callback(callback)

    def begun() -> None:
        states.append({"weights": weights(trainer), "adam": adam(trainer), "step": trainer.state.global_step})

    trainer.add_callback(At("on_pre_optimizer_step", 4, begun))
    trainer.train()
    assert callback.refused == 2
    before, again, after = states
    for state in (again, after):
        assert state["step"] == before["step"] == 3
        assert same(before["weights"], state["weights"])
        assert same(before["adam"], state["adam"])
    assert [batch["step"] for batch in daemon.of_kind("batch")] == [1, 2, 3, 4, 4, 4, 5, 6]
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    batches = daemon.of_kind("batch")
    good = [batch["reward"]["mean"] for batch in batches[:3] + batches[5:]]
    assert logged == pytest.approx(good), "a refused batch is not averaged into the logs"


def test_what_no_reward_function_could_score_is_a_failure_and_no_zero(
    tmp_path: Path, daemon: VirtualDaemon, guard: Guard
) -> None:
    def reward(prompts: list[str], completions: list[str], **more: Any) -> list[float | None]:
        return [None if index == 5 else 1.0 for index in range(len(prompts))]

    trainer = tiny_trainer(tmp_path, reward=reward, max_steps=1)
    trainer.add_callback(StepguardCallback(trainer, guard))
    trainer.train()
    (batch,) = daemon.of_kind("batch")
    assert (batch["ok"], batch["failed"], batch["reward"]["mean"]) == (31, 1, 1.0)


def test_a_server_that_does_not_answer_is_a_refused_batch_and_a_bug_ends_the_run(
    tmp_path: Path, daemon: VirtualDaemon, guard: Guard
) -> None:
    troubles: list[Exception] = [ConnectionRefusedError("vLLM"), ZeroDivisionError("a bug")]

    def reward(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
        if trainer.state.global_step == 2 and troubles:
            raise troubles.pop(0)
        return copied(prompts, completions)

    trainer = tiny_trainer(tmp_path, reward=reward)
    callback = StepguardCallback(trainer, guard)
    trainer.add_callback(callback)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert callback.refused == 1
    assert [(batch["failed"], batch["refused"]) for batch in daemon.of_kind("batch")] == [
        (0, None),
        (0, None),
        (32, "failed_fraction"),
    ]


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step"])
def test_a_rollback_loads_the_checkpoint_in_place(
    event: str, tmp_path: Path, daemon: VirtualDaemon, time: VirtualTime, guard: Guard
) -> None:
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=8)
    target = tmp_path / "checkpoint-2"
    states: dict[str, Any] = {}

    def poison() -> None:
        with torch.no_grad():
            for value in trainer.model.parameters():
                value.zero_()
        daemon.order(Order.ROLLBACK, "poison", target_step=2, target_path=str(target))
        time.after(1, lambda: daemon.order(Order.GO))

    def after() -> None:
        states["weights"], states["adam"] = weights(trainer), adam(trainer)

    at = At(event, 5, poison)
    trainer.add_callback(at)
    callback = StepguardCallback(trainer, guard)
    trainer.add_callback(callback)
    trainer.add_callback(At("on_step_end", 6 if event == "on_pre_optimizer_step" else -1, after))
    trainer.add_callback(At(event, 5, lambda: states.setdefault("weights", weights(trainer))))
    trainer.train()
    saved = tiny_trainer(tmp_path / "fresh")
    saved._load_from_checkpoint(str(target))
    assert (at.fired, callback.rollbacks) == (1, 1)
    assert same(states["weights"], weights(saved)), "no step was taken on what was there before"
    acks = {(ack["ok"], ack["attempt"]) for ack in daemon.of_kind("ack") if ack["order"] == "ROLLBACK"}
    assert acks == {(True, 1)}
    assert steps(daemon) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_without_a_way_in_place_the_run_ends_and_resumes_from_the_checkpoint(
    tmp_path: Path, daemon: VirtualDaemon, time: VirtualTime, guard: Guard
) -> None:
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2)
    target = str(tmp_path / "checkpoint-2")
    at = At("on_pre_optimizer_step", 5, lambda: daemon.order(Order.ROLLBACK, target_path=target))
    trainer.add_callback(at)
    callback = StepguardCallback(trainer, guard)
    trainer.add_callback(callback)
    daemon_is_told_of_none(callback)
    with pytest.raises(RollbackRequested) as order:
        trainer.train()
    assert (at.fired, order.value.path, order.value.reloaded) == (1, target, False)
    daemon.order(Order.GO)
    trainer.train(resume_from_checkpoint=order.value.path)
    assert steps(daemon) == [1, 2, 3, 4, 3, 4, 5, 6]


def test_save_then_stop(tmp_path: Path, daemon: VirtualDaemon, time: VirtualTime, guard: Guard) -> None:
    trainer = tiny_trainer(tmp_path)

    def save() -> None:
        daemon.order(Order.SAVE, "locked_out")
        time.after(1, lambda: daemon.order(Order.STOP, "locked_out"))

    at = At("on_step_begin", 3, save)
    trainer.add_callback(at)
    trainer.add_callback(StepguardCallback(trainer, guard))
    with pytest.raises(StopRequested, match="locked_out"):
        trainer.train()
    assert at.fired == 1
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    assert [report["step"] for report in daemon.of_kind("saved")] == [2]


def test_a_trainer_that_generates_otherwise_is_refused_at_once(tmp_path: Path, guard: Guard) -> None:
    with pytest.raises(TypeError, match="_generate_and_score_completions"):
        StepguardCallback(object(), guard)


def test_weights_are_pushed_to_vllm_in_their_own_phase(
    tmp_path: Path, daemon: VirtualDaemon, guard: Guard
) -> None:
    from trl.trainer import grpo_trainer

    assert "self.vllm_generation.sync_weights()" in inspect.getsource(grpo_trainer)
    phases = []

    def push() -> None:
        seen = daemon.page.trainer()
        assert seen is not None
        phases.append(seen.phase)

    trainer = tiny_trainer(tmp_path)
    trainer.vllm_generation = SimpleNamespace(sync_weights=push)
    StepguardCallback(trainer, guard)
    with guard.rollouts(1):
        trainer.vllm_generation.sync_weights()
        push()
    assert phases == [Phase.SYNC, Phase.ROLLOUT]


def daemon_is_told_of_none(callback: StepguardCallback) -> None:
    """As with DeepSpeed or FSDP, where the callback registers no handler."""
    del callback.guard._obedience._handlers["rollback"]


def adam(trainer: Any) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": value.clone()
        for index, state in trainer.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
