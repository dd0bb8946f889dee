"""SGLang's crash dumps: read as text, never run, and told where they help."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stepguardd.incidents.crash_dumps import DumpError, read_dump, told

MODULE = "sglang.srt.managers.io_struct"
NOON = 1_700_000_000.0


GenerateReqInput = type("GenerateReqInput", (), {"__module__": MODULE})
"""The class whose instances SGLang writes; it is no longer to be imported once they are written."""


def asked(prompt: str | Sequence[int], *, done: bool = False) -> tuple[Any, ...]:
    """One request as 0.5.23 writes it: what was asked, what was answered, when."""
    fields = {"text": prompt} if isinstance(prompt, str) else {"text": None, "input_ids": list(prompt)}
    request = GenerateReqInput()
    request.__dict__.update(fields, sampling_params={"max_new_tokens": 4}, rid="r")
    answer = {"output_ids": [1], "meta_info": {"finish_reason": {"type": "stop"} if done else None}}
    return request, answer if done or isinstance(prompt, str) else {}, NOON - 2, NOON - 1


def dump(folder: Path, at: float, *requests: tuple[Any, ...]) -> Path:
    path = folder / "gpu1" / f"crash_dump_2023-11-14_{int(at) % 86400:05d}.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"server_args": None, "requests": list(requests), "launch_command": "…"}
    module = ModuleType(MODULE)
    module.GenerateReqInput = GenerateReqInput  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, MODULE, module)
        path.write_bytes(pickle.dumps(said))
    os.utime(path, (at, at))
    return path


def test_who_had_no_answer_is_named_and_who_had_one_is_not(tmp_path: Path) -> None:
    path = dump(tmp_path, NOON, asked([1, 2], done=True), asked([10, 999, 11]), asked("Count\nto ten"))
    assert read_dump(path).in_flight == ("ids 10 999 11", "'Count\\nto ten'")
    (sentence,) = told({"s": str(tmp_path)}, NOON - 5, NOON)
    assert sentence.startswith("When s died at 22:13:20 UTC, 2 prompts were in flight: ids 10 999 11, 'Count")
    assert str(path) in sentence
    assert not [name for name in sys.modules if name.partition(".")[0] == "sglang"], "nothing was imported"


def test_who_was_there_at_each_death_is_suspected_and_long_prompts_are_cut(tmp_path: Path) -> None:
    long = list(range(5000))
    dump(tmp_path, NOON, asked([1]), asked(long), asked([2]))
    dump(tmp_path, NOON + 60, asked([3]), asked(long))
    *_, last = told({"s": str(tmp_path)}, NOON, NOON + 60)
    assert "at each of these 2 deaths of s: ids 0 1 2 3 4 5 6 7 8 9 10 11 … (5000 in all)" in last
    assert len(told({"s": str(tmp_path)}, NOON, NOON + 10)) == 1, "the second belongs to another incident"


def test_where_all_were_there_each_time_nobody_is_suspected_more_than_another(tmp_path: Path) -> None:
    for at in (NOON, NOON + 60):
        dump(tmp_path, at, asked([1]), asked([2]))
    assert not any("each of these" in line for line in told({"s": str(tmp_path)}, NOON, NOON + 60))


def test_a_dump_that_would_run_something_runs_nothing_and_one_that_is_none_is_said(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    dump(tmp_path, NOON, (Bomb(), {}, NOON, NOON))
    (sentence,) = told({"s": str(tmp_path)}, NOON, NOON)
    assert "no request was in flight" in sentence
    assert not (tmp_path / "ran").exists()
    (tmp_path / "gpu1/crash_dump_x.pkl").write_bytes(b"not a pickle")
    with pytest.raises(DumpError):
        read_dump(tmp_path / "gpu1/crash_dump_x.pkl")
    os.utime(tmp_path / "gpu1/crash_dump_x.pkl", (NOON, NOON))
    assert sum("was not read" in line for line in told({"s": str(tmp_path)}, NOON, NOON)) == 1


def test_a_dump_that_is_too_large_is_named_and_left(tmp_path: Path) -> None:
    path = dump(tmp_path, NOON)
    os.truncate(path, 64 << 20)
    os.utime(path, (NOON, NOON))
    (sentence,) = told({"s": str(tmp_path)}, NOON, NOON)
    assert str(path) in sentence
    assert "was not read" in sentence


def test_without_a_folder_there_is_nothing_to_tell(tmp_path: Path) -> None:
    assert told({"s": str(tmp_path / "none")}, NOON, NOON) == []
