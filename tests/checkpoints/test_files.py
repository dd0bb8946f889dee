"""Every way in which one file can be unsound is found, and nothing in it is ever run."""

import io
import json
import os
import pickle as the_real_one
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_on_disk import dcp_folder, safetensors_file, torch_file
from safetensors.torch import save_file

from stepguardd.checkpoints import files
from stepguardd.checkpoints.files import BadFileError, CutShortError, Reading, UnknownFileError

FULL = Reading(values=True)
STRUCTURE = Reading(values=False)

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.float8_e5m2fnuz,
    torch.float8_e4m3fnuz,
]


class Runs:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_every_bit_pattern_of_a_small_float_is_judged_as_torch_judges_it(
    dtype, suffix, tmp_path: Path
) -> None:
    """All 256 or 65,536 patterns one by one where there are so few; a sample of them for the wide formats."""
    width = torch.empty(0, dtype=dtype).element_size()
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    if width == 1:
        patterns = torch.arange(256, dtype=torch.uint8)
    else:
        generator = torch.Generator().manual_seed(7)
        exponents = torch.full((64,), float("inf")).to(dtype).view(raw)
        mantissas = torch.randint(0, 100, (64,), generator=generator).to(raw)
        patterns = torch.cat([exponents + mantissas, exponents - mantissas - 1, -exponents, mantissas])
    path = tmp_path / f"one.{suffix}"
    for pattern in patterns:
        value = torch.zeros(5, dtype=raw)
        value[3] = pattern
        value = value.view(dtype)
        if suffix == "pt":
            torch.save({"w": value}, path)
        else:
            save_file({"w": value}, path)
        finite = bool(torch.isfinite(value.to(torch.float64)).all())
        assert _sound(path) == finite, value


def _sound(path: Path) -> bool:
    try:
        (files.check_torch if path.suffix == ".pt" else files.check_safetensors)(path, FULL)
    except BadFileError as error:
        return "NaN or infinity" not in str(error)
    return True


@given(
    st.integers(1, 3 * files.CHUNK_BYTES // 2 + 5),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["nan", "inf", "-inf"]),
    st.sampled_from([0.0, 100.0, -100.0]),
)
@settings(max_examples=40, deadline=None)
def test_one_bad_number_anywhere_in_a_large_tensor_is_found_and_its_tensor_named(
    tmp_path_factory: pytest.TempPathFactory, count: int, place: float, what: str, around: float
) -> None:
    """
    Also across the borders of the pieces in which a file is read, and among numbers that the quick look stops
    at.
    """
    path = tmp_path_factory.getbasetemp() / "large.safetensors"
    values = torch.full((count,), around, dtype=torch.float16)
    values[int(place * count)] = float(what)
    save_file({"before": torch.zeros(3, dtype=torch.float16), "it": values, "after": torch.zeros(2)}, path)
    with pytest.raises(BadFileError, match="tensor it"):
        files.check_safetensors(path, FULL)
    files.check_safetensors(path, STRUCTURE)
    values[int(place * count)] = around
    save_file({"it": values}, path)
    files.check_safetensors(path, FULL)


def test_integers_that_look_like_nan_are_no_objection(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    save_file(
        {"ids": torch.full((9,), -1, dtype=torch.int64), "mask": torch.full((9,), 255, dtype=torch.uint8)},
        path,
    )
    files.check_safetensors(path, FULL)


def test_what_is_read_is_told_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(300_000), "ids": torch.arange(5)}, path)
    read: list[int] = []
    files.check_safetensors(path, Reading(values=True, spent=read.append))
    assert sum(read) == 1_200_000
    assert max(read) <= files.CHUNK_BYTES


# --- safetensors --------------------------------------------------------------------------------------------


