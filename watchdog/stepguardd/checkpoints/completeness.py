"""
Which files a checkpoint of each framework must have. Pure: a listing of names and sizes goes in, what is
missing and what must be read comes out.

It promises to ask only for files whose absence the framework's own saving or loading code would notice, and
never to object to a file that it does not know. It opens nothing: whether the files are sound is `files.py`'s
question. The table in docs/checkpoints.md says the same in words, with the reason for each file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase


class FileKind(StrEnum):
    """How a file is to be read."""

    SAFETENSORS = "safetensors"
    INDEX = "index"  # a Hugging Face index: tensor name -> shard
    TORCH = "torch"  # a zip written by torch.save
    DCP = "dcp"  # a .metadata file, and through it the .distcp files beside it
    PICKLE = "pickle"
    JSON = "json"
    MANIFEST = "manifest"  # verl's ckpt_contents.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file: where it lies on disk, its size, and when it was last written."""

    path: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """
    The files of one checkpoint.

    `files` maps a name inside the checkpoint (its parts laid over one another, see `layouts.Part`) to the
    file. `escaping` names the symbolic links that leave the folder: they are known to be there and are never
    followed.
    """

    files: Mapping[str, Entry]
    escaping: frozenset[str] = frozenset()

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this file, even as a link that is not followed."""
        return name in self.files or name in self.escaping

    def match(self, pattern: str) -> list[str]:
        """Names matching a shell pattern in which `*` does not cross a `/`."""
        depth = pattern.count("/")
        return sorted(n for n in self.names() if n.count("/") == depth and fnmatchcase(n, pattern))

    def under(self, folder: str) -> list[str]:
        """Names that begin with `folder`, which ends in a `/`."""
        return sorted(name for name in self.names() if name.startswith(folder))

    def names(self) -> Iterator[str]:
        """Every name."""
        yield from self.files
        yield from self.escaping


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """
    What the neighbours say: the step in the framework's marker, and the roles that the other checkpoints
    have.

    A role (critic, orchestrator, optimizer, …) that every other checkpoint has and this one lacks was not
    saved in time; a role that none has is not part of the run.
    """

    marker_step: int | None = None
    step: int | None = None
    roles: frozenset[str] = frozenset()


@dataclass(slots=True, kw_only=True)
class Survey:
    """What is missing (each a sentence's worth for a person), and what must be read and how."""

    missing: list[str] = field(default_factory=list)
    read: dict[str, FileKind] = field(default_factory=dict)

    def need(self, listing: Listing, name: str, kind: FileKind, why: str = "") -> bool:
        """Ask for a file: read it, or note that it is missing and why that tells. True when it is there."""
        if not listing.has(name):
            self.missing.append(f"{name} is missing" + (f" ({why})" if why else ""))
            return False
        self.read[name] = kind
        return True

    def want(self, listing: Listing, pattern: str, kind: FileKind) -> list[str]:
        """Read the files matching a pattern; none is no objection. Returns their names."""
        names = listing.match(pattern)
        self.read.update(dict.fromkeys(names, kind))
        return names

    def lack(self, sentence: str) -> None:
        """Note something missing."""
        self.missing.append(sentence)


Surveyor = Callable[[Listing, Around], Survey]


def roles(names: Iterable[str]) -> frozenset[str]:
    """The roles in a listing: its folders two levels down, and the stems of its files."""
    found: set[str] = set()
    for name in names:
        parts = name.split("/")
        if len(parts) == 1:
            found.add(name.partition(".")[0])
        found.update("/".join(parts[:depth]) for depth in range(1, min(len(parts), 3)))
    return frozenset(found)


# --- the frameworks -----------------------------------------------------------------------------------------


def verl(listing: Listing, around: Around) -> Survey:
    """`actor/` and perhaps `critic/`, FSDP or Megatron; `data.pt` is written after them."""
    survey = Survey()
    for role in _roles("actor", ("critic",), listing, around):
        _verl_role(survey, listing, f"{role}/")
    if not survey.want(listing, "data.pt", FileKind.TORCH) and not survey.want(
        listing, "data_*.pt", FileKind.TORCH
    ):
        survey.lack("data.pt is missing (it is written after the shards)")
    return survey


def megatron(listing: Listing, around: Around) -> Survey:
    """For slime and miles: a Megatron iteration, and the prompt data set's state where the run keeps one."""
    survey = Survey()
    _megatron_iteration(survey, listing, "", around)
    if listing.has("rollout.pt"):
        survey.read["rollout.pt"] = FileKind.TORCH
    elif "rollout" in around.roles:
        survey.lack("rollout/global_dataset_state_dict_<step>.pt is missing (other checkpoints have it)")
    return survey


def areal(listing: Listing, around: Around) -> Survey:
    """The slot: `recover_info/` is written last, so weights newer than it are half of two saves."""
    survey = Survey()
    info = [f"info/{name}_info.json" for name in _AREAL_INFO]
    lost = [name for name in info if not survey.need(listing, name, FileKind.JSON)]
    complete = survey.need(listing, "info/dataloader_info.pkl", FileKind.PICKLE, "written last") and not lost
    theirs = {role.removeprefix("models/") for role in around.roles if role.startswith("models/")}
    models = sorted({name.split("/")[1] for name in listing.under("models/")} | theirs)
    if not models:
        survey.lack("no model has a recover_checkpoint folder")
    for model in models:
        folder = f"models/{model}/"
        if listing.has(f"{folder}.metadata"):
            _torch_dcp(survey, listing, folder)
        else:
            _megatron_iteration(survey, listing, folder, around)
    last = listing.files.get("info/dataloader_info.pkl")
    newer = (
        []
        if last is None
        else [name for name in listing.under("models/") if _modified(listing, name) > last.modified_ns]
    )
    if complete and newer:
        survey.lack(f"{newer[0]} is newer than recover_info: the slot is half of two saves")
    return survey


def trl(listing: Listing, around: Around) -> Survey:
    """Hugging Face's Trainer: weights, optimizer, scheduler, random state, and `trainer_state.json` last."""
    survey = Survey()
    survey.need(listing, "trainer_state.json", FileKind.JSON, "written last")
    engine = [name.split("/")[0] for name in listing.match("global_step*/*_states.pt")]
    if engine:
        _deepspeed(survey, listing, f"{engine[-1]}/")
    if not _hf_model(survey, listing, "") and not engine and not _fsdp_model(survey, listing):
        survey.lack("no model weights (model.safetensors, its index, or pytorch_model.bin)")
    has_optimizer = bool(engine) or _hf_optimizer(survey, listing)
    has_scheduler = bool(survey.want(listing, "scheduler.pt", FileKind.TORCH))
    has_rng = bool(survey.want(listing, "rng_state*.pth", FileKind.TORCH))
    resumable = has_optimizer or has_scheduler or has_rng or "optimizer" in around.roles
    if resumable and not has_optimizer:
        survey.lack("optimizer.pt is missing")
    if resumable and not has_scheduler:
        survey.lack("scheduler.pt is missing")
    return survey


def openrlhf(listing: Listing, around: Around) -> Survey:
    """DeepSpeed folders of actor and critic; the tag file `latest` is written after them."""
    survey = Survey()
    for role in _roles("actor", ("critic",), listing, around):
        _deepspeed(survey, listing, f"{role}/")
    _hf_model(survey, listing, "hf/")
    _proven_by_marker(survey, around, "latest")
    return survey


def prime_rl(listing: Listing, around: Around) -> Survey:
    """A torch DCP of the trainer and, in RL runs, the orchestrator's progress."""
    survey = Survey()
    _torch_dcp(survey, listing, "trainer/")
    survey.want(listing, "trainer/dataloader/rank_*.pt", FileKind.TORCH)
    if "orchestrator" in around.roles or listing.under("orchestrator/"):
        survey.need(listing, "orchestrator/progress.pt", FileKind.TORCH)
    for folder in ("weight/", "weights/"):
        _hf_model(survey, listing, folder)
    return survey


def skyrl(listing: Listing, around: Around) -> Survey:
    """`policy/` and perhaps `critic/`, then `trainer_state.pt`; a missing `data.pt` is only warned about."""
    survey = Survey()
    for role in _roles("policy", ("critic",), listing, around):
        if _fsdp_shards(survey, listing, f"{role}/", required=("model", "optim", "extra_state")):
            continue
        _megatron_iteration(survey, listing, f"{role}/", around)
    survey.want(listing, "data.pt", FileKind.TORCH)
    survey.need(listing, "trainer_state.pt", FileKind.TORCH, "written last")
    return survey


def nemo_rl(listing: Listing, around: Around) -> Survey:
    """Written as `tmp_step_N` and renamed, so the name is the proof; the loader still needs these files."""
    survey = Survey()
    survey.need(listing, "training_info.json", FileKind.JSON)
    for role in _roles("policy", ("value",), listing, around):
        _nemo_weights(survey, listing, f"{role}/weights/", around)
        if listing.under(f"{role}/optimizer/") or f"{role}/optimizer" in around.roles:
            _nemo_optimizer(survey, listing, f"{role}/optimizer/")
    if not survey.want(listing, "train_dataloader*.pt", FileKind.TORCH):
        survey.lack("train_dataloader.pt is missing")
    return survey


def roll(listing: Listing, around: Around) -> Survey:
    """The pipeline's state, which a resume loads first, and every worker's weights."""
    survey = Survey()
    survey.need(listing, "pipeline/worker_state_pipeline.json", FileKind.JSON)
    survey.need(listing, "pipeline/rng_state_pipeline.pth", FileKind.TORCH)
    found = _hf_model(survey, listing, "")
    iterations = sorted(
        {name.split("/")[0] for name in listing.match("iter_*/*") + listing.match("iter_*/*/*")}
    )
    for iteration in iterations:
        found = True
        optimizer = f"{iteration}/dist_optimizer/"
        if listing.under(optimizer):
            _megatron_iteration(survey, listing, optimizer, around)
        if listing.match(f"{iteration}/mp_rank_*/*"):
            _megatron_ranks(survey, listing, f"{iteration}/", around)
        elif not listing.under(optimizer) or listing.match(f"{iteration}/*.distcp"):
            _megatron_iteration(survey, listing, f"{iteration}/", around)
    if listing.under("dcp/") or "dcp" in around.roles:
        _torch_dcp(survey, listing, "dcp/")
    if not found:
        survey.lack("no model weights (model.safetensors or iter_*/)")
    survey.want(listing, "optimizer.pt", FileKind.TORCH)
    if listing.match("scheduler.pt") or "optimizer" in around.roles:
        survey.need(listing, "scheduler.pt", FileKind.TORCH)
    survey.want(listing, "rng_state/rng_state_*.pth", FileKind.TORCH)
    return survey


def dcp(listing: Listing, around: Around) -> Survey:
    """Any folder of a torch distributed checkpoint."""
    survey = Survey()
    _torch_dcp(survey, listing, "")
    return survey


def custom(listing: Listing, around: Around) -> Survey:
    """
    A pattern of the user's own: every file whose kind the name tells is read, and one must hold weights.

    There is no framework's code to take required files from, so a whole role that went missing cannot be seen
    here, except through the marker: a checkpoint newer than it was never finished.
    """
    survey = Survey()
    for name in listing.names():
        kind = _kind_by_name(name)
        if kind is not None:
            survey.read[name] = kind
    weights = {FileKind.SAFETENSORS, FileKind.TORCH, FileKind.DCP}
    if not weights & set(survey.read.values()):
        survey.lack("no file with weights (.safetensors, .pt, .pth or a .metadata of torch DCP)")
    for name in listing.match("*.distcp") + listing.match("*/*.distcp"):
        survey.need(
            listing, name.rpartition("/")[0] + "/.metadata" if "/" in name else ".metadata", FileKind.DCP
        )
    _proven_by_marker(survey, around, "the marker")
    return survey


# --- the pieces that they share -----------------------------------------------------------------------------

_AREAL_INFO = ("step", "saver", "evaluator", "stats_logger", "checkpoint")
_SHARD = re.compile(r"(model|optim|extra_state)_world_size_([0-9]+)_rank_([0-9]+)\.pt")
_ENGINE_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
_ENGINE_MODEL = re.compile(r"(?:zero_pp_rank_([0-9]+)_)?mp_rank_([0-9]+)_model_states\.pt")
_MEGATRON_RANK = re.compile(r"mp_rank_([0-9]{2})(?:_([0-9]{3}))?(?:_([0-9]{3}))?")


def _roles(always: str, sometimes: tuple[str, ...], listing: Listing, around: Around) -> list[str]:
    """The first role always; the others where this checkpoint or its neighbours have them."""
    return [always, *(role for role in sometimes if role in around.roles or listing.under(f"{role}/"))]


def _proven_by_marker(survey: Survey, around: Around, marker: str) -> None:
    """Shards of unknown number prove nothing: there the marker, written last, is the only proof."""
    if around.marker_step is not None and around.step is not None and around.step > around.marker_step:
        survey.lack(f"never finished: {marker} still names step {around.marker_step}")


def _verl_role(survey: Survey, listing: Listing, folder: str) -> None:
    for name in listing.under(folder):
        kind = _kind_by_name(name)
        if kind in {FileKind.SAFETENSORS, FileKind.INDEX}:
            survey.read[name] = kind
    if listing.has(f"{folder}ckpt_contents.json"):
        survey.read[f"{folder}ckpt_contents.json"] = FileKind.MANIFEST
        for part in ("model", "optimizer", "extra"):
            if listing.under(f"{folder}{part}/dist_ckpt/"):
                _dist_checkpoint(survey, listing, f"{folder}{part}/dist_ckpt/")
    elif _fsdp_shards(survey, listing, folder, required=("model",)):
        pass
    elif listing.under(f"{folder}dist_ckpt/"):
        _dist_checkpoint(survey, listing, f"{folder}dist_ckpt/")
    elif listing.under(f"{folder}model/"):
        survey.lack(f"{folder}ckpt_contents.json is missing (written last)")
    else:
        survey.lack(f"{folder} holds no shards of the model")


def _fsdp_shards(survey: Survey, listing: Listing, folder: str, *, required: tuple[str, ...]) -> bool:
    """`<kind>_world_size_<W>_rank_<R>.pt`: each kind that is there must be there for all W ranks."""
    worlds: dict[int, dict[str, set[int]]] = {}
    for name in listing.under(folder):
        found = _SHARD.fullmatch(name.removeprefix(folder))
        if found:
            kind, world, rank = found[1], int(found[2]), int(found[3])
            worlds.setdefault(world, {}).setdefault(kind, set()).add(rank)
    if not worlds:
        return False
    # A folder saved twice with another number of ranks holds both sets: one whole set is enough.
    lacking = {world: _lacking(world, kinds, required) for world, kinds in worlds.items()}
    world = min(lacking, key=lambda w: (len(lacking[w]), -w))
    survey.missing.extend(f"{folder}{name} is missing" for name in lacking[world])
    for kind, ranks in worlds[world].items():
        for rank in ranks:
            survey.read[f"{folder}{kind}_world_size_{world}_rank_{rank}.pt"] = FileKind.TORCH
    return True


def _lacking(world: int, kinds: Mapping[str, set[int]], required: tuple[str, ...]) -> list[str]:
    wanted = [kind for kind in ("model", "optim", "extra_state") if kind in kinds or kind in required]
    # A hostile name may claim a billion ranks: report the first few that lack, never list them all.
    return [
        f"{kind}_world_size_{world}_rank_{rank}.pt"
        for kind in wanted
        for rank in range(min(world, len(kinds.get(kind, ())) + 1))
        if rank not in kinds.get(kind, ())
    ]


def _megatron_iteration(survey: Survey, listing: Listing, folder: str, around: Around) -> None:
    """A Megatron folder: closed by `metadata.json`, or one file per rank and proven by the marker."""
    if listing.match(f"{folder}mp_rank_*/*"):
        _megatron_ranks(survey, listing, folder, around)
    else:
        _dist_checkpoint(survey, listing, folder)


def _megatron_ranks(survey: Survey, listing: Listing, folder: str, around: Around) -> None:
    ranks = sorted(
        {name.removeprefix(folder).split("/")[0] for name in listing.match(f"{folder}mp_rank_*/*")}
    )
    tensor_ranks = {int(found[1]) for rank in ranks if (found := _MEGATRON_RANK.fullmatch(rank))}
    for gap in sorted(set(range(max(tensor_ranks, default=0) + 1)) - tensor_ranks):
        survey.lack(f"{folder}mp_rank_{gap:02d} is missing")
    distributed = bool(listing.match(f"{folder}mp_rank_*/distrib_optim.pt"))
    for rank in ranks:
        survey.need(listing, f"{folder}{rank}/model_optim_rng.pt", FileKind.TORCH)
        if distributed:
            survey.need(listing, f"{folder}{rank}/distrib_optim.pt", FileKind.TORCH)
    _proven_by_marker(survey, around, "latest_checkpointed_iteration.txt")


def _dist_checkpoint(survey: Survey, listing: Listing, folder: str) -> None:
    survey.need(listing, f"{folder}metadata.json", FileKind.JSON, "written last")
    survey.want(listing, f"{folder}common.pt", FileKind.TORCH)
    _torch_dcp(survey, listing, folder)


def _torch_dcp(survey: Survey, listing: Listing, folder: str) -> None:
    survey.need(listing, f"{folder}.metadata", FileKind.DCP, "renamed into place last")
    if not listing.match(f"{folder}*.distcp"):
        survey.lack(f"{folder} holds no .distcp files")


def _deepspeed(survey: Survey, listing: Listing, folder: str) -> None:
    models, optimizers = set(), set()
    for name in listing.under(folder):
        base = name.removeprefix(folder)
        if found := _ENGINE_MODEL.fullmatch(base):
            models.add((int(found[1]) if found[1] else None, int(found[2])))
        elif found := _ENGINE_OPTIMIZER.fullmatch(base):
            optimizers.add((int(found[1]), int(found[2])))
        else:
            continue
        survey.read[name] = FileKind.TORCH
    if not models:
        survey.lack(f"{folder} holds no *_model_states.pt")
    sharded = {(rank, part) for rank, part in models if rank is not None}
    for missing in sorted(sharded ^ optimizers if sharded else ()):
        survey.lack(f"{folder} lacks a shard of rank {missing[0]} (model or optimizer)")
    for part in {part for _, part in models}:
        ranks = {rank for rank, of in optimizers if of == part}
        for gap in sorted(set(range(max(ranks, default=-1) + 1)) - ranks):
            survey.lack(f"{folder} lacks the optimizer shard of rank {gap}")


def _hf_model(survey: Survey, listing: Listing, folder: str) -> bool:
    """Weights as transformers and peft write them; an index is held against its shards when it is read."""
    found = False
    for stem in ("model", "adapter_model"):
        names = survey.want(listing, f"{folder}{stem}.safetensors", FileKind.SAFETENSORS)
        index = survey.want(listing, f"{folder}{stem}.safetensors.index.json", FileKind.INDEX)
        shards = survey.want(listing, f"{folder}{stem}-*-of-*.safetensors", FileKind.SAFETENSORS)
        if shards and not index and not names:
            survey.lack(f"{folder}{stem}.safetensors.index.json is missing (written after its shards)")
        found |= bool(names or index or shards)
    for pattern in ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "adapter_model.bin"):
        found |= bool(survey.want(listing, f"{folder}{pattern}", FileKind.TORCH))
    found |= bool(survey.want(listing, f"{folder}pytorch_model.bin.index.json", FileKind.INDEX))
    return found


