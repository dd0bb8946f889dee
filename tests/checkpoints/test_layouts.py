"""What each framework's folder tells: found, recognised, and asked for exactly what its own code needs."""

import json
import os
from pathlib import Path

import pytest
from runs_on_disk import KINDS, Kind, dcp_folder, json_file, safetensors_file, torch_file

from stepguardd.checkpoints.completeness import Around, Entry, Listing, Survey
from stepguardd.checkpoints.layouts import (
    LAYOUTS,
    Framework,
    LayoutError,
    custom_layout,
    find_checkpoints,
    marker_step,
    open_folder,
    read_listing,
    resumes_from,
    surroundings,
)

EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.framework)


def survey(framework: Framework, names: list[str], **around: object) -> Survey:
    files = {name: Entry(path=f"/x/{name}", size_bytes=1, modified_ns=1) for name in names}
    return LAYOUTS[framework].survey(Listing(files=files), Around(**around))


@EVERY_KIND
def test_every_layout_is_recognised_and_its_steps_are_found(kind: Kind, a_run) -> None:
    folder = kind.open(a_run(kind))
    assert folder.layout.framework is kind.framework
    assert [c.step for c in find_checkpoints(folder)] == [10, 20, 30]
    assert resumes_from(folder) == 30


@EVERY_KIND
def test_extra_files_never_make_a_checkpoint_incomplete(kind: Kind, a_run) -> None:
    root = a_run(kind)
    home = kind.folder(root, 30)
    for name in ("README.md", "notes.bin", ".DS_Store", "tmp/x", "weights.tmp"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("not a checkpoint's file")
    folder = kind.open(root)
    checkpoints = find_checkpoints(folder)
    for checkpoint, around in zip(checkpoints, surroundings(folder, checkpoints), strict=True):
        assert folder.layout.survey(read_listing(checkpoint), around).missing == []


@EVERY_KIND
def test_each_file_that_comes_last_is_missed(kind: Kind, a_run) -> None:
    root = a_run(kind)
    kind.cut_short(root, 30)
    folder = kind.open(root)
    checkpoints = find_checkpoints(folder)
    newest = [c for c in checkpoints if c.step == 30]
    if newest:
        around = surroundings(folder, checkpoints)[checkpoints.index(newest[0])]
        assert folder.layout.survey(read_listing(newest[0]), around).missing
    else:
        assert kind.framework is Framework.DCP


def test_a_checkpoint_given_for_its_folder_is_told_apart(a_run) -> None:
    root = a_run(KINDS[0])
    with pytest.raises(LayoutError, match=f"is one checkpoint: give the folder that holds it, {root}"):
        open_folder(root / "global_step_20")


def test_a_runs_folder_is_looked_through_for_checkpoints(a_run, tmp_path: Path) -> None:
    root = a_run(next(kind for kind in KINDS if kind.framework is Framework.TRL))
    run = tmp_path / "run"
    run.mkdir()
    root.rename(run / "checkpoints")
    assert open_folder(run).root == run / "checkpoints"


def test_a_folder_without_checkpoints_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="name the framework with --framework"):
        open_folder(tmp_path)
    with pytest.raises(LayoutError, match=r"looked for global_step_\{step\}"):
        open_folder(tmp_path, Framework.VERL)
    with pytest.raises(LayoutError, match="is not a folder"):
        open_folder(tmp_path / "nowhere")