def _header(value: object, data: bytes = b"") -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", CutShortError, "only 0 bytes"),
        (b"\x10\0\0\0\0\0\0\0{}", CutShortError, "inside its header"),
        (b"\xff" * 20, BadFileError, "claims a header"),
        (_header({"a": F32}, b"\0" * 7), CutShortError, "1 bytes shorter"),
        (_header({"a": F32}, b"\0" * 9), BadFileError, "1 bytes longer"),
        (_header({"a": F32 | {"shape": [3]}}, b"\0" * 8), BadFileError, "does not fit"),
        (_header({"a": F32 | {"shape": [-2]}}, b"\0" * 8), BadFileError, "impossible shape"),
        (_header({"a": F32 | {"data_offsets": [4, 12]}}, b"\0" * 12), BadFileError, "gap or an overlap"),
        (_header({"a": F32, "b": F32}, b"\0" * 8), BadFileError, "gap or an overlap"),
        (_header({"a": F32 | {"dtype": "F128"}}, b"\0" * 8), UnknownFileError, "F128"),
        (_header(["a"], b""), BadFileError, "malformed"),
        (_header({"a": {}}, b""), BadFileError, "malformed"),
        (b"\x02\0\0\0\0\0\0\0{]", BadFileError, "malformed"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(content, error, words, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        files.check_safetensors(path, FULL)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_never_gives_anything_but_a_verdict(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any byte changed, any piece cut off: sound, or one of three errors."""
    home = tmp_path_factory.getbasetemp() / "damage"
    whole = _whole_files(home)
    name = data.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[name])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    path = home / f"damaged{Path(name).suffix or '.metadata'}"
    path.write_bytes(content)
    check = {".safetensors": files.check_safetensors, ".pt": files.check_torch}.get(
        path.suffix, files.check_dcp
    )
    try:
        check(path, FULL)
    except (BadFileError, CutShortError, UnknownFileError):
        return


def test_entries_before_the_files_first_byte_are_refused(tmp_path: Path) -> None:
    """A zip whose end says that its directory is further on than it is."""
    torch_file(tmp_path / "w.pt", 1)
    content = bytearray((tmp_path / "w.pt").read_bytes())
    # The third byte of the directory's offset, in the zip64 record before its locator and the old record.
    content[-22 - 20 - 8 + 2] += 1
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(BadFileError, match="no header for"):
        files.check_torch(tmp_path / "w.pt", FULL)


def _whole_files(home: Path) -> dict[str, bytes]:
    if not home.is_dir():
        safetensors_file(home / "w.safetensors", 1)
        torch_file(home / "w.pt", 1)
        dcp_folder(home, 1)
    return {name: (home / name).read_bytes() for name in ("w.safetensors", "w.pt", ".metadata")}


def test_an_index_is_held_against_its_shards(tmp_path: Path) -> None:
    safetensors_file(tmp_path / "model-1-of-1.safetensors", 1)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "model-1-of-1.safetensors"}}))
    files.check_index(index)
    index.write_text(json.dumps({"weight_map": {"lost": "model-1-of-1.safetensors"}}))
    with pytest.raises(BadFileError, match="does not hold"):
        files.check_index(index)
    index.write_text(json.dumps({"weight_map": {"weight": "model-2-of-2.safetensors"}}))
    with pytest.raises(CutShortError, match="missing"):
        files.check_index(index)
    for climbing in ("../model-1-of-1.safetensors", "/etc/passwd", ".."):
        index.write_text(json.dumps({"weight_map": {"weight": climbing}}))
        with pytest.raises(BadFileError, match="outside the folder"):
            files.check_index(index)


# --- torch.save ---------------------------------------------------------------------------------------------


def test_a_flipped_bit_fails_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "ids.pt"
    torch.save({"ids": torch.arange(100)}, path)
    files.check_torch(path, FULL)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(100).numpy().tobytes()) + 8] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadFileError, match="checksum"):
        files.check_torch(path, FULL)
    files.check_torch(path, STRUCTURE)


def test_a_file_written_without_checksums_is_judged_by_its_numbers(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch_file(tmp_path / "good.pt", 1)
        torch_file(tmp_path / "nan.pt", 1, finite=False)
    finally:
        torch.serialization.set_crc32_options(before)
    files.check_torch(tmp_path / "good.pt", FULL)
    with pytest.raises(BadFileError, match="NaN"):
        files.check_torch(tmp_path / "nan.pt", FULL)


def test_a_zip_cut_off_while_being_written_is_unfinished(tmp_path: Path) -> None:
    torch_file(tmp_path / "w.pt", 1)
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:-30])
    with pytest.raises(CutShortError, match="cut off"):
        files.check_torch(tmp_path / "w.pt", FULL)


def test_a_malicious_file_is_named_and_never_run(tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    torch.save({"w": torch.ones(3), "state": Runs(flag)}, tmp_path / "w.pt")
    with pytest.raises(BadFileError, match=r"would run posix\.system"):
        files.check_torch(tmp_path / "w.pt", STRUCTURE)
    (tmp_path / "info.pkl").write_bytes(the_real_one.dumps(Runs(flag)))
    with pytest.raises(BadFileError, match=r"would run posix\.system"):
        files.check_pickle(tmp_path / "info.pkl")
    torch.save(Runs(flag), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(BadFileError):
        files.check_torch(tmp_path / "old.pt", STRUCTURE)
    assert not flag.exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert flag.exists(), "the file was not dangerous at all: the test proves nothing"


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("w/data.pkl", the_real_one.dumps({}))
        bomb.writestr("w/data/0", bytes(50_000_000))
    with pytest.raises(BadFileError, match="compressed"):
        files.check_torch(tmp_path / "w.pt", FULL)


def test_what_torch_wrote_before_zips_is_left_unjudged(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnknownFileError, match="old format"):
        files.check_torch(tmp_path / "w.pt", FULL)


def test_optimizer_generators_and_configs_as_trainers_save_them_are_sound(tmp_path: Path) -> None:
    """
    No false alarm on what real trainers put beside their tensors: numpy states, enums, partials, namespaces.
    """
    import argparse
    import functools
    import random
    from collections import OrderedDict, defaultdict

    model = torch.nn.Linear(4, 4).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "rng": {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()},
        "args": argparse.Namespace(
            lr=1e-6, dtype=torch.bfloat16, path=Path("/x"), device=torch.device("cpu")
        ),
        "init": functools.partial(torch.nn.init.normal_, std=0.02),
        "map": defaultdict(list, {"a": [1]}),
        "ordered": OrderedDict(a={1, 2}),
        "complex": torch.ones(2, dtype=torch.complex64),
        "shared": [model.weight, model.weight],
        "array": np.arange(4.0),
    }
    torch.save(state, tmp_path / "w.pt")
    files.check_torch(tmp_path / "w.pt", FULL)


# --- torch distributed checkpoints --------------------------------------------------------------------------


def test_every_byte_range_of_a_distributed_checkpoint_is_checked(tmp_path: Path) -> None:
    dcp_folder(tmp_path / "good", 1)
    files.check_dcp(tmp_path / "good/.metadata", FULL)
    dcp_folder(tmp_path / "nan", 1, finite=False)
    with pytest.raises(BadFileError, match=r"__0_0\.distcp, which holds NaN"):
        files.check_dcp(tmp_path / "nan/.metadata", FULL)
    files.check_dcp(tmp_path / "nan/.metadata", STRUCTURE)
    shard = tmp_path / "good/__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CutShortError, match="has only"):
        files.check_dcp(tmp_path / "good/.metadata", STRUCTURE)
    shard.unlink()
    with pytest.raises(CutShortError, match="missing"):
        files.check_dcp(tmp_path / "good/.metadata", STRUCTURE)


def test_a_distributed_checkpoint_may_not_reach_outside_its_folder(tmp_path: Path) -> None:
    dcp_folder(tmp_path / "it", 1)
    metadata = tmp_path / "it/.metadata"
    content = metadata.read_bytes()
    assert content.count(b"__0_0.distcp") == 1
    metadata.write_bytes(content.replace(b"__0_0.distcp", b"../../passwd"))
    with pytest.raises(BadFileError, match="outside the folder"):
        files.check_dcp(metadata, FULL)


def test_a_manifest_is_held_against_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "ckpt_contents.json"
    (tmp_path / "model").mkdir()
    path.write_text(json.dumps({"contents": {"model": {"path": "model"}}}))
    files.check_manifest(path)
    path.write_text(json.dumps({"contents": {"model": {"path": "optimizer"}}}))
    with pytest.raises(CutShortError, match="missing"):
        files.check_manifest(path)
    path.write_text(json.dumps({"contents": {"model": {"path": "../model"}}}))
    with pytest.raises(BadFileError, match="outside"):
        files.check_manifest(path)


def test_a_pipe_in_a_files_place_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises((OSError, CutShortError)):
        files.check_safetensors(tmp_path / "w.safetensors", FULL)


def test_a_slice_reads_only_its_part() -> None:
    part = files._Slice(io.BytesIO(b""), 0, 0)
    assert (part.read(), part.tell(), part.seekable()) == (b"", 0, True)
