"""What a run is made of: the one configuration, and the command line that fills it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class WeightSyncMode(StrEnum):
    """How new weights reach the server."""

    DISK = "disk"  # a directory and /update_weights_from_disk: a restarted server can be served the same way
    GROUP = "group"  # a connection made once, as an NCCL group: it dies with the server


class Failures(StrEnum):
    """What becomes of a rollout that failed."""

    MASK = "mask"  # it is in no group baseline and no loss
    ZERO = "zero"  # it is scored 0 and trained on, as in the incident; failed weight pushes are ignored too


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """
    One run. The defaults learn the task from about 0.1 to above 0.9 in 150 steps.

    `run_root` holds everything that the run writes: `base/`, `weights/`, `checkpoints/`, `metrics.jsonl`,
    `ground_truth.jsonl`, `run_record.json`, `wandb/`.
    """

    server_url: str
    run_root: Path
    steps: int = 150
    seed: int = 0
    groups: int = 8  # prompts a step
    group_size: int = 8  # rollouts a prompt
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    inner_updates: int = 2  # optimizer updates on one batch; one gate for all of them
    clip: float = 0.2
    max_grad_norm: float = 1.0
    save_every: int = 20  # steps between checkpoints; 0: never
    keep_checkpoints: int | None = None  # None: all
    weight_sync: WeightSyncMode = WeightSyncMode.DISK
    failures: Failures = Failures.MASK
    guard: bool = True
    wandb: bool = True
    resume: bool = True  # from the newest complete checkpoint in run_root, where there is one
    request_timeout_s: float = 10.0
    graders: int = 0  # processes that grade the rollouts, as actors would; 0: the trainer itself does
    grade_timeout_s: float = 2.0  # of one grade, with a guard
    server_wait_s: float = 60.0  # how long to wait for the server at the start
    min_step_s: float = 0.0  # steps that are quicker wait; for watching
    raise_in_rollout: int | None = None  # at this step one trajectory of the batch raises, once
    die_at: int | None = None  # at the end of this step the last rank is killed, in the first attempt alone
    nan_at: int | None = None  # this step's loss is NaN, in the first attempt alone
    poison_at: int | None = None  # a prompt of this step's batch kills the server
    ruin_at: int | None = None  # from this step on, three go the wrong way at a high rate, likewise

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"group_size: {self.group_size}; a group needs at least 2 members for a baseline"
            )
        for name in ("steps", "groups", "inner_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; give 1 or more")


def parse_arguments(arguments: list[str] | None = None) -> TrainConfig:
    """The configuration out of a command line; exits with 2 and a message when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m stepguard_grpo.train",
        description="GRPO on a tiny Llama, with rollouts on an SGLang-compatible server.",
    )
    add = parser.add_argument
    add("--server-url", required=True, metavar="URL")
    add("--run-root", required=True, type=Path, metavar="DIR", help="where everything is written")
    for name, kind in (
        ("steps", int),
        ("seed", int),
        ("groups", int),
        ("group-size", int),
        ("save-every", int),
    ):
        add(f"--{name}", type=kind, default=_default(name), metavar="N")
    add("--inner-updates", type=int, default=_default("inner-updates"), metavar="N")
    add("--learning-rate", type=float, default=_default("learning-rate"), metavar="X")
    add("--keep-checkpoints", type=int, default=None, metavar="N", help="default: all")
    add("--weight-sync", type=WeightSyncMode, choices=list(WeightSyncMode), default=WeightSyncMode.DISK)
    add("--failures", type=Failures, choices=list(Failures), default=Failures.MASK)
    add("--guard", action=argparse.BooleanOptionalAction, default=True, help="default: with Stepguard")
    add("--wandb", action=argparse.BooleanOptionalAction, default=True, help="default: on, offline")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="default: from run-root")
    add("--request-timeout-s", type=float, default=_default("request-timeout-s"), metavar="S")
    add("--graders", type=int, default=_default("graders"), metavar="N", help="default: none, graded here")
    add("--grade-timeout-s", type=float, default=_default("grade-timeout-s"), metavar="S")
    add("--server-wait-s", type=float, default=_default("server-wait-s"), metavar="S")
    add("--min-step-s", type=float, default=0.0, metavar="S", help="slow quick steps down to this")
    add("--raise-in-rollout", type=int, default=None, metavar="STEP", help="fault: one trajectory raises")
    add("--die-at", type=int, default=None, metavar="STEP", help="fault: the last rank is killed")
    add("--nan-at", type=int, default=None, metavar="STEP", help="fault: a loss that is NaN")
    add("--poison-at", type=int, default=None, metavar="STEP", help="fault: a prompt that kills the server")
    add("--ruin-at", type=int, default=None, metavar="STEP", help="fault: steps that ruin the policy")
    try:
        return TrainConfig(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))


def _default(flag: str) -> object:
    return TrainConfig.__dataclass_fields__[flag.replace("-", "_")].default
