"""
After the daemon chose a relaunch's target: the framework's own resume finds that very checkpoint.

The resuming functions need GPUs and a cluster around them. Here they are cut out of the framework's source
and run as they stand, on folders of its layout; what they would load into workers is noted instead.
"""

from __future__ import annotations
import __future__

import ast
import asyncio
import json
import logging
import os
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import load

from checkpoints.runs_on_disk import KINDS, Kind
from frameworks.sources import Source, source, version
from stepguardd.checkpoints.layouts import Framework
from stepguardd.config import CheckpointSettings
from stepguardd.effects.rollback import prepare


def cut(found: Source, *names: str, **around: Any) -> dict[str, Any]:
    """These functions and classes of a framework, as they stand, in a module made of `around`."""
    body: list[ast.stmt] = []
    for name in names:
        if name[0].isupper() and "." not in name:
            body += [node for node in found.tree.body if isinstance(node, ast.ClassDef) and node.name == name]
            continue
        function = found.function(name)
        function.decorator_list = []
        body.append(function)
    module = ast.Module(body=body, type_ignores=[])
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


def resumes_megatron(framework: str, root: Path) -> int:
    """slime and miles: each one's own `load_checkpoint` over Megatron's, which miles' wheel has with it."""
    common: list[Path] = []

    def is_distributed(folder: str) -> bool:
        return (Path(folder) / "metadata.json").is_file()

    def load_common(folder: str) -> Any:
        common.append(Path(folder))
        return torch.load(Path(folder) / "common.pt", weights_only=True)

    base = cut(
        source("miles", "megatron/training/checkpointing.py"),
        "_load_base_checkpoint",
        "_load_global_dist_base_checkpoint",
        "_get_non_persistent_iteration",
        "_get_checkpoint_format",
        "get_checkpoint_tracker_filename",
        "get_checkpoint_name",
        "find_checkpoint_rank_0",
        "read_metadata",
        "set_loaded_iteration",
        "isfile",
        MultiStorageClientFeature=SimpleNamespace(is_enabled=lambda: False),
        dist_checkpointing=SimpleNamespace(
            check_is_distributed_checkpoint=is_distributed, load_common_state_dict=load_common
        ),
        CheckpointType=SimpleNamespace(GLOBAL="global"),
        _NON_PERSISTENT_CKPT_SUBDIR="non_persistent",
        open_file=open,
        print_rank_0=print,
    )
    args = SimpleNamespace(
        load=str(root),
        non_persistent_global_ckpt_dir=None,
        non_persistent_ckpt_type=None,
        exit_on_missing_checkpoint=True,
        rollout_global_dataset=True,
        rollout_shuffle=False,
    )

    def megatrons(**_: Any) -> tuple[int, int]:
        base["_load_base_checkpoint"](args.load, args, rank0=True)
        return base["_LOADED_ITERATION"], 0

    theirs = cut(
        source(framework, f"{framework}/backends/megatron_utils/checkpoint.py"),
        "load_checkpoint",
        "_is_megatron_checkpoint",
        "_is_dir_nonempty",
        re=re,
        get_args=lambda: args,
        is_lora_enabled=lambda _: False,
        _load_checkpoint_megatron=megatrons,
    )
    step, _ = theirs["load_checkpoint"](None, None, None, {}, False)
    assert common == [root / f"iter_{step:07d}"]
    prompts = cut(
        source(framework, f"{framework}/rollout/data_source.py"),
        "RolloutDataSource.load",
        logger=logging.getLogger(framework),
    )
    before = SimpleNamespace(args=args, metadata={}, dataset=None)
    prompts["load"](before, step)  # the rollout that comes next, less one
    assert before.sample_offset == step
    return int(step)


def resumes_areal(root: Path) -> int:
    recover = source("areal", "areal/utils/recover.py")
    step_info = cut(source("areal", "areal/api/io_struct.py"), "StepInfo", dataclass=dataclass)["StepInfo"]
    paths = SimpleNamespace(
        get_recover_checkpoint_path=lambda *_, name: str(root / name / "recover_checkpoint")
    )
    handler = cut(
        recover,
        "RecoverHandler.load",
        "_load_checkpoint",
        "_normalize_recover_engines",
        logger=logging.getLogger("areal"),
        Saver=paths,
        SaveLoadMeta=SimpleNamespace,
        InValidRecoverInfo=AssertionError,  # areal would start from scratch
        RecoverInfo=SimpleNamespace(
            load=lambda place: cut(
                recover,
                "RecoverInfo.load",
                json=json,
                pickle=pickle,
                dist=torch.distributed,
                StepInfo=step_info,
                InValidRecoverInfo=AssertionError,
                logger=logging.getLogger("areal"),
            )["load"](SimpleNamespace, place)
        ),
    )
    weights: dict[str, Any] = {"weight": torch.zeros(64, dtype=torch.bfloat16)}
    prompts: list[int] = []
    takes = SimpleNamespace(load_state_dict=lambda state: None)
    trainer = SimpleNamespace(
        config=SimpleNamespace(
            mode="on", experiment_name="e", trial_name="t", fileroot=str(root), no_load_optim=False
        ),
        freq_ctl=takes,
        recover_info_path=lambda *_: str(root / "recover_info"),
        _ensure_recover_supported=lambda engine: None,
        _normalize_recover_engines=handler["_normalize_recover_engines"],
        _load_checkpoint=lambda engine, name: handler["_load_checkpoint"](trainer, engine, name=name),
    )
    engine = SimpleNamespace(load=lambda meta: load(weights, checkpoint_id=meta.path, no_dist=True))
    data = SimpleNamespace(load_state_dict=prompts.append)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of a load in one process
        info = handler["load"](trainer, engine, takes, takes, takes, data)
    step = int(info.last_step_info.global_step)
    assert prompts == [step]
    assert weights["weight"][0] == step, "the one slot has the weights of the step that it says"
    return step


