"""
After the daemon chose a relaunch's target: the framework's own resume finds that very checkpoint.

The resuming functions need GPUs and a cluster around them. Here they are cut out of the framework's source
and run as they stand, on folders of its layout; what they would load into workers is noted instead.
"""

from __future__ import annotations
import __future__

import ast
import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoints.runs_on_disk import KINDS
from frameworks.sources import Source, source
from stepguardd.checkpoints.layouts import Framework
from stepguardd.config import CheckpointSettings
from stepguardd.effects.rollback import prepare


def cut(found: Source, *names: str, **around: Any) -> dict[str, Any]:
    """These functions of a framework, as they stand, in a module made of `around`."""
    functions = []
    for name in names:
        function = found.function(name)
        function.decorator_list = []
        functions.append(function)
    module = ast.Module(body=list(functions), type_ignores=[])
    flags = __future__.annotations.compiler_flag
    namespace = {"os": os, "torch": torch, "Path": Path, **around}
    exec(compile(module, found.where, "exec", flags=flags, dont_inherit=True), namespace)
    return namespace


def resumes_verl(root: Path) -> int:
    manager = source("verl", "verl/utils/checkpoint/checkpoint_manager.py")
    finds = cut(manager, "find_latest_ckpt_path", "get_checkpoint_tracker_filename")
    base = cut(
        source("verl", "verl/trainer/ppo/v1/trainer_base.py"),
        "PPOTrainer._load_checkpoint",
        find_latest_ckpt_path=finds["find_latest_ckpt_path"],
        logger=logging.getLogger("verl"),
    )
    loaded: list[str] = []
    trainer = SimpleNamespace(
        config=SimpleNamespace(
            trainer=SimpleNamespace(
                resume_mode="auto", default_local_dir=str(root), del_local_ckpt_after_load=False
            )
        ),
        actor_rollout_wg=SimpleNamespace(load_checkpoint=lambda local_path, **_: loaded.append(local_path)),
        train_dataloader=SimpleNamespace(load_state_dict=lambda state: loaded.append(str(state["step"]))),
        use_critic=False,
        trainer_mode="sync",
    )
    base["_load_checkpoint"](trainer)
    step = int(trainer.global_steps)
    assert loaded == [str(root / f"global_step_{step}/actor"), str(step)]
    return step


def resumes_skyrl(root: Path) -> int:
    io = SimpleNamespace(exists=os.path.exists, open_file=open, list_dir=os.listdir, isdir=os.path.isdir)
    around = {"io": io, "GLOBAL_STEP_PREFIX": "global_step_", "logger": logging.getLogger("skyrl")}
    checks = cut(
        source("skyrl", "skyrl/train/utils/trainer_utils.py"),
        "validate_consistency_for_latest_checkpoint",
        "list_checkpoint_dirs",
        "extract_step_from_path",
        **around,
    )
    modes = SimpleNamespace(NONE=0, LATEST=1)
    loop = cut(
        source("skyrl", "skyrl/train/trainer.py"),
        "RayPPOTrainer.load_checkpoints",
        ResumeMode=modes,
        **{
            name: checks[name]
            for name in ("validate_consistency_for_latest_checkpoint", "extract_step_from_path")
        },
        **around,
    )
    loaded: list[str] = []
    trainer = SimpleNamespace(
        resume_mode=modes.LATEST,
        cfg=SimpleNamespace(trainer=SimpleNamespace(ckpt_path=str(root), ckpt_interval=5)),
        train_dataloader=SimpleNamespace(load_state_dict=lambda state: loaded.append(str(state["step"]))),
        dispatch=SimpleNamespace(load_checkpoint=lambda what, path, **_: loaded.append(path)),
        has_critic=False,
    )
    step, _ = loop["load_checkpoints"](trainer)
    assert loaded == [str(step), str(root / f"global_step_{step}/policy")]
    return int(step)


def resumes_trl(root: Path) -> int:
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(root))
    assert found is not None
    return int(found.rsplit("-", 1)[1])


RESUMES: dict[Framework, Callable[[Path], int]] = {
    Framework.VERL: resumes_verl,
    Framework.SKYRL: resumes_skyrl,
    Framework.TRL: resumes_trl,
}


@pytest.mark.parametrize("framework", RESUMES, ids=lambda framework: framework.value)
def test_it_resumes_from_what_the_relaunch_chose_and_not_from_what_is_broken(
    framework: Framework, tmp_path: Path
) -> None:
    kind = next(kind for kind in KINDS if kind.framework is framework)
    kind.build(tmp_path)
    kind.spoil(tmp_path, 30)
    assert RESUMES[framework](tmp_path) == 30, "by itself it takes the newest, NaN and all"
    settings = CheckpointSettings(dir=tmp_path, framework=framework.value)
    outcome = asyncio.run(prepare(settings, None, name="relaunch", rows=()))
    assert (outcome.ok, outcome.target_step) == (True, 20), outcome.detail
    assert RESUMES[framework](tmp_path) == 20


@pytest.mark.parametrize("framework", RESUMES, ids=lambda framework: framework.value)
def test_it_resumes_from_before_the_onset_of_a_rollback(framework: Framework, tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.framework is framework)
    kind.build(tmp_path)
    settings = CheckpointSettings(dir=tmp_path, framework=framework.value)
    outcome = asyncio.run(prepare(settings, 15, name="rollback", rows=()))
    assert (outcome.ok, outcome.target_step) == (True, 10), outcome.detail
    assert RESUMES[framework](tmp_path) == 10
