"""The mix-in for verl, over verl's real trainer class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frameworks.sources import run_with, source

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What three steps came to: a good batch, a refused one, and a good one after a hold."""
    program = Path(__file__).with_name("on_verl.py")
    folder = tmp_path_factory.mktemp("run")
    result: dict[str, Any] = run_with(
        "verl",
        str(program),
        str(folder),
        timeout_s=150,
        VERL_USE_EXTERNAL_MODULES="stepguard.integrations.verl",
    )
    return result


def test_verl_registers_the_guarded_trainers_by_its_environment_alone(ran: dict[str, Any]) -> None:
    for mode, base in (
        ("sync", "PPOTrainerSync"),
        ("colocate_async", "PPOTrainerColocateAsync"),
        ("separate_async", "PPOTrainerSeparateAsync"),
    ):
        bases = ran["registered"][mode]
        assert bases[1] == "StepguardMixin"
        assert bases[2] == base
        assert "PPOTrainer" in bases


def test_a_refused_batch_updates_neither_critic_nor_actor(ran: dict[str, Any]) -> None:
    taken = ran["steps"]["1"]["done"]
    assert taken[-3:] == ["_update_critic", "_update_actor", "update_weights in SYNC"]
    refused = ran["steps"]["2"]["done"]
    assert "_compute_advantage" in refused
    assert not {"_update_critic", "_update_actor"} & {*refused}
    assert [batch["step"] for batch in ran["batches"]] == [1, 2, 3]
    assert [batch["reward"]["mean"] for batch in ran["batches"]] == [0.5, 0.0, 0.75]


def test_a_hold_waits_at_the_begin_of_the_step(ran: dict[str, Any]) -> None:
    assert ran["steps"]["1"]["held_s"] == 0
    assert ran["steps"]["3"]["held_s"] >= 30
    assert "_update_actor" in ran["steps"]["3"]["done"]


def test_only_steps_that_were_taken_are_reported(ran: dict[str, Any]) -> None:
    assert [(step["step"], step["reward"]) for step in ran["reported"]] == [(1, 0.5), (3, 0.75)]
    assert ran["reported"][0]["metrics"]["actor/grad_norm"] == 1.5


def test_what_the_mixin_reads_of_verl_is_there() -> None:
    """The rewards come from the transfer queue, which no CPU test fills: here its source is read."""
    base = source("verl", "verl/trainer/ppo/v1/trainer_base.py")
    for method in ("_compute_advantage", "_update_critic", "_update_actor"):
        assert base.parameters(f"PPOTrainer.{method}") == ["self", "batch", "metrics"]
    fields = base.calls("PPOTrainer._compute_advantage")
    assert "tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)" in fields
    assert '"uid"' in base.text
    assert '"rm_scores"' in base.text
    loop = base.calls("PPOTrainer.fit")
    order = [
        loop.index(f"self.{name}") for name in ("on_step_begin()", "_save_checkpoint()", "on_step_end()")
    ]
    assert order == sorted(order)
    assert 'f"global_step_{self.global_steps}"' in base.text
    tracking = source("verl", "verl/utils/tracking.py").text
    assert "VERL_FILE_LOGGER_PATH" in tracking
    assert "VERL_FILE_LOGGER_ROOT" in tracking
