"""
slime and miles: functions for their `--…-path` arguments.

    --rollout-function-path stepguard.integrations.slime.generate_rollout
    --custom-megatron-before-train-step-hook-path stepguard.integrations.slime.before_train_step
    --custom-reward-post-process-path stepguard.integrations.slime.post_process_rewards

Promise: the guard lives in the rollout process. A batch is judged before it is handed to training; a refused
one is rolled out again with the next prompts. One failed trajectory costs one trajectory: it keeps its place,
and where rollouts fan out it becomes a list as well; it is masked, and is outside of its group's mean. Each
Megatron rank passes the gate before its step.

The same functions serve miles, which has the same arguments; which of the two it is, `args` does not say, so
the rollout function that is wrapped is named by STEPGUARD_ROLLOUT_FUNCTION where it is not slime's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from stepguard.admission import group_advantages
from stepguard.guard import Guard
from stepguard.integrations.onlooker import Onlooker
from stepguard.integrations.ranks import over_gloo
from stepguard.isolation import Aborted, FailureLog, alone

ROLLOUT_VARIABLE: Final = "STEPGUARD_ROLLOUT_FUNCTION"
_DEFAULTS: Final = (
    "slime.rollout.sglang_rollout.generate_rollout",
    "miles.rollout.sglang_rollout.generate_rollout",
)
_ISOLATED: Final = "_stepguard_isolated"
_FAILED: Final = "stepguard_failed"

log = logging.getLogger("stepguard")


class _Process:
    """What one process keeps between calls: slime passes functions by name, and no object."""

    def __init__(self) -> None:
        self.guard: Guard | None = None
        self.onlooker: Onlooker | None = None
        self.rollout: Callable[..., Any] | None = None
        self.failures = FailureLog(log)
        self.handed_over: tuple[int, float | None] | None = None
        self.metrics: dict[str, Any] = {}


process = _Process()


def use(guard: Guard | None = None, *, onlooker: Onlooker | None = None) -> None:
    """
    Begin anew in this process, with this guard or onlooker in place of those of the environment.

    A rollout function of your own may call it to register `guard.on_resync`.
    """
    process.__init__()  # type: ignore[misc] # a fresh state in the one place
    process.guard, process.onlooker = guard, onlooker


def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """
    For `--rollout-function-path`: the wrapped function's first batch that may be trained on.

    Raises:
        StopRequested: ordered; the job ends.
        RollbackRequested: ordered; the job ends, and is to be resumed from the marker, which was moved.

    """
    if process.rollout is None:
        process.rollout = _wrapped_rollout()
    if process.guard is None:
        process.guard = Guard.from_env()
    guard, rollout = process.guard, process.rollout
    if evaluation:
        from stepguard.gate import Phase  # noqa: PLC0415 - for evaluations alone

        with guard.phase(Phase.EVAL):
            return rollout(args, rollout_id, data_source, evaluation=True)
    _report_step(guard)
    version = _pushed(args)
    if version is not None:
        guard.weights(version)
    if guard.skips(rollout_id):
        data_source.get_samples(args.rollout_batch_size)  # the job died of them, twice
    while True:
        with guard.rollouts(rollout_id):
            output = rollout(args, rollout_id, data_source, evaluation=False)
        groups = getattr(output, "samples", output)
        if _admitted(guard, args, rollout_id, groups):
            return output


def before_train_step(
    args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, opt_param_scheduler: Any
) -> None:
    """
    For `--custom-megatron-before-train-step-hook-path`: the gate, on every rank alike.

    Raises:
        StopRequested: ordered.
        RollbackRequested: ordered.

    """
    if process.onlooker is None:
        process.onlooker = _onlooker_of_all_ranks()
    process.onlooker.before_step(rollout_id)


def post_process_rewards(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """
    For `--custom-reward-post-process-path`: as slime's own, with failed samples outside of their group.

    Returns:
        Raw rewards (a failed one's is its group's mean, so that no average is drawn towards 0), and what the
        estimator gets.

    """
    groups = [_group(sample, index, args) for index, sample in enumerate(samples)]
    rewards = [_reward(sample, args) for sample in samples]
    alive = [reward is not None for reward in rewards]
    raw = [
        _mean(rewards, groups, group) if reward is None else reward
        for reward, group in zip(rewards, groups, strict=True)
    ]
    by_group = ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")
    if args.advantage_estimator not in by_group or not args.rewards_normalization:
        return raw, raw
    scale = args.advantage_estimator != by_group[-1] and args.grpo_std_normalization
    return raw, group_advantages(rewards, groups, alive, scale=scale)


def log_rollout(
    rollout_id: int, args: Any, samples: Any, rollout_extra_metrics: Any, rollout_time: float
) -> bool:
    """For `--custom-rollout-log-function-path`, if you like: its numbers go into the step's report."""
    process.metrics = {**(rollout_extra_metrics or {}), "time/rollout_s": rollout_time}
    return False  # slime logs as before


