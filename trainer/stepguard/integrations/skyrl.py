"""
SkyRL: `RayPPOTrainer(..., callbacks=[StepguardCallback()])`, or `trainer.add_callback(StepguardCallback())`.

Promise: the driver waits at the gate at the begin of each step, before rollouts are generated. A batch is
judged, and the gate passed once more, before `train_critic_and_policy`: it is not called for a refused one.
"""

from __future__ import annotations

from typing import Any

from skyrl.train.utils.callbacks import TrainingCallback

from stepguard.gate import Phase
from stepguard.guard import Guard


class StepguardCallback(TrainingCallback):  # type: ignore[misc] # skyrl has no types here
    """
    Guards a RayPPOTrainer.

    Args:
        guard: in place of the one that STEPGUARD_RUN_DIR asks for.

    Attributes:
        refused: steps without an update.

    """

    def __init__(self, guard: Guard | None = None) -> None:
        self.guard = Guard.from_env() if guard is None else guard
        self.refused = 0
        self._wrapped: Any = None
        self._reward: float | None = None
        self._skipped = False

    def on_train_start(self, trainer: Any, callback_input: Any, control: Any) -> None:
        """Put the gate before the update, and say when weights are pushed: callbacks are told of neither."""
        if self._wrapped is trainer:
            return
        self._wrapped = trainer
        convert, update = trainer.convert_to_training_input, trainer.train_critic_and_policy

        def judged(generator_output: Any, uids: Any) -> Any:
            self._skipped = not self._admitted(trainer.global_step, generator_output, uids)
            return convert(generator_output, uids)

        def gated(data: Any) -> Any:
            if self._skipped:
                self.refused += 1
                return {"stepguard/refused": 1.0}
            self.guard.before_step(trainer.global_step)
            return update(data)

        trainer.convert_to_training_input, trainer.train_critic_and_policy = judged, gated
        push = trainer.dispatch.save_weights_for_sampler

        async def pushed(*args: Any, **kwargs: Any) -> Any:
            with self.guard.phase(Phase.SYNC):  # its engines are silent on purpose
                return await push(*args, **kwargs)

        trainer.dispatch.save_weights_for_sampler = pushed

    def on_step_start(self, trainer: Any, callback_input: Any, control: Any) -> None:
        """The gate, before any rollout of this step."""
        with self.guard.rollouts(callback_input.global_step):
            pass  # from here on the rollouts run

    def on_step_end(self, trainer: Any, callback_input: Any, control: Any) -> None:
        """Report the step, unless nothing was updated."""
        if not self._skipped:
            self.guard.after_step(
                callback_input.global_step, reward=self._reward, metrics=callback_input.metrics or {}
            )

    def on_save(self, trainer: Any, callback_input: Any, control: Any) -> None:
        """Report the checkpoint."""
        if callback_input.ckpt_path is not None:
            self.guard.saved(callback_input.global_step, callback_input.ckpt_path)

    def _admitted(self, step: int, generator_output: Any, uids: Any) -> bool:
        rewards = [_total(reward) for reward in generator_output["rewards"]]
        finite = [reward for reward in rewards if reward is not None]
        self._reward = sum(finite) / len(finite) if finite else None
        return self.guard.admit(
            step,
            list(range(len(rewards))),
            group_ids=list(uids) if len(uids) == len(rewards) else None,
            rewards=rewards,
        ).ok


def _total(reward: Any) -> float | None:
    """A trajectory's reward, which SkyRL has as one number or as one a token."""
    if reward is None:
        return None
    return float(sum(reward)) if isinstance(reward, list | tuple) else float(reward)
