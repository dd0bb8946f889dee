"""
A slime job from its launch script to its end, on a CPU: `slime_job.py SLIME ARGUMENT ...`.

SLIME is a checkout, the arguments are slime's. Its own are: the arguments' parser, the driver (`train.py`),
RolloutManager with data source, rollout function, conversion and split, RayTrainGroup, SGLangEngine and the
router. Standing in: Ray, whose calls are plain calls here; six names of SGLang; and for Megatron a small
policy, whose step calls the hook where slime's train_one_step does. SAVE/steps.jsonl has a line for each
step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from stepguard_grpo.model import load_policy, save_policy

# Ray, as plain calls


class Call:
    """`handle.method.remote(...)` calls at once, and what it returned is what `ray.get` gets."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


class Handle:
    """An actor in this process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return Call(getattr(self._actor, name))


class ActorClass:
    """What `ray.remote` makes of a class."""

    def __init__(self, made: type) -> None:
        self._made = made

    def options(self, **_: Any) -> ActorClass:
        return self

    def remote(self, *args: Any, **kwargs: Any) -> Handle:
        return Handle(self._made(*args, **kwargs))


def remote(*made: type, **_: Any) -> Any:
    return ActorClass(made[0]) if made else ActorClass


def module(name: str, **names: Any) -> None:
    """Put a module in place of one that is not here."""
    made = ModuleType(name)
    vars(made).update(names)
    made.__path__ = []
    sys.modules[name] = made
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, made)


def put_ray_in_place() -> None:
    module("ray", remote=remote, get=lambda what: what, put=lambda what: what, kill=lambda *_, **__: None)
    module("ray.actor", ActorHandle=Handle)
    module("ray.util")
    module("ray.util.scheduling_strategies", PlacementGroupSchedulingStrategy=SimpleNamespace)
    module("ray.util.placement_group", PlacementGroup=object, placement_group=None)


# SGLang, of which the job needs names alone: its servers are elsewhere


@dataclasses.dataclass
class ServerArgs:
    """Of SGLang's arguments those that slime reads again."""

    node_rank: int = 0
    enable_memory_saver: bool = False
    host: str = ""
    port: int = 0

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        for name in ("dp", "pp", "ep", "moe-dp"):
            parser.add_argument(f"--{name}-size", type=int, default=1)


def put_sglang_in_place() -> None:
    for name in ("sglang", "sglang.srt"):
        module(name)
    kinds = ("WEIGHTS", "KV_CACHE", "CUDA_GRAPH")
    module("sglang.srt.constants", **{f"GPU_MEMORY_TYPE_{kind}": kind.lower() for kind in kinds})
    module("sglang.srt.server_args", ServerArgs=ServerArgs)
    module("sglang.srt.utils", kill_process_tree=lambda pid: None)


# Megatron

FAILS = 5
MARKER = "latest_checkpointed_iteration.txt"
MEGATRONS: dict[str, Any] = {"fp16": False}


