"""
The training loop: the example to copy.

A step is: roll out a batch, ask whether it may be trained on, pass the gate, update, push the new weights,
report. With a guard, only StopRequested and RollbackRequested interrupt it; without one, it does what most
trainers do. Promise: the same configuration gives the same weights bit for bit, also across a resume. It sets
one torch thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepguard_grpo import checkpoint, ground_truth, grpo, task
from stepguard_grpo.config import Failures, TrainConfig, WeightSyncMode, parse_arguments
from stepguard_grpo.grading import Graders
from stepguard_grpo.ground_truth import TruthRecord
from stepguard_grpo.model import EOS, load_policy, write_base_model
from stepguard_grpo.rollout import HttpSampler, Rollout, RolloutError, Sampler
from stepguard_grpo.task import Request
from stepguard_grpo.team import Team
from stepguard_grpo.tracking import REWARD, Tracker
from stepguard_grpo.weights import DiskSync, GroupSync, ServerClient, WeightPushError, WeightSync

if TYPE_CHECKING:
    from stepguard import Guard

log = logging.getLogger("stepguard_grpo")

RUINOUS = -30.0
RUINED_STEPS = 3
POISONED_GROUP = 2


class Outcome(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    STOPPED = "stopped"  # StopRequested: saved, to be resumed
    DIED = "died"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run came to; also written to `<run_root>/run_record.json`."""

    outcome: Outcome
    error: str | None
    last_step: int
    attempt: int
    steps: int  # committed, from the ground truth, as are the next two
    garbage_steps: int
    final_reward: float | None
    refused_batches: int
    rollbacks: int
    resyncs: int
    failed_pushes: int
    resumed_from: int | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What came back for one step, in the order of the requests."""

    requests: list[Request]
    outcomes: list[Any]  # Rollout, or a failure: None without the guard's `gather`, stepguard.Aborted with it
    seconds: float

    def genuine(self) -> list[Rollout]:
        """The rollouts that are ones."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, Rollout)]


@dataclass(frozen=True, slots=True, kw_only=True)
class InLoss:
    """One member of the loss, and the truth about it."""

    member: grpo.Member
    failed: bool
    weight_version: str | None


def train(
    config: TrainConfig,
    *,
    sampler: Sampler | None = None,
    sync: WeightSync | None = None,
    guard: Guard | None = None,
) -> RunRecord:
    """
    Run to the end, to a stop, or to the error that ends it; which of these is in the record.

    sampler, sync and guard stand in for what the configuration would make.
    """
    torch.set_num_threads(1)
    config.run_root.mkdir(parents=True, exist_ok=True)
    team = Team.from_env()
    own: Guard | None = None
    if guard is None and config.guard:
        from stepguard import Guard  # noqa: PLC0415 - a run without Stepguard does not import it
        from stepguard.integrations.ranks import over_gloo  # noqa: PLC0415

        guard = own = Guard.from_env(**over_gloo())
    run = Run(config, sampler=sampler, sync=sync, guard=guard, team=team)
    record = run.to_the_end()
    if own is not None:
        own.close(None if record.error is None else RuntimeError(record.error))
    if not team.first:
        return record
    path = config.run_root / "run_record.json"
    path.write_text(json.dumps(asdict(record), indent=2) + "\n")
    return record


