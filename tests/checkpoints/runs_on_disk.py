"""
Checkpoint folders as the frameworks write them, with files written by torch and safetensors themselves.

Each `Kind` writes a run's checkpoints, spoils one, and cuts one short at the file that its framework writes
last.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from stepguardd.checkpoints.layouts import (
    PINNED,
    QUARANTINE,
    Framework,
    custom_layout,
    find_checkpoints,
    open_folder,
)
from stepguardd.checkpoints.layouts import Folder as CheckpointFolder
from stepguardd.checkpoints.pinning import pin

STEPS = (10, 20, 30)


def tensor(step: int, *, finite: bool = True) -> torch.Tensor:
    values = torch.full((64,), float(step), dtype=torch.bfloat16)
    if not finite:
        values[7] = float("nan")
    return values


def torch_file(path: Path, step: int, *, finite: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": tensor(step, finite=finite), "step": step}, path)


def safetensors_file(path: Path, step: int, *, finite: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": tensor(step, finite=finite), "ids": torch.arange(8)}, path)


def json_file(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def dcp_folder(path: Path, step: int, *, finite: bool = True) -> None:
    """A torch distributed checkpoint, by torch's own writer."""
    from torch.distributed.checkpoint import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"weight": tensor(step, finite=finite), "step": step}, checkpoint_id=path, no_dist=True)


def verl(root: Path, step: int) -> None:
    home = root / f"global_step_{step}"
    for rank in (0, 1):
        for kind in ("model", "optim", "extra_state"):
            torch_file(home / f"actor/{kind}_world_size_2_rank_{rank}.pt", step)
    json_file(home / "actor/fsdp_config.json", {"world_size": 2})
    torch_file(home / "data.pt", step)
    (root / "latest_checkpointed_iteration.txt").write_text(str(step))


def slime(root: Path, step: int) -> None:
    home = root / f"iter_{step:07d}"
    dcp_folder(home, step)
    torch_file(home / "common.pt", step)
    json_file(home / "metadata.json", {"sharded_backend": "torch_dist"})
    (root / "rollout").mkdir(exist_ok=True)
    torch.save({"sample_offset": step}, root / f"rollout/global_dataset_state_dict_{step}.pt")
    (root / "latest_checkpointed_iteration.txt").write_text(str(step))


def areal(root: Path, step: int) -> None:
    """One slot; what Stepguard keeps of the saves before it is its pins."""
    if (root / "recover_info").is_dir():
        folder = open_folder(root, Framework.AREAL)
        pin(folder, next(c for c in find_checkpoints(folder) if not c.pinned))
    dcp_folder(root / "default/recover_checkpoint", step)
    json_file(
        root / "recover_info/step_info.json",
        {"epoch": 0, "epoch_step": step, "global_step": step, "steps_per_epoch": 100},
    )
    for name in ("saver", "evaluator", "stats_logger", "checkpoint"):
        json_file(root / f"recover_info/{name}_info.json", {"last_step": step})
    (root / "recover_info/dataloader_info.pkl").write_bytes(b"\x80\x04K" + bytes([step]) + b".")


def trl(root: Path, step: int) -> None:
    home = root / f"checkpoint-{step}"
    safetensors_file(home / "model.safetensors", step)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch_file(home / name, step)
    json_file(home / "trainer_state.json", {"global_step": step})


