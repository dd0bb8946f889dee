"""The trainer without a guard: it learns, it resumes bit for bit, it does what the incident's trainer did."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stepguard_grpo import checkpoint, ground_truth
from stepguard_grpo.config import Failures, TrainConfig, parse_arguments
from stepguard_grpo.local import LocalServer
from stepguard_grpo.rollout import Rollout, RolloutError
from stepguard_grpo.task import Request
from stepguard_grpo.train import Outcome, RunRecord, train

SMALL: dict[str, Any] = {"groups": 4, "group_size": 4, "save_every": 0, "guard": False, "wandb": False}


def config(run_root: Path, **more: Any) -> TrainConfig:
    return TrainConfig(**({"server_url": "http://127.0.0.1:9", "run_root": run_root} | SMALL | more))


class FaultyServer(LocalServer):
    """Does something once, right after it took a version."""

    def __init__(self, base_model: Path, **at_step: Callable[[FaultyServer], None]) -> None:
        super().__init__(base_model)
        self.at_step = at_step
        self.fired: list[str] = []

    def push(self, policy: Any, version: str) -> None:
        super().push(policy, version)
        act = self.at_step.get(f"after_{version}")
        if act is not None and not self.fired:
            self.fired.append(version)
            act(self)


def go_down(server: LocalServer) -> None:
    server.down = True


def run(server: LocalServer, run_root: Path, **more: Any) -> RunRecord:
    return train(config(run_root, **more), sampler=server, sync=server)


def truths(run_root: Path) -> list[ground_truth.TruthRecord]:
    return ground_truth.read(run_root / "ground_truth.jsonl")


def weights(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(path / "model.safetensors")
    return loaded


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_reward_rises(base_model: Path, tmp_path: Path) -> None:
    record = run(LocalServer(base_model), tmp_path, steps=25, groups=8, group_size=8)
    rewards = [truth.reward_mean_true or 0.0 for truth in truths(tmp_path)]
    assert record.outcome is Outcome.FINISHED
    assert (record.steps, record.garbage_steps) == (25, 0)
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5


def test_resumed_is_bit_for_bit_what_it_would_have_been(base_model: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(LocalServer(base_model), straight, steps=20, save_every=10)
    run(LocalServer(base_model), broken, steps=10, save_every=10)
    resumed = run(LocalServer(base_model), broken, steps=20, save_every=10)
    assert (resumed.resumed_from, resumed.last_step) == (10, 20)
    first, second = (root / "checkpoints" / "checkpoint-20" for root in (straight, broken))
    assert same_bits(weights(first), weights(second))
    for name in ("optimizer.pt", "scheduler.pt"):
        one, other = (torch.load(path / name, weights_only=True) for path in (first, second))
        assert str(one) == str(other), name
    rewards = [[truth.reward_mean_true for truth in truths(root)] for root in (straight, broken)]
    assert rewards[0] == rewards[1]


def test_another_seed_is_another_run(base_model: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        run(LocalServer(base_model), tmp_path / str(seed), steps=2, seed=seed)
    first, second = ([truth.reward_mean_true for truth in truths(tmp_path / seed)] for seed in "01")
    assert first != second


def test_a_trainer_that_scores_failures_0_trains_on_garbage(base_model: Path, tmp_path: Path) -> None:
    """Incident A: the server dies, every reward is 0, the pushes fail unseen, the steps go on."""
    server = FaultyServer(base_model, after_3=go_down)
    record = run(server, tmp_path, steps=8, failures=Failures.ZERO)
    assert server.fired == ["3"]
    assert (record.outcome, record.steps, record.garbage_steps) == (Outcome.FINISHED, 8, 5)
    assert record.failed_pushes == 5
    after = truths(tmp_path)[3:]
    assert [truth.failed_in_loss for truth in after] == [16] * 5
    assert [truth.reward_mean_true for truth in after] == [None] * 5
    assert [truth.reward_mean_in_loss for truth in after] == [0.0] * 5


def test_a_server_back_with_base_weights_is_garbage_too(base_model: Path, tmp_path: Path) -> None:
    """Incident A, later: restarted servers never got the weights, and the push said success."""

    def come_back_wrong(server: LocalServer) -> None:
        server.restart()
        server.frozen = True

    server = FaultyServer(base_model, after_3=come_back_wrong)
    record = run(server, tmp_path, steps=6, failures=Failures.ZERO)
    assert server.fired == ["3"]
    assert record.garbage_steps == 3
    assert [truth.stale_in_loss for truth in truths(tmp_path)] == [0, 0, 0, 16, 16, 16]


def test_without_guard_masking_ends_with_the_server(base_model: Path, tmp_path: Path) -> None:
    record = run(FaultyServer(base_model, after_3=go_down), tmp_path, steps=8)
    assert (record.outcome, record.steps, record.garbage_steps) == (Outcome.DIED, 3, 0)
    assert json.loads((tmp_path / "run_record.json").read_text()) == asdict(record)


def test_without_guard_one_raising_trajectory_ends_the_run(base_model: Path, tmp_path: Path) -> None:
    """Incident D: asyncio.gather without isolation."""
    record = run(LocalServer(base_model), tmp_path, steps=8, raise_in_rollout=3, failures=Failures.ZERO)
    assert (record.outcome, record.last_step) == (Outcome.DIED, 2)
    assert record.error is not None
    assert record.error.startswith("ValueError: trajectory 0 of step 3")


class OneFails(LocalServer):
    """The third member of each batch fails."""

    async def __call__(self, request: Request) -> Rollout:
        if request.index == 2:
            raise RolloutError("made to fail")
        return await super().__call__(request)


@pytest.mark.parametrize(("failures", "garbage"), [(Failures.MASK, 0), (Failures.ZERO, 3)])
def test_one_failed_rollout_is_masked_or_poisons(
    base_model: Path, tmp_path: Path, failures: Failures, garbage: int
) -> None:
    record = run(OneFails(base_model), tmp_path, steps=3, failures=failures)
    assert (record.steps, record.garbage_steps) == (3, garbage)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout/aborted_ratio"] for row in rows] == [1 / 16] * 3
    assert [row["train/global_step"] for row in rows] == [1, 2, 3]


def test_final_reward_counts_a_step_without_a_genuine_rollout_as_0(tmp_path: Path) -> None:
    path = tmp_path / "ground_truth.jsonl"
    for step in range(1, 16):
        record = ground_truth.TruthRecord(
            step=step,
            attempt=0,
            rollouts=4,
            failed_in_loss=4 if step > 10 else 0,
            stale_in_loss=1 if step == 2 else 0,
            reward_mean_true=None if step > 10 else 0.8,
            reward_mean_in_loss=0.5,
            committed=True,
            time=0.0,
        )
        ground_truth.append(path, record)
    path.write_text(path.read_text() + '{"step": 16, "att')  # torn by a kill
    summary = ground_truth.summary(path)
    assert (summary.steps, summary.garbage_steps, summary.final_reward) == (15, 6, pytest.approx(0.4))
    ground_truth.append(path, record)
    assert ground_truth.summary(path).steps == 16
    assert ground_truth.summary(tmp_path / "nothing").final_reward is None


# Checkpoints


@pytest.fixture
def saved(base_model: Path, tmp_path: Path) -> Path:
    run(LocalServer(base_model), tmp_path, steps=6, save_every=2, keep_checkpoints=2)
    return tmp_path / "checkpoints"


def test_checkpoints_have_hugging_face_s_layout_and_rotate(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert sorted(path.name for path in (saved / "checkpoint-6").iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    ]
    state = json.loads((saved / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert state["data"] == {"seed": 0, "next_step": 7, "skipped": 0}
    assert [row["step"] for row in state["log_history"]] == [1, 2, 3, 4, 5, 6]


def test_a_directory_without_its_last_file_is_no_checkpoint(saved: Path) -> None:
    (saved / "checkpoint-6" / "trainer_state.json").unlink()
    assert checkpoint.newest(saved) == saved / "checkpoint-4"
    assert checkpoint.newest(saved, at_most=3) is None


def test_leftovers_of_a_killed_save_are_no_checkpoint(saved: Path) -> None:
    (saved / ".new-8").mkdir()
    (saved / ".new-8" / "trainer_state.json").write_text("{}")
    assert checkpoint.newest(saved) == saved / "checkpoint-6"


def test_a_checkpoint_of_another_seed_is_refused(base_model: Path, saved: Path) -> None:
    record = run(LocalServer(base_model), saved.parent, steps=8, seed=5)
    assert record.outcome is Outcome.DIED
    assert record.error is not None
    assert "made with seed 0, not 5" in record.error


# The command line


def test_the_command_line_fills_the_configuration(tmp_path: Path) -> None:
    command = ["--server-url", "http://s", "--run-root", str(tmp_path), "--failures", "zero", "--no-guard"]
    parsed = parse_arguments([*command, "--weight-sync", "group", "--steps", "9", "--raise-in-rollout", "4"])
    assert (parsed.failures, parsed.guard, parsed.weight_sync, parsed.steps) == ("zero", False, "group", 9)
    assert parsed.raise_in_rollout == 4
    assert parse_arguments(command[:4]) == TrainConfig(server_url="http://s", run_root=tmp_path)


@pytest.mark.parametrize("wrong", [["--group-size", "1"], ["--steps", "0"], ["--failures", "ignore"]])
def test_wrong_use_is_one_line_and_2(
    tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--server-url", "http://s", "--run-root", str(tmp_path), *wrong])
    assert caught.value.code == 2
    assert wrong[0].removeprefix("--").replace("-", "_") in capsys.readouterr().err.replace("-", "_")
