"""
AReaL: `guarded(trainer).train(workflow=...)` instead of `trainer.train(workflow=...)`.

Promise: a batch is judged after `prepare_batch` and before anything is computed with it; a refused one is
prepared anew. The gate is passed before `ppo_update`. After each recover save the checkpoint is reported, and
the one slot that AReaL has is copied, because the next save overwrites it.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any, Final

from stepguard.guard import Guard
from stepguard.integrations.ranks import over_gloo
from stepguard.isolation import Aborted, FailureLog, alone

_SNAPSHOTS: Final = "stepguard-snapshots"

log = logging.getLogger("stepguard")


class _Process:
    """What one process keeps: a workflow is made apart from the trainer that `guarded` was given."""

    guard: Guard | None = None


class IsolatedWorkflow:
    """
    A workflow whose failed episodes are rejected, each distinct error with its traceback, once.

    It has AReaL's one method and is no RolloutWorkflow; `areal_workflow` makes one that is.

    Args:
        inner: the workflow.

    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.failed = 0
        self._failures = FailureLog(log)

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> Any:
        """The inner workflow's trajectory; None (rejected, never a reward of 0) where it failed."""
        outcome = await alone(self.inner.arun_episode(engine, data), log=self._failures, on_done=_ended)
        if not isinstance(outcome, Aborted):
            return outcome
        self.failed += 1
        return None


def areal_workflow(inner: Any) -> Any:
    """`inner`, isolated, as an instance of AReaL's RolloutWorkflow."""
    from areal.api.workflow_api import RolloutWorkflow  # noqa: PLC0415 - where AReaL is

    return type("StepguardWorkflow", (IsolatedWorkflow, RolloutWorkflow), {})(inner)


def guarded(trainer: Any, guard: Guard | None = None, *, keep: int = 2) -> Any:
    """
    Guard a PPOTrainer; on every rank where it runs on several.

    Args:
        trainer: AReaL's.
        guard: in place of the one that STEPGUARD_RUN_DIR asks for.
        keep: how many snapshots of the recover slot are kept; 0: none are made.

    Returns:
        The trainer.

    """
    watch = Guard.from_env(**over_gloo()) if guard is None else guard
    _Process.guard = watch
    actor, recover = trainer.actor, trainer.recover_handler
    prepare, update, save = actor.prepare_batch, actor.ppo_update, trainer._save_recover_checkpoint
    info = trainer.recover_info
    step = 0 if info is None else info.last_step_info.next().global_step
    reward: float | None = None

    def prepare_batch(*args: Any, **kwargs: Any) -> Any:
        nonlocal reward
        while True:
            with watch.rollouts(step):
                batch = prepare(*args, **kwargs)
            groups = [_rewards(trajectories) for trajectories in batch]
            known = [one for group in groups if group is not None for one in group]
            # Rewards may live on other workers: then the number of groups is all that is known.
            here = len(known) > 0 and None not in groups
            if watch.admit(step, groups, rewards=known if here else None).ok:
                reward = sum(known) / len(known) if known else None
                return batch

    def ppo_update(*args: Any, **kwargs: Any) -> Any:
        watch.before_step(step)
        return update(*args, **kwargs)

    def save_recover_checkpoint(epoch: int, epoch_step: int, global_step: int) -> None:
        nonlocal step
        save(epoch=epoch, epoch_step=epoch_step, global_step=global_step)
        if (
            recover.config.mode not in ("disabled", "off")
            and recover.last_step_info.global_step == global_step
        ):
            trial = _trial(recover)
            if keep and os.environ.get("RANK", "0") == "0":
                snapshot(trial, global_step, keep=keep)
            watch.saved(global_step, trial)
        watch.after_step(global_step, reward=reward)
        step = global_step + 1

    actor.prepare_batch, actor.ppo_update = prepare_batch, ppo_update
    trainer._save_recover_checkpoint = save_recover_checkpoint
    return trainer


def snapshot(trial: Path, step: int, *, keep: int) -> Path:
    """
    Copy the recover slot of a trial, before the next save overwrites it.

    Args:
        trial: the folder with `recover_info` and `<model>/recover_checkpoint`.
        step: its step.
        keep: how many snapshots stay, this one included; older ones are deleted.

    Returns:
        The copy: laid out as a trial of its own, so that `stepguard checkpoints verify` reads it.

    """
    home = trial / _SNAPSHOTS
    place = home / f"globalstep{step}"
    partial = home / f".globalstep{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for part in [*trial.glob("*/recover_checkpoint"), trial / "recover_info"]:
        shutil.copytree(part, partial / part.relative_to(trial))
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)
    ages = sorted(home.glob("globalstep*"), key=lambda made: int(made.name.removeprefix("globalstep")))
    for old in ages[:-keep]:
        shutil.rmtree(old)
    return place


def _ended(error: BaseException | None) -> None:
    """Tell the guard, where it is in this process: a streak of failed requests is found at once."""
    if _Process.guard is not None:
        _Process.guard.trajectory_ended(error)


def _trial(recover: Any) -> Path:
    """The folder of the trial."""
    config = recover.config
    return Path(recover.recover_info_path(config.experiment_name, config.trial_name, config.fileroot)).parent


def _rewards(trajectories: Any) -> list[float] | None:
    """The rewards of one group; None where they are not in this process."""
    rewards: Any = trajectories.get("rewards") if isinstance(trajectories, dict) else None
    if not hasattr(rewards, "tolist"):
        return None
    flat = rewards.tolist()
    return [float(one) for one in (flat if isinstance(flat, list) else [flat])]