def resumes_openrlhf(root: Path) -> int:
    engine = cut(
        source("deepspeed", "deepspeed/runtime/engine.py"),
        "load_checkpoint",
        "_get_all_ckpt_names",
        "_get_ckpt_name",
        logger=logging.getLogger("deepspeed"),
    )

    class Engine:
        """DeepSpeed's, with the loading of what was found left out."""

        checkpoint_mp_rank = 0
        load_checkpoint = engine["load_checkpoint"]
        _get_all_ckpt_names = engine["_get_all_ckpt_names"]
        _get_ckpt_name = engine["_get_ckpt_name"]

        def __getattr__(self, question: str) -> Any:
            return lambda: False  # no ZeRO, no offload, no universal checkpoint

        def _load_checkpoint(self, place: str, tag: str, **_: Any) -> Any:
            (found,) = self._get_all_ckpt_names(place, tag)
            return found, torch.load(found, weights_only=True)

    purelib = f"openrlhf-{version('openrlhf')}.data/purelib/openrlhf"
    strategy = cut(
        source("openrlhf", f"{purelib}/utils/deepspeed/deepspeed.py"),
        "load_ckpt",
        deepspeed=SimpleNamespace(DeepSpeedEngine=Engine),
    )
    steps = []
    for role in ("actor", "critic"):
        where = source("openrlhf", f"{purelib}/trainer/ray/ppo_{role}.py")
        assert f"os.path.join(args.ckpt.path, '_{role}')" in where.calls(), where.where
        path, states = strategy["load_ckpt"](SimpleNamespace(print=print), Engine(), str(root / f"_{role}"))
        assert Path(path).parent == root / f"_{role}/global_step{states['step']}"
        steps.append(int(states["step"]))
    assert steps[0] == steps[1], "actor and critic resume from the same step"
    return steps[0]


def resumes_prime_rl(root: Path) -> int:
    paths = cut(
        source("prime-rl", "src/prime_rl/utils/pathing.py"),
        "resolve_latest_ckpt_step",
        "get_all_ckpt_steps",
        "get_step_path",
        get_logger=lambda: logging.getLogger("prime-rl"),
    )
    step = paths["resolve_latest_ckpt_step"](root)
    for part, file in (("trainer", ".metadata"), ("orchestrator", "progress.pt")):
        where = cut(
            source("prime-rl", f"src/prime_rl/{part}/ckpt.py"),
            "CheckpointManager.get_ckpt_path",
            get_step_path=paths["get_step_path"],
        )
        assert (where["get_ckpt_path"](SimpleNamespace(ckpt_dir=root), step) / file).is_file()
    return int(step)


RESUMES: dict[Framework, Callable[[Path], int]] = {
    Framework.VERL: resumes_verl,
    Framework.SKYRL: resumes_skyrl,
    Framework.TRL: resumes_trl,
    Framework.SLIME: partial(resumes_megatron, "slime"),
    Framework.MILES: partial(resumes_megatron, "miles"),
    Framework.AREAL: resumes_areal,
    Framework.OPENRLHF: resumes_openrlhf,
    Framework.PRIME_RL: resumes_prime_rl,
}


def kind_of(framework: Framework) -> Kind:
    """What writes its folders; miles' are slime's."""
    written = Framework.SLIME if framework is Framework.MILES else framework
    return next(kind for kind in KINDS if kind.framework is written)


@pytest.mark.parametrize("framework", RESUMES, ids=lambda framework: framework.value)
def test_it_resumes_from_what_the_relaunch_chose_and_not_from_what_is_broken(
    framework: Framework, tmp_path: Path
) -> None:
    kind = kind_of(framework)
    kind.build(tmp_path)
    kind.spoil(tmp_path, 30)
    assert RESUMES[framework](tmp_path) == 30, "by itself it takes the newest, NaN and all"
    settings = CheckpointSettings(dir=tmp_path, framework=framework.value)
    outcome = asyncio.run(prepare(settings, None, name="relaunch", rows=()))
    assert (outcome.ok, outcome.target_step) == (True, 20), outcome.detail
    assert RESUMES[framework](tmp_path) == 20


@pytest.mark.parametrize("framework", RESUMES, ids=lambda framework: framework.value)
def test_it_resumes_from_before_the_onset_of_a_rollback(framework: Framework, tmp_path: Path) -> None:
    kind = kind_of(framework)
    kind.build(tmp_path)
    settings = CheckpointSettings(dir=tmp_path, framework=framework.value)
    outcome = asyncio.run(prepare(settings, 15, name="rollback", rows=()))
    assert (outcome.ok, outcome.target_step) == (True, 10), outcome.detail
    assert RESUMES[framework](tmp_path) == 10
