"""
verl (trainer v1): `trainer.v1.trainer_mode=stepguard_sync`, and in the environment of the job

    VERL_USE_EXTERNAL_MODULES=stepguard.integrations.verl

Promise: the driver, which alone decides in verl, waits at the gate at the begin of each step and once more
before the update; a batch is judged as soon as its rewards are known, and neither critic nor actor is updated
on a refused one. Such a step counts in verl, and has moved nothing.

Importing this module imports verl; it registers `stepguard_sync`, `stepguard_colocate_async` and
`stepguard_separate_async`.
"""

from __future__ import annotations

import os
from typing import Any

from verl.trainer.ppo.v1 import get_trainer_cls, register_trainer

from stepguard.gate import Phase
from stepguard.guard import Guard


class StepguardMixin:
    """
    Put before one of verl's trainers: `class Mine(StepguardMixin, PPOTrainerSync)`.

    Every method calls verl's own of the same name.
    """

    _guard: Guard | None = None
    _admitted = True
    _reward: float | None = None
    _metrics: dict[str, float]

    @property
    def guard(self) -> Guard:
        """The driver's guard, made on first use."""
        if self._guard is None:
            self._guard = Guard.from_env()
        return self._guard

    def on_step_begin(self) -> None:
        """The gate, before any rollout of this step is asked for."""
        with self.guard.rollouts(self.global_steps):  # type: ignore[attr-defined] # verl's
            pass  # from here on the rollouts run, beside the driver
        super().on_step_begin()  # type: ignore[misc] # verl's

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """The first moment at which the whole batch has its rewards."""
        rewards, groups = self._rewards(batch)
        admission = self.guard.admit(
            self.global_steps,  # type: ignore[attr-defined] # verl's
            list(range(len(rewards))),
            group_ids=groups,
            rewards=rewards,
        )
        self._admitted = admission.ok
        self._reward = sum(rewards) / len(rewards) if rewards else None
        self._metrics = {}
        metrics["stepguard/refused"] = float(not admission.ok)
        return super()._compute_advantage(batch, metrics)  # type: ignore[misc] # verl's

    def _update_critic(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Not on a refused batch."""
        return super()._update_critic(batch, metrics) if self._pass_gate() else batch  # type: ignore[misc]

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Not on a refused batch."""
        if not self._pass_gate():
            return batch
        batch = super()._update_actor(batch, metrics)  # type: ignore[misc] # verl's
        self._metrics = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        return batch

    def on_step_end(self) -> None:
        """After verl has brought the new weights to its servers."""
        with self.guard.phase(Phase.SYNC):  # its servers are silent on purpose
            super().on_step_end()  # type: ignore[misc] # verl's
        if self._admitted:
            step = self.global_steps  # type: ignore[attr-defined] # verl's
            self.guard.after_step(step, reward=self._reward, metrics=self._metrics)

    def _save_checkpoint(self) -> None:
        """Report what was saved."""
        super()._save_checkpoint()  # type: ignore[misc] # verl's
        step = self.global_steps  # type: ignore[attr-defined] # verl's
        folder = self.config.trainer.default_local_dir  # type: ignore[attr-defined] # verl's
        self.guard.saved(step, os.path.abspath(os.path.join(folder, f"global_step_{step}")))  # noqa: PTH100, PTH118

    def _pass_gate(self) -> bool:
        """Wait while held; whether the batch may be trained on."""
        if self._admitted:
            self.guard.before_step(self.global_steps)  # type: ignore[attr-defined] # verl's
        return self._admitted

    def _rewards(self, batch: Any) -> tuple[list[float], list[Any]]:
        """Each member's reward and prompt; verl's padding is left out."""
        import transfer_queue  # noqa: PLC0415 - where verl is

        data = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["uid", "rm_scores"]
        )
        scores = [float(row.sum()) for row in data["rm_scores"].unbind()]
        real = [not tag.get("is_padding", False) for tag in batch.tags]
        uids = data["uid"].tolist()
        return (
            [score for score, counts in zip(scores, real, strict=True) if counts],
            [uid for uid, counts in zip(uids, real, strict=True) if counts],
        )


def register() -> None:
    """Make the guarded trainers known to verl."""
    for mode in ("sync", "colocate_async", "separate_async"):
        base = get_trainer_cls(mode)
        register_trainer(f"stepguard_{mode}")(
            type(f"Stepguard{base.__name__}", (StepguardMixin, base), {"__module__": __name__})
        )


register()