class Trainer:
    """In place of MegatronTrainRayActor: one rank, one policy, one step a rollout."""

    def __init__(self, world_size: int, rank: int, master_addr: Any, master_port: Any) -> None:
        self.version = 0

    def get_master_addr_and_port(self) -> tuple[str, int]:
        return "127.0.0.1", 0

    def init(self, args: Any, role: str, **_: Any) -> int:
        from slime.utils.misc import load_function

        self.args = args
        self.hook = load_function(args.custom_megatron_before_train_step_hook_path)
        self.policy = load_policy(Path(args.hf_checkpoint))
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=args.lr)
        marker = Path(args.load or ".") / MARKER
        if not marker.is_file():
            return 0
        saved = int(marker.read_text())
        held = torch.load(self._home(Path(args.load), saved) / "common.pt", weights_only=True)
        self.policy.load_state_dict(held["policy"])
        self.optimizer.load_state_dict(held["optimizer"])
        return saved + 1

    def set_rollout_manager(self, manager: Any) -> None:
        manager.set_train_parallel_config.remote(
            {"dp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1, "cp_size": 1}
        )

    def train(self, rollout_id: int, data: Sequence[Any], external_data: Any = None) -> None:
        rollout = data[0].inner
        self.optimizer.zero_grad()
        self.hook(self.args, rollout_id, 0, [self.policy], self.optimizer, None)
        loss = -torch.stack(
            [
                advantage * self._log_prob(tokens, length, mask)
                for tokens, length, mask, advantage in zip(
                    rollout["tokens"],
                    rollout["response_lengths"],
                    rollout["loss_masks"],
                    rollout["rewards"],
                    strict=True,
                )
            ]
        ).mean()
        loss.backward()
        self.optimizer.step()
        row = {
            "rollout": rollout_id,
            "weights": self.version,
            "masked": sum(not any(mask) for mask in rollout["loss_masks"]),
        }
        with (Path(self.args.save) / "steps.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _log_prob(self, tokens: Any, length: int, mask: Any) -> torch.Tensor:
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(1, -1)
        scores = torch.log_softmax(self.policy(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
        chosen = scores.gather(-1, ids[0, 1:].unsqueeze(-1)).squeeze(-1)[-length:]
        return (chosen * torch.as_tensor(mask, dtype=torch.float32)).sum()

    def update_weights(self) -> None:
        """As UpdateWeightFromDisk does; RayTrainGroup has the engines load it."""
        self.version += 1
        folder = Path(self.args.update_weight_disk_dir) / f"weight_v{self.version:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        save_policy(self.policy, folder)

    def save_model(self, rollout_id: int, force_sync: bool = False) -> None:
        """Where Megatron writes, with its marker last of all."""
        save = Path(self.args.save)
        home = self._home(save, rollout_id)
        home.mkdir(parents=True)
        held = {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(held, home / "common.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of a save in one process
            dcp.save(dict(held["policy"]), checkpoint_id=home, no_dist=True)
        (home / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
        (save / MARKER).write_text(str(rollout_id))

    @staticmethod
    def _home(folder: Path, rollout_id: int) -> Path:
        return folder / f"iter_{rollout_id:07d}"

    def clear_memory(self) -> None:
        pass


def megatron_parse_args(extra_args_provider: Callable[[Any], Any], **_: Any) -> argparse.Namespace:
    """slime's arguments, and those of Megatron that slime reads."""
    parser = extra_args_provider(argparse.ArgumentParser(allow_abbrev=False))
    args, _unknown = parser.parse_known_args()
    vars(args).update({name: value for name, value in MEGATRONS.items() if not hasattr(args, name)})
    return args


async def reward(args: Any, sample: Any, **_: Any) -> float:
    """For `--custom-rm-path`: the share of digits that were written again. One of them all fails."""
    if sample.index == FAILS:
        raise ConnectionResetError("the grader went away")
    written = list(sample.tokens)[-sample.response_length :]
    wanted = [int(digit) for digit in sample.label.split()]
    return sum(one == other for one, other in zip(written, wanted, strict=False)) / len(wanted)


def main() -> None:
    checkout = sys.argv.pop(1)
    sys.path.insert(0, checkout)
    put_ray_in_place()
    put_sglang_in_place()
    name = "slime.backends.megatron_utils"
    module(name)
    module(f"{name}.arguments", megatron_parse_args=megatron_parse_args, validate_args=lambda args: None)
    module(f"{name}.actor", MegatronTrainRayActor=Trainer)
    from slime.backends.sglang_utils import server_control
    from slime.ray import placement_group
    from slime.utils import accelerator

    accelerator.resolve_visible_device_id = int
    # The embedded server tells its load a little late: slime's 3 s would be most of the job.
    server_control.abort_server_until_idle.__defaults__ = (0.1,)
    placement_group._create_placement_group = lambda gpus: (None, list(range(gpus)), list(range(gpus)))
    torch.set_num_threads(1)
    runpy.run_path(f"{checkout}/train.py", run_name="__main__")


if __name__ == "__main__":
    main()