def openrlhf(root: Path, step: int) -> None:
    for role in ("_actor", "_critic"):
        home = root / f"{role}/global_step{step}"
        torch_file(home / "mp_rank_00_model_states.pt", step)
        for rank in (0, 1):
            torch_file(home / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", step)
        (root / role / "latest").write_text(f"global_step{step}")


def prime_rl(root: Path, step: int) -> None:
    dcp_folder(root / f"step_{step}/trainer", step)
    torch_file(root / f"step_{step}/orchestrator/progress.pt", step)


def skyrl(root: Path, step: int) -> None:
    home = root / f"global_step_{step}"
    for kind in ("model", "optim", "extra_state"):
        torch_file(home / f"policy/{kind}_world_size_1_rank_0.pt", step)
    torch_file(home / "data.pt", step)
    torch_file(home / "trainer_state.pt", step)
    (root / "latest_ckpt_global_step.txt").write_text(str(step))


def nemo_rl(root: Path, step: int) -> None:
    home = root / f"step_{step}"
    json_file(home / "training_info.json", {"step": step})
    (home / "config.yaml").write_text("grpo: {}\n")
    dcp_folder(home / "policy/weights", step)
    dcp_folder(home / "policy/optimizer", step)
    torch_file(home / "train_dataloader.pt", step)


def roll(root: Path, step: int) -> None:
    home = root / f"checkpoint-{step}"
    safetensors_file(home / "model.safetensors", step)
    dcp_folder(home / "dcp", step)
    json_file(home / "pipeline/worker_state_pipeline.json", {"step": step})
    torch_file(home / "pipeline/rng_state_pipeline.pth", step)


def dcp(root: Path, step: int) -> None:
    dcp_folder(root / f"ckpt-{step}", step)


def custom(root: Path, step: int) -> None:
    safetensors_file(root / f"runs/at-{step}/model.safetensors", step)
    (root / "newest").write_text(str(step))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """
    One framework on disk.

    write      writes one step and moves the marker to it.
    home       a step's folder.
    weights    a file with weights in it, under that folder, and how to write it.
    last       a file that the framework writes late, so that a cut-off save lacks it.
    """

    framework: Framework
    write: Callable[[Path, int], None]
    home: str
    weights: str
    last: str
    markers: tuple[str, ...] = ()

    @property
    def slot(self) -> bool:
        return self.framework is Framework.AREAL

    def build(self, root: Path, steps: tuple[int, ...] = STEPS) -> None:
        root.mkdir(parents=True, exist_ok=True)
        for step in steps:
            self.write(root, step)

    def open(self, root: Path) -> CheckpointFolder:
        if self.framework is Framework.CUSTOM:
            return open_folder(root, custom=custom_layout("runs/at-{step}", "newest"))
        return open_folder(root)

    def folder(self, root: Path, step: int) -> Path:
        if self.slot and step != STEPS[-1]:
            return root / PINNED / f"step-{step}"
        return root / self.home.format(step=step)

    def spoil(self, root: Path, step: int) -> None:
        """One number among the weights becomes NaN; everything else stays as it is."""
        path = self.folder(root, step) / self.weights
        before = path.stat()
        if path.suffix == ".safetensors":
            safetensors_file(path, step, finite=False)
        elif path.name.endswith(".pt"):
            torch_file(path, step, finite=False)
        else:
            shutil.rmtree(path)
            dcp_folder(path, step, finite=False)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            for file in (*path.iterdir(),):
                os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    def cut_short(self, root: Path, step: int) -> None:
        (self.folder(root, step) / self.last).unlink()


KINDS = (
    Kind(
        framework=Framework.VERL,
        write=verl,
        home="global_step_{step}",
        weights="actor/model_world_size_2_rank_1.pt",
        last="data.pt",
        markers=("latest_checkpointed_iteration.txt",),
    ),
    Kind(
        framework=Framework.SLIME,
        write=slime,
        home="iter_{step:07d}",
        weights="common.pt",
        last="metadata.json",
        markers=("latest_checkpointed_iteration.txt",),
    ),
    Kind(
        framework=Framework.AREAL,
        write=areal,
        home=".",
        weights="default/recover_checkpoint",
        last="recover_info/dataloader_info.pkl",
    ),
    Kind(
        framework=Framework.TRL,
        write=trl,
        home="checkpoint-{step}",
        weights="model.safetensors",
        last="trainer_state.json",
    ),
    Kind(
        framework=Framework.OPENRLHF,
        write=openrlhf,
        home="_actor/global_step{step}",
        weights="mp_rank_00_model_states.pt",
        last="bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        markers=("_actor/latest", "_critic/latest"),
    ),
    Kind(
        framework=Framework.PRIME_RL,
        write=prime_rl,
        home="step_{step}",
        weights="trainer",
        last="orchestrator/progress.pt",
    ),
    Kind(
        framework=Framework.SKYRL,
        write=skyrl,
        home="global_step_{step}",
        weights="policy/model_world_size_1_rank_0.pt",
        last="trainer_state.pt",
        markers=("latest_ckpt_global_step.txt",),
    ),
    Kind(
        framework=Framework.NEMO_RL,
        write=nemo_rl,
        home="step_{step}",
        weights="policy/weights",
        last="train_dataloader.pt",
    ),
    Kind(
        framework=Framework.ROLL,
        write=roll,
        home="checkpoint-{step}",
        weights="dcp",
        last="pipeline/worker_state_pipeline.json",
    ),
    Kind(framework=Framework.DCP, write=dcp, home="ckpt-{step}", weights=".", last=".metadata"),
    Kind(
        framework=Framework.CUSTOM,
        write=custom,
        home="runs/at-{step}",
        weights="model.safetensors",
        last="model.safetensors",
        markers=("newest",),
    ),
)


def contents(root: Path, *, quarantine: bool = False) -> dict[str, bytes | str]:
    """Every file and link under a folder: path -> bytes, or the link's target."""
    found: dict[str, bytes | str] = {}
    for folder, directories, files in os.walk(root):
        here = Path(folder)
        if here == root and not quarantine and QUARANTINE in directories:
            directories.remove(QUARANTINE)
        for name in (*files, *(d for d in directories if (here / d).is_symlink())):
            path = here / name
            key = path.relative_to(root).as_posix()
            found[key] = str(path.readlink()) if path.is_symlink() else path.read_bytes()
    return found
