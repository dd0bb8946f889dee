"""
TRL: `trainer.add_callback(StepguardCallback(trainer))`.

Promise: no optimizer step on a refused batch. A batch is judged right after it was generated and scored,
before anything is computed with it; a refused one is generated anew, from the same prompts, so that neither
weights, optimizer, schedule nor step counter have moved. Before each optimizer step the gate is passed again.

The generation is reached by wrapping `trainer._generate_and_score_completions` and `_calculate_rewards`,
because callbacks are not told of it. A TRL that has no such methods is refused when the callback is made.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any, Final

import transformers

from stepguard.gate import Phase
from stepguard.guard import Guard
from stepguard.integrations.ranks import over_gloo
from stepguard.isolation import Aborted
from stepguard.orders import RollbackRequested

_WRAPPED: Final = ("_generate_and_score_completions", "_calculate_rewards", "_buffered_inputs", "_metrics")
_OF_THE_NETWORK: Final = ("requests", "httpx", "urllib3", "aiohttp")

log = logging.getLogger("stepguard")


class StepguardCallback(transformers.TrainerCallback):  # type: ignore[misc] # transformers has no types here
    """
    Guards a GRPOTrainer.

    Args:
        trainer: a `trl.GRPOTrainer`, or another with its way of generating.
        guard: in place of the one that STEPGUARD_RUN_DIR asks for; with several ranks, made on each of them.

    Attributes:
        guard: the guard, for `on_resync` and what else a script wants of it.
        refused: batches that were generated anew.
        rollbacks: checkpoints loaded in place.

    Raises:
        TypeError: the trainer does not generate the way TRL's GRPOTrainer does.

    """

    def __init__(self, trainer: Any, guard: Guard | None = None) -> None:
        missing = [name for name in _WRAPPED if not hasattr(trainer, name)]
        if missing:
            raise TypeError(
                f"{type(trainer).__name__} has no {missing[0]}: StepguardCallback fits trl.GRPOTrainer (1.16)"
            )
        self.guard = Guard.from_env(**over_gloo()) if guard is None else guard
        self.refused = 0
        self.rollbacks = 0
        self._trainer = trainer
        self._rewards: list[float | None] = []
        self._grad_norm: float | None = None
        self._generate: Callable[[Any], Any] = trainer._generate_and_score_completions
        self._score: Callable[..., Any] = trainer._calculate_rewards
        trainer._generate_and_score_completions = self._generate_until_admitted
        trainer._calculate_rewards = self._score_and_note
        if hasattr(trainer, "_get_grad_norm"):
            self._norm: Callable[..., Any] = trainer._get_grad_norm
            trainer._get_grad_norm = self._norm_and_note
        if getattr(trainer, "vllm_generation", None) is not None:
            self._push: Callable[[], Any] = trainer.vllm_generation.sync_weights
            trainer.vllm_generation.sync_weights = self._push_in_its_phase
        self._sharded = bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
        self.guard.on_save(self._save)
        if not self._sharded:
            self.guard.on_rollback(self._load)

    # The trainer's events

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the step's first generation: nothing is in flight, the best moment to hold."""
        self._pass_gate(state.global_step + 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """
        The last moment before the weights move.

        DeepSpeed has moved them by then, inside backward: there the gates before and after generation count.
        """
        if not self._trainer.is_deepspeed_enabled:
            self._pass_gate(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step."""
        newest = {name: values[-1] for name, values in self._trainer._metrics["train"].items() if values}
        if self._grad_norm is not None:
            newest["grad_norm"] = self._grad_norm
        try:
            self.guard.after_step(state.global_step, reward=newest.pop("reward", None), metrics=newest)
        except RollbackRequested as order:
            self._rolled_back(order)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the checkpoint."""
        self._report_saved()

    # Generation

    def _generate_until_admitted(self, inputs: Any) -> Any:
        """In place of the trainer's generation: the first batch that may be trained on."""
        if not self._trainer.model.training:
            with self.guard.phase(Phase.EVAL):
                return self._generate(inputs)
        step = self._trainer.state.global_step + 1
        metrics = self._trainer._metrics["train"]
        while True:
            logged = {name: len(values) for name, values in metrics.items()}
            try:
                with self.guard.rollouts(step):
                    output = self._generated(inputs)
                if self._admitted(step, output, len(inputs)):
                    return output
                self.refused += 1
            except RollbackRequested as order:
                self._rolled_back(order)
            for name, values in metrics.items():  # what was not trained on is not averaged into the logs
                del values[logged.get(name, 0) :]

    def _generated(self, inputs: Any) -> Any:
        """The batch; or, where the inference server did not answer, why not."""
        self._rewards = []
        try:
            return self._generate(inputs)
        except Exception as error:
            # With several ranks the others are inside this batch's collectives and cannot be called back.
            if self._trainer.accelerator.num_processes == 1 and _is_of_the_network(error):
                return Aborted(error)
            raise

    def _admitted(self, step: int, output: Any, members: int) -> bool:
        if isinstance(output, Aborted):
            log.warning("generation for step %d failed: %s", step, output.exception)
            return self.guard.admit(step, [output] * members).ok
        here = self._trainer.accelerator.process_index * members
        group = self._trainer.num_generations
        return self.guard.admit(
            step,
            list(range(here, here + members)),
            group_ids=[member // group for member in range(here, here + members)],
            rewards=self._rewards[here : here + members],
        ).ok

    def _score_and_note(self, *args: Any, **kwargs: Any) -> Any:
        """Note the rewards of all ranks' members; None where no function gave one."""
        per_function = self._score(*args, **kwargs)
        weights = self._trainer.reward_weights.tolist()
        self._rewards = [_weighed(row, weights) for row in per_function.tolist()]
        return per_function

    def _push_in_its_phase(self) -> Any:
        """The server is silent on purpose while it takes weights."""
        with self.guard.phase(Phase.SYNC):
            return self._push()

    def _norm_and_note(self, *args: Any, **kwargs: Any) -> Any:
        norm = self._norm(*args, **kwargs)
        self._grad_norm = None if norm is None else float(norm)
        return norm

    # Orders

    def _pass_gate(self, step: int) -> None:
        try:
            self.guard.before_step(step)
        except RollbackRequested as order:
            self._rolled_back(order)

    def _rolled_back(self, order: RollbackRequested) -> None:
        """Go on from the checkpoint that was loaded; where it could not be, the run ends and is resumed."""
        if not order.reloaded:
            raise order
        self.rollbacks += 1
        # Gradients and generations of the old weights: no step on them, and none of them kept.
        self._trainer.model.zero_grad(set_to_none=True)
        self._trainer._buffered_inputs = None
        log.warning("rolled back in place to %s; training goes on", order.path)

    def _load(self, path: str | None, step: int | None) -> None:
        """Weights, optimizer and schedule; the step counter and the data go on."""
        if path is None:
            raise ValueError("no checkpoint to load in place")
        self._trainer._load_from_checkpoint(path)
        self._trainer._load_optimizer_and_scheduler(path)
        if hasattr(self._trainer, "_last_loaded_step"):
            self._trainer._last_loaded_step = -1  # vLLM has the weights that were left

    def _save(self) -> None:
        """As the trainer saves."""
        self._trainer._save_checkpoint(self._trainer.model, trial=None)
        self._report_saved()

    def _report_saved(self) -> None:
        step = self._trainer.state.global_step
        path = os.path.join(self._trainer.args.output_dir, f"checkpoint-{step}")  # noqa: PTH118 - may be no path yet
        self.guard.saved(step, os.path.abspath(path), norms=None if self._sharded else self._norms())  # noqa: PTH100

    def _norms(self) -> dict[str, float]:
        """One number that is finite only if every parameter is."""
        import torch  # noqa: PLC0415 - here by now, and only wanted here

        norms = [value.detach().float().norm() for value in self._trainer.model.parameters()]
        return {"parameters": float(torch.stack(norms).norm())}


def _weighed(row: list[float], weights: list[float]) -> float | None:
    """A member's reward over all reward functions; None where none of them could score it."""
    scored = [value * weight for value, weight in zip(row, weights, strict=True) if not math.isnan(value)]
    return math.fsum(scored) if scored else None


def _is_of_the_network(error: BaseException) -> bool:
    """Whether an inference server did not answer, rather than that the code is wrong."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or package in _OF_THE_NETWORK
