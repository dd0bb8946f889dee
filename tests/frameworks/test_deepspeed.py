"""StepguardCallback on TRL's real GRPOTrainer over the real DeepSpeed, which steps inside backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frameworks.sources import run_with

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What three runs came to: one with two refused batches, one held, one rolled back."""
    program = Path(__file__).with_name("on_deepspeed.py")
    folder = tmp_path_factory.mktemp("run")
    result: dict[str, Any] = run_with("deepspeed", str(program), str(folder), timeout_s=200)
    return result


def test_a_refused_batch_moves_neither_weights_nor_what_deepspeed_keeps(ran: dict[str, Any]) -> None:
    found = ran["refused"]
    assert (found["refused"], found["batches"]) == (2, [1, 2, 3, 4, 4, 4, 5, 6])
    assert found["kept_for_the_optimizer"] > 0, "DeepSpeed's optimizer has a state to compare"
    assert found["moved_by_a_step"]
    assert found["unmoved"]


def test_a_hold_during_generation_comes_before_the_weights_move(ran: dict[str, Any]) -> None:
    found = ran["held"]
    assert found["unmoved_while_held"]
    assert found["moved_before_the_hook"], "the reason for it: at transformers' own hook it is too late"
    assert found["acks"] == ["GO", "HOLD", "GO"]
    assert found["steps"] == [1, 2, 3, 4, 5]


def test_a_rollback_leaves_train_and_resumes_from_the_checkpoint(ran: dict[str, Any]) -> None:
    found = ran["rolled_back"]
    assert (found["path"], found["reloaded"]) == (True, False)
    assert (found["steps"], found["steps_again"]) == ([1, 2, 3, 4], [3, 4, 5, 6])
