"""
What the guard costs in a real optimizer step: `python -m benchmarks.step`.

A GRPO step of a Llama on the GPU where torch sees one (bfloat16, 64 trajectories of 512 tokens), else a small
one on the processor. Bare and guarded steps (admit, before_step, after_step, with a process that judges) take
turns, alone and then beside the vetting of a checkpoint. The figures are medians: of both, their ratio, and
the time inside the guard's calls, which is the steadier one where the steps themselves vary.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.guard import JUDGE, go_page, started
from stepguard.guard import Guard
from stepguardd.checkpoints.layouts import Framework, find_checkpoints, open_folder, surroundings
from stepguardd.checkpoints.vetting import Depth, Vetter, VettingLimits

T = TypeVar("T")

GROUPS, MEMBERS = 8, 8
WARM_UP = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A step's size."""

    layers: int
    hidden: int
    vocabulary: int
    tokens: int
    rounds: int
    checkpoint_bytes: int


ON_GPU = Size(layers=16, hidden=1024, vocabulary=32_000, tokens=512, rounds=20, checkpoint_bytes=1 << 30)
ON_CPU = Size(layers=2, hidden=64, vocabulary=256, tokens=32, rounds=40, checkpoint_bytes=256 << 20)


class Trainer:
    """A policy and its optimizer."""

    def __init__(self, size: Size, device: str) -> None:
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=4 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.hidden // 64,
            num_key_value_heads=size.hidden // 64,
        )
        self.device = device
        self.policy = LlamaForCausalLM(config).to(device=device, dtype=torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)
        self.parameters = sum(parameter.numel() for parameter in self.policy.parameters())
        self._ids = torch.randint(size.vocabulary, (GROUPS * MEMBERS, size.tokens), device=device)

    def step(self, rewards: list[float], before: Callable[[], object]) -> float:
        """One update on these rewards; `before` is called right before the optimizer's step."""
        groups = torch.tensor(rewards).view(GROUPS, MEMBERS)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        weights = advantages.flatten().to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for rows in torch.arange(len(rewards), device=self.device).split(MEMBERS):
            logits = self.policy(input_ids=self._ids[rows]).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), self._ids[rows, 1:].flatten(), reduction="none"
            )
            loss = (losses.view(len(rows), -1).mean(1) * weights[rows]).mean()
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        before()
        self.optimizer.step()
        return float(norm)

    def settle(self) -> None:
        """Wait until the GPU has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def bare(trainer: Trainer, number: int) -> None:
    """A step as it is without Stepguard."""
    trainer.step(rewards_of(number), lambda: None)


def guarded(trainer: Trainer, guard: Guard, number: int) -> float:
    """The same with everything that a guarded loop calls; how long those calls took, in ms."""
    rewards, inside = rewards_of(number), 0

    def timed(call: Callable[[], T]) -> T:
        nonlocal inside
        began = time.perf_counter_ns()
        try:
            return call()
        finally:
            inside += time.perf_counter_ns() - began

    admission = timed(lambda: guard.admit(number, ["a"] * len(rewards), rewards=rewards))
    assert admission.ok, admission.reason
    norm = trainer.step(rewards, lambda: timed(lambda: guard.before_step(number)))
    mean = sum(rewards) / len(rewards)
    timed(lambda: guard.after_step(number, reward=mean, metrics={"grad_norm": norm}))
    return inside / 1e6


def rewards_of(number: int) -> list[float]:
    """Zeros and ones, neither all alike in a group."""
    return [float((number + 3 * member) % 2) for member in range(GROUPS * MEMBERS)]


class Vetting:
    """A checkpoint that is vetted again and again while somebody else steps."""

    def __init__(self, home: Path, size_bytes: int) -> None:
        run = home / "checkpoint-1"
        run.mkdir(parents=True)
        piece = torch.randn(1 << 20, dtype=torch.float32).to(torch.bfloat16).repeat(size_bytes // (1 << 21))
        save_file({"model.embed_tokens.weight": piece}, run / "model.safetensors")
        (run / "trainer_state.json").write_text("{}")
        self._home, self._over, self.rounds = home, threading.Event(), 0
        self._thread = threading.Thread(target=self._vet)

    def __enter__(self) -> Vetting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _vet(self) -> None:
        folder = open_folder(self._home, Framework.TRL)
        checkpoints = find_checkpoints(folder)
        around = surroundings(folder, checkpoints)
        with Vetter(VettingLimits(depth=Depth.FULL)) as vetter:
            while not self._over.is_set():
                assert vetter.vet(folder, checkpoints[0], around[0]).verdict == "good"
                self.rounds += 1


def spans_ms(trainer: Trainer, rounds: int, act: Callable[[int], object]) -> Iterator[float]:
    """How long each act takes, the GPU's work included; the first ones warm up and do not count."""
    for number in range(1, WARM_UP + rounds + 1):
        trainer.settle()
        began = time.perf_counter()
        act(number)
        trainer.settle()
        if number > WARM_UP:
            yield 1e3 * (time.perf_counter() - began)


def compare(trainer: Trainer, guard: Guard, rounds: int) -> tuple[float, float, float]:
    """Medians in ms, taking turns: bare, guarded, and inside the guard's calls."""
    inside: list[float] = []
    without, with_guard = [], []
    for one, other in zip(
        spans_ms(trainer, rounds, lambda number: bare(trainer, number)),
        spans_ms(trainer, rounds, lambda number: inside.append(guarded(trainer, guard, number))),
        strict=True,
    ):
        without.append(one)
        with_guard.append(other)
    return statistics.median(without), statistics.median(with_guard), statistics.median(inside[WARM_UP:])


def main() -> None:
    """Bare against guarded, then the same with a checkpoint vetted beside."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = ON_GPU if device == "cuda" else ON_CPU
    if device == "cpu":
        torch.set_num_threads(1)
    trainer = Trainer(size, device)
    where = torch.cuda.get_device_name() if device == "cuda" else "the processor, one thread"
    print(f"a step of {trainer.parameters / 1e6:.0f} M parameters on {where}, torch {torch.__version__}")
    print(
        f"{GROUPS * MEMBERS} trajectories of {size.tokens} tokens        bare   guarded       ratio    inside"
    )
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        run_dir = Path(folder) / "run"
        run_dir.mkdir()
        page = go_page(run_dir)
        judge = started(JUDGE, str(run_dir))
        try:
            with Guard(run_dir) as guard:
                for label, beside in (
                    ("nothing beside it", nullcontext()),
                    (
                        f"a checkpoint of {size.checkpoint_bytes >> 20} MiB is vetted",
                        Vetting(Path(folder) / "saved", size.checkpoint_bytes),
                    ),
                ):
                    with beside:
                        without, with_guard, inside = compare(trainer, guard, size.rounds)
                    print(
                        f"  {label:34} {without:7.2f} {with_guard:9.2f} ms {with_guard / without:7.3f}"
                        f" {inside:8.2f} ms",
                        flush=True,
                    )
                    if isinstance(beside, Vetting):
                        print(f"  it was vetted {beside.rounds} times in that time")
        finally:
            judge.kill()
            judge.wait()
            if judge.stdout is not None:
                judge.stdout.close()
            page.close()


if __name__ == "__main__":
    main()