class Run:
    """One run: policy, optimizer, where it stands, and whom it talks to."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        sampler: Sampler | None,
        sync: WeightSync | None,
        guard: Guard | None,
        team: Team,
    ) -> None:
        self.config = config
        self.guard = guard
        self.team = team
        self._base = config.run_root / "base"
        if team.first and not (self._base / "config.json").exists():
            write_base_model(self._base, config.seed)
        team.barrier()
        self.learner = _new_learner(config, self._base)
        self.client = ServerClient(config.server_url, timeout_s=config.request_timeout_s)
        self.sampler = sampler or HttpSampler(config.server_url, timeout_s=config.request_timeout_s)
        self.graders = (
            Graders(config.graders, guard=guard, timeout_s=config.grade_timeout_s) if config.graders else None
        )
        self.sync = sync or _new_sync(config, self.client)
        self.external = sync is None
        self.step = 0
        self.attempt = team.of_first(0 if guard is None else guard.attempt)
        self.pushed: str | None = None  # the version that the server took last
        self.log_history: list[dict[str, float]] = []
        self.refused = self.rollbacks = self.resyncs = self.failed_pushes = 0
        self.resumed_from: int | None = None
        self.saved_step: int | None = None
        self.raised = False
        self.skipped = 0  # batches that were left out
        self.began = time.monotonic()

    # The run as a whole

    def to_the_end(self) -> RunRecord:
        """Train; whatever ends the run is in the record."""
        error: str | None = None
        wandb = self.config.wandb and self.team.first
        tracker = Tracker(self.config.run_root, wandb=wandb, config=_plain(self.config))
        try:
            with asyncio.Runner() as runner:
                try:
                    outcome = self._train(runner, tracker)
                finally:
                    if self.graders is not None:
                        runner.run(self.graders.close())
                    runner.run(self.sampler.aclose())
        except Exception as caught:  # the border of the run: its end is the record
            log.exception("the run died at step %d", self.step + 1)
            outcome, error = Outcome.DIED, f"{type(caught).__name__}: {caught}"
        finally:
            tracker.close()
            if self.external:
                self.sync.close()
            self.client.close()
        return self._record(outcome, error)

    def _train(self, runner: asyncio.Runner, tracker: Tracker) -> Outcome:
        if self.guard is None:
            self._start()
            while self.step < self.config.steps:
                self._one_step(runner, tracker)
            return Outcome.FINISHED
        return self._train_guarded(runner, tracker, self.guard)

    def _train_guarded(self, runner: asyncio.Runner, tracker: Tracker, guard: Guard) -> Outcome:
        from stepguard import RollbackRequested, StopRequested  # noqa: PLC0415

        guard.on_resync(self._resync)
        guard.on_rollback(self._load_in_place)
        guard.on_save(self._save)
        try:
            self._start()
            while self.step < self.config.steps:
                try:
                    self._one_step(runner, tracker)
                except RollbackRequested as order:
                    self._after_rollback(guard, order.path, order.step, reloaded=order.reloaded)
            return Outcome.FINISHED
        except StopRequested as order:
            log.warning("stopping at step %d: %s", self.step, order.reason)
            if self.saved_step != self.step:
                self._save()
            return Outcome.STOPPED

    def _start(self) -> None:
        """Resume where there is something to resume, and bring server and trainer to the same weights."""
        newest = checkpoint.newest(self._checkpoints) if self.config.resume else None
        if newest is not None:
            self._load(newest)
            self.resumed_from = self.step
            log.warning("resumed from %s", newest)
        self._announce()
        try:
            if self.external:
                self.client.wait_until_up(self.config.server_wait_s)
            if self.team.first:
                self.sync.rebuild()
        except WeightPushError as error:
            self._push_failed(error)
        self._push()
        self.team.barrier()

    # One step

    def _one_step(self, runner: asyncio.Runner, tracker: Tracker) -> None:
        began = time.monotonic()
        step = self.step + 1
        if self.pushed != str(self.step) and self.guard is not None:
            self._push()  # the last one failed; the batch would be refused as stale
        batch = runner.run(self._roll_out(step))
        in_loss = self._admit(step, batch)
        # One rank of several without a member would have no gradient to give.
        if in_loss is None or (self.team.world > 1 and min(self.team.all(len(in_loss))) == 0):
            self.refused += 1
            return
        tensors = grpo.to_tensors([entry.member for entry in in_loss])
        with torch.no_grad():
            old, _ = grpo.log_probs(self.learner.policy, tensors)
        if self.guard is not None:
            self.guard.before_step(step)
        with self._sabotaged(step):
            stats = [self._update(tensors, old) for _ in range(self.config.inner_updates)]
        self.learner.scheduler.step()
        truth = self._truth(step, batch, in_loss)
        self.step = step
        if self.team.first:
            ground_truth.append(self.config.run_root / "ground_truth.jsonl", truth)
        row = self._row(batch, in_loss, stats)
        self.log_history.append({"step": step, "reward": truth.reward_mean_in_loss or 0.0})
        self._push()
        time.sleep(max(0.0, self.config.min_step_s - (time.monotonic() - began)))
        row["time/step_s"] = time.monotonic() - began
        if self.team.first:
            tracker.log(row, step=step, of_steps=self.config.steps)
        if self.config.save_every and step % self.config.save_every == 0:
            self._save()
        self._perhaps_die(step)
        self.team.barrier()
        if self.guard is not None:
            self.guard.after_step(
                step, reward=truth.reward_mean_in_loss, metrics=row, weight_version=str(step)
            )

    async def _roll_out(self, step: int) -> Batch:
        config = self.config
        if self.guard is not None and self.team.of_first(self.guard.skips(step)):
            self.skipped = 1 + self.skipped  # every later batch moves up by one
            log.warning("the batch of step %d crashed the run twice: taking the next one", step)
        position = step + self.skipped
        requests = task.batch(
            seed=config.seed, step=position, groups=config.groups, group_size=config.group_size
        )
        requests = self.team.share_of(requests, [request.group_id for request in requests])
        if step == config.poison_at:
            requests = [replace(request, deadly=request.group_id == POISONED_GROUP) for request in requests]
        began = time.monotonic()
        if self.guard is not None and config.failures is Failures.MASK:
            outcomes = await self.guard.gather(
                [self._trajectory(request, step) for request in requests],
                prompts=["-".join(map(str, request.prompt)) for request in requests],
            )
        else:
            outcomes = await asyncio.gather(*(self._or_none(request, step) for request in requests))
        return Batch(requests=requests, outcomes=outcomes, seconds=time.monotonic() - began)

    async def _trajectory(self, request: Request, step: int) -> Rollout:
        rollout = await self.sampler(request)
        if self.graders is not None:
            rollout = replace(rollout, reward=await self.graders.grade(rollout.output_ids, request.target))
        if step == self.config.raise_in_rollout and request.index == 0 and not self.raised:
            self.raised = True
            raise ValueError(f"trajectory {request.index} of step {step}: made to fail")
        return rollout

    async def _or_none(self, request: Request, step: int) -> Rollout | None:
        """What trainers without isolation do: expected errors are swallowed, others end the batch."""
        try:
            return await self._trajectory(request, step)
        except RolloutError:
            return None

    def _admit(self, step: int, batch: Batch) -> list[InLoss] | None:
        """What goes into the loss, or None for a batch that was refused."""
        everyone = [
            _in_loss(request, outcome)
            for request, outcome in zip(batch.requests, batch.outcomes, strict=True)
        ]
        zero = self.config.failures is Failures.ZERO
        group_ids = [request.group_id for request in batch.requests]
        if self.guard is not None:
            admission = self.guard.admit(
                step,
                batch.outcomes if not zero else everyone,
                group_ids=group_ids,
                rewards=[None if entry.failed and not zero else entry.member.reward for entry in everyone],
                # The trainer of the incident did not look at what had generated its rollouts.
                weight_versions=None if zero else [entry.weight_version for entry in everyone],
            )
            if not admission.ok:
                return None
            mask = admission.flat_mask
        else:
            mask = grpo.live_mask(group_ids, [zero or not entry.failed for entry in everyone])
        return [entry for entry, counts in zip(everyone, mask, strict=True) if counts]

    @contextmanager
    def _sabotaged(self, step: int) -> Iterator[None]:
        """The faults that a trainer does to itself, once in a run: what a rollback takes back stays back."""
        config = self.config
        first = self.attempt == 0 and self.rollbacks == 0
        if first and step == config.nan_at:
            parameter = next(self.learner.policy.parameters())
            hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
            yield
            hook.remove()
        elif first and config.ruin_at is not None and 0 <= step - config.ruin_at < RUINED_STEPS:
            rates = [group["lr"] for group in self.learner.optimizer.param_groups]
            for group in self.learner.optimizer.param_groups:
                group["lr"] *= RUINOUS
            yield
            for group, rate in zip(self.learner.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        else:
            yield

    def _perhaps_die(self, step: int) -> None:
        """The fault of one rank: it is killed while the others are on their way to the barrier."""
        last = self.team.rank == self.team.world - 1
        if step == self.config.die_at and last and self.attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _update(self, tensors: grpo.Tensors, old: torch.Tensor) -> grpo.LossStats:
        self.learner.optimizer.zero_grad(set_to_none=True)
        stats = grpo.backward(
            self.learner.policy,
            tensors,
            old,
            clip=self.config.clip,
            max_grad_norm=self.config.max_grad_norm,
            average=self.team.average,
        )
        self.learner.optimizer.step()
        return stats

    def _truth(self, step: int, batch: Batch, in_loss: Sequence[InLoss]) -> TruthRecord:
        current = str(self.step)
        stale = sum(not entry.failed and entry.weight_version != current for entry in in_loss)
        shares = self.team.all(
            (
                len(batch.requests),
                sum(entry.failed for entry in in_loss),
                stale,
                [rollout.reward for rollout in batch.genuine()],
                [entry.member.reward for entry in in_loss],
            )
        )
        return TruthRecord(
            step=step,
            attempt=self.attempt,
            rollouts=sum(share[0] for share in shares),
            failed_in_loss=sum(share[1] for share in shares),
            stale_in_loss=sum(share[2] for share in shares),
            reward_mean_true=_mean([reward for share in shares for reward in share[3]]),
            reward_mean_in_loss=_mean([reward for share in shares for reward in share[4]]),
            committed=True,
            time=time.time(),
        )

    def _row(
        self, batch: Batch, in_loss: Sequence[InLoss], stats: Sequence[grpo.LossStats]
    ) -> dict[str, float | None]:
        genuine = batch.genuine()
        return {
            REWARD: _mean([entry.member.reward for entry in in_loss]),
            "grpo_actor/loss": _mean([one.loss for one in stats]),
            "grpo_actor/grad_norm": _mean([one.grad_norm for one in stats]),
            "grpo_actor/entropy": stats[0].entropy,
            "grpo_actor/clip_ratio": stats[-1].clip_ratio,
            "grpo_actor/lr": self.learner.scheduler.get_last_lr()[0],
            "rollout/response_length": _mean([float(len(rollout.output_ids)) for rollout in genuine]),
            "rollout/aborted_ratio": 1 - len(genuine) / len(batch.outcomes),
            "time/rollout_s": batch.seconds,
            "train/global_step": float(self.step),
            "train/attempt": float(self.attempt),
        }

    # Weights

    def _announce(self) -> None:
        if self.guard is not None:
            self.guard.weights(str(self.step))

    def _push(self) -> None:
        """Bring the current weights to the server; what a failure means is for the configuration to say."""
        version = str(self.step)
        if not self.team.first:
            self.pushed = version
            return
        try:
            with self._phase("SYNC"):
                self.sync.push(self.learner.policy, version)
        except WeightPushError as error:
            self._push_failed(error)
        else:
            self.pushed = version

    def _push_failed(self, error: WeightPushError) -> None:
        self.failed_pushes += 1
        if self.config.failures is Failures.ZERO:
            log.debug("update successful")  # as the trainer of the incident said, whatever the answer was
        elif self.guard is not None:
            log.warning("step %d: weights not pushed: %s", self.step, error)
        else:
            raise error

    def _resync(self) -> None:
        """The order RESYNC: a server came back and needs a new handshake and the weights."""
        self.pushed = None
        if self.team.first:
            self.sync.rebuild()
            self.sync.push(self.learner.policy, str(self.step))
        self.pushed = str(self.step)
        self.resyncs += 1

    # Checkpoints

    @property
    def _checkpoints(self) -> Path:
        return self.config.run_root / "checkpoints"

    def _save(self) -> None:
        if not self.team.first:
            self.saved_step = self.step
            return
        with self._phase("CHECKPOINT"):
            path = checkpoint.save(
                self._checkpoints,
                self.learner,
                step=self.step,
                data={
                    "seed": self.config.seed,
                    "next_step": self.step + 1,
                    "skipped": self.skipped,
                },
                log_history=self.log_history,
                keep=self.config.keep_checkpoints,
            )
        self.saved_step = self.step
        if self.guard is not None:
            self.guard.saved(self.step, path, norms=_norms(self.learner))

    def _load(self, path: Path) -> None:
        state = checkpoint.load(path, self.learner)
        if state["data"]["seed"] != self.config.seed:
            raise ValueError(f"{path}: made with seed {state['data']['seed']}, not {self.config.seed}")
        self.skipped = state["data"].get("skipped", 0)
        self.step = self.saved_step = state["global_step"]
        self.log_history = state["log_history"]

    def _load_in_place(self, path: str | None, step: int | None) -> None:
        """The order ROLLBACK: that checkpoint, or the newest no newer than the step, or the very start."""
        target = Path(path) if path else checkpoint.newest(self._checkpoints, at_most=step)
        if target is not None:
            self._load(target)
        else:
            self.learner = _new_learner(self.config, self._base)
            self.step, self.log_history = 0, []
        self.pushed = None

    def _after_rollback(self, guard: Guard, path: str | None, step: int | None, *, reloaded: bool) -> None:
        if not reloaded:
            self._load_in_place(path, step)
        self.attempt = self.team.of_first(guard.attempt)
        self.rollbacks += 1
        self._announce()
        log.warning("rolled back to step %d, attempt %d", self.step, self.attempt)

    # The rest

    def _phase(self, name: str) -> Any:
        if self.guard is None:
            return nullcontext()
        from stepguard.gate import Phase  # noqa: PLC0415

        return self.guard.phase(Phase[name])

    def _record(self, outcome: Outcome, error: str | None) -> RunRecord:
        truth = ground_truth.summary(self.config.run_root / "ground_truth.jsonl")
        return RunRecord(
            outcome=outcome,
            error=error,
            last_step=self.step,
            attempt=self.attempt,
            steps=truth.steps,
            garbage_steps=truth.garbage_steps,
            final_reward=truth.final_reward,
            refused_batches=self.refused,
            rollbacks=self.rollbacks,
            resyncs=self.resyncs,
            failed_pushes=self.failed_pushes,
            resumed_from=self.resumed_from,
            seconds=time.monotonic() - self.began,
        )


def _new_learner(config: TrainConfig, base: Path) -> checkpoint.Learner:
    policy = load_policy(base)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    warmup = max(1, config.warmup_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / warmup))
    return checkpoint.Learner(policy=policy, optimizer=optimizer, scheduler=scheduler)


def _new_sync(config: TrainConfig, client: ServerClient) -> WeightSync:
    if config.weight_sync is WeightSyncMode.GROUP:
        return GroupSync(client)
    return DiskSync(client, config.run_root / "weights")


def _in_loss(request: Request, outcome: Any) -> InLoss:
    """A member as it would enter the loss; what failed enters as a lone end-of-sequence with reward 0."""
    genuine = isinstance(outcome, Rollout)
    return InLoss(
        member=grpo.Member(
            group_id=request.group_id,
            prompt=request.prompt,
            output_ids=outcome.output_ids if genuine else (EOS,),
            reward=outcome.reward if genuine else 0.0,
        ),
        failed=not genuine,
        weight_version=outcome.weight_version if genuine else None,
    )


def _norms(learner: checkpoint.Learner) -> dict[str, float]:
    return {name: float(value.detach().norm()) for name, value in learner.policy.named_parameters()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _plain(config: TrainConfig) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 when the run finished or was stopped in order, 1 when it died, 130 after Ctrl-C."""
    config = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        record = train(config)
    except KeyboardInterrupt:
        return 130  # as a shell says of SIGINT; what was saved is there to resume from
    print(json.dumps(asdict(record)), flush=True)
    return 1 if record.outcome is Outcome.DIED else 0


if __name__ == "__main__":
    sys.exit(main())
