"""The callback for SkyRL, on SkyRL's real callback classes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from frameworks.sources import HOME, source
from guard.virtual_daemon import VirtualDaemon, VirtualTime
from stepguard.gate import Order, Phase
from stepguard.guard import Guard

pytestmark = pytest.mark.filterwarnings("default")  # of SkyRL and what it stands on


@pytest.fixture
def real() -> Iterator[Any]:
    """SkyRL's module of callbacks; its trainer needs a GPU."""
    source("skyrl", "skyrl/train/utils/callbacks.py")
    before = list(sys.path)
    sys.path += [str(HOME / "skyrl"), str(HOME / "needs")]
    from skyrl.train.utils import callbacks

    yield callbacks
    sys.path[:] = before


class Trainer:
    """The order of SkyRL's own loop, which the last test holds against its source."""

    def __init__(self, real: Any, callback: Any) -> None:
        self.real = real
        self.global_step = 0
        self.updates: list[int] = []
        self.dispatch = SimpleNamespace(save_weights_for_sampler=self._save_weights_for_sampler)
        self.phases: list[Phase] = []
        self.handler = real.CallbackHandler([callback])

    def fire(self, event: str, **fields: Any) -> None:
        told = self.real.CallbackInput(
            global_step=self.global_step, epoch=0, total_steps=9, steps_per_epoch=9, **fields
        )
        getattr(self.handler, event)(self, told, self.real.TrainingControl())

    def convert_to_training_input(self, generator_output: Any, uids: Any) -> Any:
        return generator_output

    def train_critic_and_policy(self, data: Any) -> dict[str, float]:
        self.updates.append(self.global_step)
        return {"policy/grad_norm": 2.0}

    async def _save_weights_for_sampler(self) -> None:
        self.phases.append(self.phase())

    def phase(self) -> Phase:
        return Phase.UNKNOWN

    def train(self, rewards: list[list[Any]]) -> None:
        self.fire("on_train_start")
        for group in rewards:
            self.global_step += 1
            self.fire("on_step_start")
            batch = self.convert_to_training_input({"rewards": group}, list("aabb"))
            status = self.train_critic_and_policy(batch)
            self.fire("on_step_end", metrics=status)
            asyncio.run(self.dispatch.save_weights_for_sampler())
        self.fire("on_save", ckpt_path="/c/global_step_3")


def shown(daemon: VirtualDaemon) -> Phase:
    """What the page says that the trainer does."""
    seen = daemon.page.trainer()
    assert seen is not None
    return seen.phase


def test_steps_are_gated_judged_and_reported(
    real: Any, guard: Guard, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    from stepguard.integrations.skyrl import StepguardCallback

    def judge(batch: dict[str, Any]) -> str | None:
        if batch["reward"]["max"] > 0:
            return None
        time.after(20, lambda: daemon.order(Order.GO))
        return "reward_collapse"

    daemon.judge = judge
    callback = StepguardCallback(guard)
    assert isinstance(callback, real.TrainingCallback)
    trainer = Trainer(real, callback)
    trainer.phase = lambda: shown(daemon)  # type: ignore[method-assign]
    daemon.order(Order.HOLD, "server_dead")
    began = time.ns
    time.after(30, lambda: daemon.order(Order.GO))
    trainer.train([[1.0, 0.0, 1.0, 0.0], [0.0] * 4, [[0.0, 1.0], [0.0, 0.0], [1.0], [1.0]]])
    assert time.ns - began >= 50e9
    assert trainer.updates == [1, 3]
    assert callback.refused == 1
    assert trainer.phases == [Phase.SYNC] * 3
    assert shown(daemon) is not Phase.SYNC
    assert [(step["step"], step["reward"]) for step in daemon.of_kind("step")] == [(1, 0.5), (3, 0.75)]
    assert daemon.of_kind("step")[0]["metrics"] == {"policy/grad_norm": 2.0}
    assert [saved["path"] for saved in daemon.of_kind("saved")] == ["/c/global_step_3"]


def test_skyrls_loop_calls_in_this_order() -> None:
    trainer = source("skyrl", "skyrl/train/trainer.py")
    calls = trainer.calls("RayPPOTrainer.train")
    order = [
        calls.index("self._fire('on_step_start')"),
        calls.index("self.convert_to_training_input(generator_output, uids)"),
        calls.index("self.train_critic_and_policy(training_input)"),
        calls.index("self._fire('on_step_end', batch=training_input, metrics=status)"),
        len(calls) - 1 - calls[::-1].index("self.dispatch.save_weights_for_sampler()"),
    ]
    assert order == sorted(order)
    assert calls.index("self._fire('on_train_start')") < order[0]
    assert SimpleNamespace(**dict.fromkeys(trainer.parameters("RayPPOTrainer.add_callback"))).callback is None