def after_save(args: Any, rollout_id: int, checkpoint_dir: Any, hf_checkpoint_dir: Any) -> None:
    """For miles' `--custom-megatron-post-save-hook-path`: say that a checkpoint is complete."""
    from pathlib import Path  # noqa: PLC0415 - for saves alone

    from stepguard.guard import RUN_DIR_VARIABLE  # noqa: PLC0415
    from stepguard.reports import ReportSender  # noqa: PLC0415

    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    if run_dir:
        sender = ReportSender(Path(run_dir) / "reports.sock")
        sender.send(
            {
                "v": 1,
                "kind": "saved",
                "attempt": 0,
                "step": rollout_id,
                "path": str(checkpoint_dir),
                "norms": None,
            }
        )
        sender.close()


def isolate(module: Any) -> None:
    """
    One failed trajectory costs one, in a module with `generate_and_rm` and `generate_and_rm_group`.

    Both are looked up in their module at each call, so that replacing them there reaches every caller in it,
    and whoever imports them later.
    """
    if getattr(module.generate_and_rm_group, _ISOLATED, False):
        return
    one, group = module.generate_and_rm, module.generate_and_rm_group

    async def generate_and_rm(state: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = await alone(one(state, sample, *args, **kwargs), log=process.failures, on_done=_ended)
        return _failed(sample, outcome.exception, state) if isinstance(outcome, Aborted) else outcome

    async def generate_and_rm_group(state: Any, samples: Any, *args: Any, **kwargs: Any) -> Any:
        # Its members were told of one by one.
        out = await alone(
            group(state, samples, *args, **kwargs), log=process.failures, on_done=lambda error: None
        )
        if isinstance(out, Aborted):  # its reward model
            out = [_failed(sample, out.exception, state) for sample in samples]
        fans_out = any(isinstance(member, list) for member in out)
        return [[member] if fans_out and not isinstance(member, list) else member for member in out]

    setattr(generate_and_rm_group, _ISOLATED, True)
    module.generate_and_rm, module.generate_and_rm_group = generate_and_rm, generate_and_rm_group


def _ended(error: BaseException | None) -> None:
    """Tell the guard that one trajectory ended: a streak of failed requests is found while rollouts run."""
    if process.guard is not None:
        process.guard.trajectory_ended(error)


def _wrapped_rollout() -> Callable[..., Any]:
    """The rollout function of slime, of miles, or of the user; its module's trajectories isolated."""
    named = os.environ.get(ROLLOUT_VARIABLE)
    for path in [named] if named else _DEFAULTS:
        framework = path.partition(".")[0]
        if not named and importlib.util.find_spec(framework) is None:
            continue
        if framework in ("slime", "miles"):
            isolate(importlib.import_module(f"{framework}.rollout.sglang_rollout"))
        module, _, name = path.rpartition(".")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found
    raise ImportError(f"neither slime nor miles is here; name your rollout function in {ROLLOUT_VARIABLE}")


def _onlooker_of_all_ranks() -> Onlooker:
    import torch.distributed as dist  # noqa: PLC0415 - in training processes alone

    if not dist.is_initialized():
        return Onlooker.from_env()
    return Onlooker.from_env(
        rank=dist.get_rank(), world=dist.get_world_size(), broadcast=over_gloo().get("broadcast")
    )


def _report_step(guard: Guard) -> None:
    """The batch before was trained on, or this rollout would not have been asked for."""
    if process.handed_over is not None:
        step, reward = process.handed_over
        process.handed_over = None
        guard.after_step(step, reward=reward, metrics=process.metrics)


def _pushed(args: Any) -> str | None:
    """
    The version that slime pushed last, where it pushes over a disk and keeps what it wrote.

    It pushes before it asks for rollouts, and counts anew in a job that was started again: the newest folder
    is the one that was written last. Of partial rollouts, which may begin before a push, nothing is said.
    """
    folder = getattr(args, "update_weight_disk_dir", None)
    if not folder or getattr(args, "partial_rollout", False):
        return None
    from pathlib import Path  # noqa: PLC0415 - for pushes over a disk alone

    written = [(place.stat().st_mtime_ns, place.name) for place in Path(folder).glob("weight_v[0-9]*")]
    return str(int(max(written)[1].removeprefix("weight_v"))) if written else None


def _admitted(guard: Guard, args: Any, rollout_id: int, groups: Any) -> bool:
    members = list(_samples(groups))
    rewards = [_reward(sample, args) for sample in members]
    outcomes = [
        Aborted(RuntimeError("failed")) if reward is None else index for index, reward in enumerate(rewards)
    ]
    admission = guard.admit(
        rollout_id,
        outcomes,
        group_ids=[_group(sample, index, args) for index, sample in enumerate(members)],
        rewards=rewards,
        weight_versions=[_version(sample) for sample in members],
    )
    for sample, counts in zip(members, admission.flat_mask, strict=True):
        if not counts:
            sample.remove_sample = True
    live = [reward for reward in rewards if reward is not None]
    process.handed_over = (rollout_id, math.fsum(live) / len(live) if live else None)
    return admission.ok


def _failed(sample: Any, error: BaseException, state: Any) -> Any:
    """The trajectory in its place, masked; `state` is slime's `args`, or has them, as in miles."""
    key = getattr(getattr(state, "args", state), "reward_key", None)
    for one in _samples([sample]):
        one.status = type(one).Status.FAILED
        one.remove_sample = True
        one.reward = {key: 0.0} if key else 0.0  # so that no reward model is asked; nothing counts it
        one.metadata = {**(one.metadata or {}), _FAILED: f"{type(error).__name__}: {error}"[:200]}
        if not one.response_length:
            _one_masked_token(one)
    return sample


def _one_masked_token(sample: Any) -> None:
    """A response of one token outside of the loss: training code divides by the length of responses."""
    sample.tokens = [*(sample.tokens or [0]), (sample.tokens or [0])[-1]]
    sample.response_length = 1
    sample.loss_mask = [0]
    sample.rollout_log_probs = [0.0]


def _samples(groups: Any) -> Iterator[Any]:
    for item in groups:
        if isinstance(item, list | tuple):
            yield from _samples(item)
        else:
            yield item


def _reward(sample: Any, args: Any) -> float | None:
    """A sample's reward; None where it failed, was aborted, or has none."""
    if sample.status.value in ("failed", "aborted") or sample.reward is None:
        return None
    reward = float(sample.get_reward_value(args))
    return reward if math.isfinite(reward) else None


def _group(sample: Any, index: int, args: Any) -> int:
    group = getattr(sample, "group_index", None)
    return int(index // args.n_samples_per_prompt if group is None else group)


def _version(sample: Any) -> str | None:
    """The oldest weights that took part; versions are appended turn by turn."""
    versions = getattr(sample, "weight_versions", None)
    return str(versions[0]) if versions else None


def _mean(rewards: Sequence[float | None], groups: Sequence[int], group: int) -> float:
    live = [r for r, g in zip(rewards, groups, strict=True) if r is not None and g == group]
    return math.fsum(live) / len(live) if live else 0.0
