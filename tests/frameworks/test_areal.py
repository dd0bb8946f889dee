"""AReaL's trainer guarded: on a stand-in with its order of calls, which AReaL's source is held against."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from frameworks.sources import run_with, source
from guard.virtual_daemon import VirtualDaemon, VirtualTime
from stepguard.gate import Order
from stepguard.guard import Guard
from stepguard.integrations.areal import IsolatedWorkflow, guarded, snapshot

ROOT = Path(__file__).parents[2]


class Trainer:
    """What `guarded` touches, in the order in which AReaL's loop touches it."""

    def __init__(self, save_root: Path, rewards: list[list[list[float]]]) -> None:
        self.save_root = save_root
        self.rewards = rewards
        self.updates: list[int] = []
        self.recover_info = None
        self.actor = SimpleNamespace(
            prepare_batch=lambda *args, **kwargs: [
                {"rewards": torch.tensor(group)} for group in self.rewards.pop(0)
            ],
            ppo_update=lambda batch: self.updates.append(self.step),
        )
        self.recover_handler = SimpleNamespace(
            config=SimpleNamespace(mode="on", experiment_name="e", trial_name="t", fileroot=str(save_root)),
            last_step_info=SimpleNamespace(global_step=-1),
            recover_info_path=lambda experiment, trial, root: str(save_root / "recover_info"),
        )

    def _save_recover_checkpoint(self, epoch: int, epoch_step: int, global_step: int) -> None:
        for part in ("default/recover_checkpoint/weights", "recover_info/step_info.json"):
            path = self.save_root / part
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"of step {global_step}")
        self.recover_handler.last_step_info = SimpleNamespace(global_step=global_step)

    def train(self, steps: int) -> None:
        for self.step in range(steps):
            batch = self.actor.prepare_batch(None, workflow=None)
            self.actor.ppo_update(batch)
            self._save_recover_checkpoint(epoch=0, epoch_step=self.step, global_step=self.step)


def test_refused_batches_are_prepared_anew_and_the_slot_is_kept(
    tmp_path: Path, guard: Guard, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    def judge(batch: dict[str, Any]) -> str | None:
        if batch["reward"]["max"] > 0:
            return None
        time.after(20, lambda: daemon.order(Order.GO))
        return "reward_collapse"

    daemon.judge = judge
    good, bad = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]
    trial = tmp_path / "trial"
    trainer = Trainer(trial, [good, bad, bad, good, good, good])
    guarded(trainer, guard).train(4)
    assert trainer.updates == [0, 1, 2, 3]
    assert trainer.rewards == []
    assert [batch["step"] for batch in daemon.of_kind("batch")] == [0, 1, 1, 1, 2, 3]
    assert [(step["step"], step["reward"]) for step in daemon.of_kind("step")] == [
        (step, 0.5) for step in range(4)
    ]
    assert [(saved["step"], saved["path"]) for saved in daemon.of_kind("saved")] == [
        (step, str(trial)) for step in range(4)
    ]
    kept = sorted(path.name for path in (trial / "stepguard-snapshots").iterdir())
    assert kept == ["globalstep2", "globalstep3"]
    weights = trial / "stepguard-snapshots/globalstep2/default/recover_checkpoint/weights"
    assert weights.read_text() == "of step 2", "the slot itself has been overwritten since"


def test_a_hold_comes_before_the_update(
    tmp_path: Path, guard: Guard, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    trainer = Trainer(tmp_path, [[[1.0, 0.0]]])
    update = trainer.actor.ppo_update
    updated: list[int] = []
    trainer.actor.ppo_update = lambda batch: (updated.append(time.ns), update(batch))
    guarded(trainer, guard)
    prepare = trainer.actor.prepare_batch

    def then_held(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        daemon.order(Order.HOLD, "server_dead")
        time.after(30, lambda: daemon.order(Order.GO))
        return batch

    trainer.actor.prepare_batch = then_held
    began = time.ns
    trainer.train(1)
    assert updated[0] - began >= 30e9


def test_a_failed_episode_is_rejected_and_no_zero(caplog: pytest.LogCaptureFixture) -> None:
    class Tool:
        async def arun_episode(self, engine: Any, data: dict[str, Any]) -> Any:
            if data["fails"]:
                raise ConnectionResetError("the tool went away")
            return {"rewards": 1.0}

    workflow = IsolatedWorkflow(Tool())

    async def episodes() -> list[Any]:
        return await asyncio.gather(
            *(workflow.arun_episode(None, {"fails": fails}) for fails in (False, True, True))
        )

    assert asyncio.run(episodes()) == [{"rewards": 1.0}, None, None]
    assert workflow.failed == 2
    assert caplog.text.count("Traceback") == 1


def test_requests_that_fail_in_a_row_are_told(tmp_path: Path, guard: Guard, daemon: VirtualDaemon) -> None:
    class Broken:
        async def arun_episode(self, engine: Any, data: dict[str, Any]) -> Any:
            raise ConnectionResetError("the server went away")

    guarded(Trainer(tmp_path, []), guard)

    async def episodes() -> None:
        for _ in range(8):
            assert await IsolatedWorkflow(Broken()).arun_episode(None, {}) is None

    asyncio.run(episodes())
    (told,) = daemon.of_kind("requests_failed")
    assert told["in_a_row"] == 8


def test_a_snapshot_replaces_one_of_the_same_step(tmp_path: Path) -> None:
    (tmp_path / "recover_info").mkdir()
    for word in ("first", "second"):
        (tmp_path / "recover_info/x").write_text(word)
        place = snapshot(tmp_path, 7, keep=2)
    assert (place / "recover_info/x").read_text() == "second"


@pytest.mark.e2e
def test_the_workflow_is_one_of_areals() -> None:
    code = (
        "from stepguard.integrations.areal import areal_workflow\n"
        "from areal.api.workflow_api import RolloutWorkflow\n"
        "print(int(isinstance(areal_workflow(object()), RolloutWorkflow)))"
    )
    assert run_with("areal", "-c", code, timeout_s=120) == 1


def test_areals_loop_calls_in_this_order() -> None:
    trainer = source("areal", "areal/trainer/rl_trainer.py")
    calls = trainer.calls("PPOTrainer.train")

    def first(start: str) -> int:
        return next(index for index, call in enumerate(calls) if call.startswith(start))

    order = [
        first("self.actor.prepare_batch("),
        first("self.actor.ppo_update("),
        calls.index("self._save_recover_checkpoint(epoch=epoch, epoch_step=step, global_step=global_step)"),
    ]
    assert order == sorted(order)
    recover = source("areal", "areal/utils/recover.py")
    assert recover.parameters("RecoverHandler.recover_info_path") == [
        "experiment_name", "trial_name", "fileroot",
    ]  # fmt: skip
    assert "self.last_step_info = step_info" in recover.text
    workflow = source("areal", "areal/api/workflow_api.py")
    assert workflow.parameters("RolloutWorkflow.arun_episode") == ["self", "engine", "data"]