def _fsdp_model(survey: Survey, listing: Listing) -> bool:
    if listing.under("pytorch_model_fsdp_0/"):
        _torch_dcp(survey, listing, "pytorch_model_fsdp_0/")
        return True
    return bool(survey.want(listing, "pytorch_model_fsdp.bin", FileKind.TORCH))


def _hf_optimizer(survey: Survey, listing: Listing) -> bool:
    if listing.under("optimizer_0/"):
        _torch_dcp(survey, listing, "optimizer_0/")
        return True
    patterns = ("optimizer.pt", "optimizer.bin", "rank*-of-*-optimizer.pt")
    return bool([pattern for pattern in patterns if survey.want(listing, pattern, FileKind.TORCH)])


def _nemo_weights(survey: Survey, listing: Listing, folder: str, around: Around) -> None:
    iterations = sorted({name.removeprefix(folder).split("/")[0] for name in listing.under(f"{folder}iter_")})
    if iterations:
        for iteration in iterations:
            _megatron_iteration(survey, listing, f"{folder}{iteration}/", around)
        return
    tensors = [name for name in listing.under(folder) if name.endswith(".safetensors")]
    if tensors:
        survey.read.update(dict.fromkeys(tensors, FileKind.SAFETENSORS))
        survey.read.update(
            {n: FileKind.INDEX for n in listing.under(folder) if n.endswith(".safetensors.index.json")}
        )
        return
    inner = f"{folder}model/" if listing.under(f"{folder}model/") else folder
    _torch_dcp(survey, listing, inner)


def _nemo_optimizer(survey: Survey, listing: Listing, folder: str) -> None:
    inner = f"{folder}optim/" if listing.under(f"{folder}optim/") else folder
    _torch_dcp(survey, listing, inner)


def _kind_by_name(name: str) -> FileKind | None:
    base = name.rpartition("/")[2]
    if base.endswith(".safetensors"):
        return FileKind.SAFETENSORS
    if base.endswith((".safetensors.index.json", ".bin.index.json")):
        return FileKind.INDEX
    if base.endswith((".pt", ".pth")) or base == "pytorch_model.bin":
        return FileKind.TORCH
    return FileKind.DCP if base == ".metadata" else None


def _modified(listing: Listing, name: str) -> int:
    entry = listing.files.get(name)
    return 0 if entry is None else entry.modified_ns