def test_what_nothing_tells_apart_is_asked_for(tmp_path: Path) -> None:
    for name in ("global_step_5/actor/x", "global_step_6/policy/x"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(LayoutError, match="could be of verl, skyrl: say which with --framework"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "pattern", ["no-step", "{step}/{step}", "../up-{step}", "/abs-{step}", "a*-{step}", ""]
)
def test_a_custom_pattern_stays_inside_and_names_one_step(pattern: str) -> None:
    with pytest.raises(LayoutError, match=r"must|lie under"):
        custom_layout(pattern)


@pytest.mark.parametrize(
    ("text", "step"), [("30", 30), ("30\n", 30), ("release", None), ("", None), ("../30", None), ("-3", None)]
)
def test_a_marker_is_a_step_or_nothing(text: str, step: int | None, a_run) -> None:
    root = a_run(KINDS[0])
    (root / "latest_checkpointed_iteration.txt").write_text(text)
    folder = open_folder(root)
    assert marker_step(folder) == step
    assert resumes_from(folder) == step


def test_a_marker_that_is_a_link_or_huge_is_not_read(a_run, tmp_path: Path) -> None:
    root = a_run(KINDS[0])
    marker = root / "latest_checkpointed_iteration.txt"
    marker.write_text("3" * 5000)
    assert marker_step(open_folder(root)) is None
    marker.unlink()
    (tmp_path / "elsewhere").write_text("30")
    marker.symlink_to(tmp_path / "elsewhere")
    assert marker_step(open_folder(root)) is None


# --- each framework's own traps -----------------------------------------------------------------------------


def test_verl_needs_every_rank_of_one_world() -> None:
    shards = [
        f"actor/{k}_world_size_2_rank_{r}.pt" for k in ("model", "optim", "extra_state") for r in (0, 1)
    ]
    assert not survey(Framework.VERL, [*shards, "data.pt"]).missing
    assert survey(Framework.VERL, [*shards[:-1], "data.pt"]).missing == [
        "actor/extra_state_world_size_2_rank_1.pt is missing"
    ]
    leftover = "actor/model_world_size_4_rank_3.pt"
    assert not survey(Framework.VERL, [*shards, leftover, "data.pt"]).missing
    only_model = [name for name in shards if "model" in name]
    assert not survey(Framework.VERL, [*only_model, "data.pt"]).missing


def test_verl_of_a_billion_ranks_is_refused_at_once() -> None:
    missing = survey(Framework.VERL, ["actor/model_world_size_999999999_rank_0.pt", "data.pt"]).missing
    assert missing == ["actor/model_world_size_999999999_rank_1.pt is missing"]


def test_verl_on_megatron_is_closed_by_its_manifest() -> None:
    dist = [
        f"actor/{p}/dist_ckpt/{f}"
        for p in ("model", "optimizer")
        for f in (".metadata", "metadata.json", "__0_0.distcp")
    ]
    assert not survey(Framework.VERL, [*dist, "actor/ckpt_contents.json", "data.pt"]).missing
    assert "written last" in survey(Framework.VERL, [*dist, "data.pt"]).missing[0]
    old = [f"actor/dist_ckpt/{f}" for f in (".metadata", "metadata.json", "__0_0.distcp")]
    assert not survey(Framework.VERL, [*old, "data.pt"]).missing


def test_a_role_that_the_others_have_is_missed() -> None:
    names = ["actor/model_world_size_1_rank_0.pt", "data.pt"]
    assert not survey(Framework.VERL, names).missing
    assert survey(Framework.VERL, names, roles=frozenset({"critic"})).missing == [
        "critic/ holds no shards of the model"
    ]


def test_old_megatron_files_are_proven_by_the_marker_alone() -> None:
    names = ["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"]
    assert not survey(Framework.SLIME, names, step=30, marker_step=30).missing
    assert "never finished" in survey(Framework.SLIME, names, step=40, marker_step=30).missing[0]
    assert not survey(Framework.SLIME, names, step=40, marker_step=None).missing
    gap = [*names, "mp_rank_03/model_optim_rng.pt"]
    assert survey(Framework.SLIME, gap, step=30, marker_step=30).missing == ["mp_rank_02 is missing"]


def test_slime_misses_the_prompt_state_where_the_others_have_it() -> None:
    names = [".metadata", "metadata.json", "__0_0.distcp"]
    assert not survey(Framework.SLIME, names).missing
    assert (
        "global_dataset_state_dict" in survey(Framework.SLIME, names, roles=frozenset({"rollout"})).missing[0]
    )


def test_deepspeed_misses_a_rank_between_others_and_a_marker_that_lags() -> None:
    names = ["actor/mp_rank_00_model_states.pt"]
    optimizer = [f"actor/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(4)]
    assert not survey(Framework.OPENRLHF, names + optimizer, step=5, marker_step=5).missing
    assert "rank 2" in survey(Framework.OPENRLHF, names + optimizer[:2] + optimizer[3:]).missing[0]
    assert "never finished" in survey(Framework.OPENRLHF, names + optimizer, step=6, marker_step=5).missing[0]
    sharded = [f"actor/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(4)]
    assert not survey(Framework.OPENRLHF, sharded + optimizer).missing
    assert "rank 3" in survey(Framework.OPENRLHF, sharded[:3] + optimizer).missing[0]


@pytest.mark.parametrize(
    "weights",
    [
        ["model.safetensors"],
        ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
        ["pytorch_model.bin"],
        ["adapter_model.safetensors"],
        ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"],
    ],
)
def test_trl_takes_weights_in_every_form_that_its_trainer_writes(weights: list[str]) -> None:
    rest = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    assert not survey(Framework.TRL, weights + rest).missing
    assert "no model weights" in survey(Framework.TRL, rest).missing[0]


def test_trl_without_any_optimizer_was_saved_so_but_half_of_one_was_not() -> None:
    names = ["model.safetensors", "trainer_state.json"]
    assert not survey(Framework.TRL, names).missing
    assert survey(Framework.TRL, [*names, "scheduler.pt"]).missing == ["optimizer.pt is missing"]
    assert survey(Framework.TRL, [*names, "optimizer.pt"]).missing == ["scheduler.pt is missing"]
    assert survey(Framework.TRL, names, roles=frozenset({"optimizer"})).missing


def test_trl_with_shards_but_no_index_was_cut_off() -> None:
    names = ["model-00001-of-00002.safetensors", "trainer_state.json"]
    assert "index.json is missing" in survey(Framework.TRL, names).missing[0]


def test_areal_weights_newer_than_their_recover_info_are_half_of_two_saves(a_run) -> None:
    root = a_run(next(kind for kind in KINDS if kind.slot))
    shard = next((root / "default/recover_checkpoint").glob("*.distcp"))
    later = (root / "recover_info/dataloader_info.pkl").stat().st_mtime_ns + 1_000_000_000
    os.utime(shard, ns=(later, later))
    folder = open_folder(root)
    slot = next(c for c in find_checkpoints(folder) if not c.pinned)
    assert "half of two saves" in folder.layout.survey(read_listing(slot), Around()).missing[0]


def test_areal_models_named_by_the_pins_are_missed(a_run) -> None:
    root = a_run(next(kind for kind in KINDS if kind.slot))
    for file in (root / "default/recover_checkpoint").iterdir():
        file.unlink()
    folder = open_folder(root)
    checkpoints = find_checkpoints(folder)
    slot = next(c for c in checkpoints if not c.pinned)
    around = surroundings(folder, checkpoints)[checkpoints.index(slot)]
    assert folder.layout.survey(read_listing(slot), around).missing


def test_roll_before_its_upload_is_gathered_from_its_workers(tmp_path: Path) -> None:
    for step in (5, 10):
        safetensors_file(tmp_path / f"actor_train-0/checkpoint-{step}/model.safetensors", step)
        dcp_folder(tmp_path / f"actor_train-0/checkpoint-{step}/dcp", step)
        state = tmp_path / f"pipeline/checkpoint-{step}/pipeline"
        json_file(state / "worker_state_pipeline.json", {"step": step})
        torch_file(state / "rng_state_pipeline.pth", step)
    folder = open_folder(tmp_path)
    assert folder.layout.framework is Framework.ROLL
    checkpoints = find_checkpoints(folder)
    assert [[part.path for part in c.parts] for c in checkpoints] == [
        [f"pipeline/checkpoint-{step}", f"actor_train-0/checkpoint-{step}"] for step in (5, 10)
    ]
    for checkpoint in checkpoints:
        assert not folder.layout.survey(read_listing(checkpoint), Around()).missing


def test_the_actors_folder_of_openrlhf_leads_to_its_parent(a_run) -> None:
    root = a_run(next(kind for kind in KINDS if kind.framework is Framework.OPENRLHF))
    assert open_folder(root / "_actor").root == root


def test_a_checkpoint_may_link_within_its_folder_but_not_out_of_it(a_run, tmp_path: Path) -> None:
    root = a_run(next(kind for kind in KINDS if kind.framework is Framework.TRL))
    weights = root / "checkpoint-30/model.safetensors"
    weights.rename(root / "blob")
    weights.symlink_to("../blob")
    folder = open_folder(root)
    newest = find_checkpoints(folder)[-1]
    assert read_listing(newest).files["model.safetensors"].path == str(root / "blob")
    (root / "blob").rename(tmp_path / "blob")
    weights.unlink()
    weights.symlink_to(tmp_path / "blob")
    listing = read_listing(newest)
    assert "model.safetensors" not in listing.files
    assert listing.escaping == {"model.safetensors"}


def test_the_slots_step_is_a_number_or_unknown(a_run) -> None:
    root = a_run(next(kind for kind in KINDS if kind.slot))
    for value in ("x", -1, None, [3]):
        (root / "recover_info/step_info.json").write_text(json.dumps({"global_step": value}))
        slot = next(c for c in find_checkpoints(open_folder(root)) if not c.pinned)
        assert slot.step is None
