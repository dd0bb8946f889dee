"""The guard's settings: one schema, and nothing in the file can break training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepguard.settings import GuardSettings


def test_the_documented_defaults() -> None:
    assert GuardSettings() == GuardSettings(
        max_failed_fraction=0.1,
        max_refused_batches=3,
        verdict_timeout_s=0.25,
        orphan_hold_s=600.0,
        on_daemon_lost="continue",
        max_staleness=0,
    )


@settings(max_examples=50)
@given(
    st.builds(
        GuardSettings,
        max_failed_fraction=st.floats(0, 1),
        max_refused_batches=st.integers(1, 100),
        verdict_timeout_s=st.floats(0, 100),
        orphan_hold_s=st.floats(0, 1e6),
        on_daemon_lost=st.sampled_from(["continue", "hold"]),
        max_staleness=st.integers(0, 9),
    )
)
def test_what_the_daemon_writes_the_guard_reads(written: GuardSettings) -> None:
    assert GuardSettings.from_json(written.to_json()) == (written, ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_failed_fraction", 1.5),
        ("max_failed_fraction", "0.1"),
        ("max_failed_fraction", True),
        ("max_failed_fraction", 10**400),
        ("max_refused_batches", 0),
        ("max_refused_batches", 2.5),
        ("verdict_timeout_s", -1),
        ("orphan_hold_s", None),
        ("on_daemon_lost", "explode"),
        ("on_daemon_lost", ["hold"]),
        ("max_staleness", -1),
        ("colour", "red"),
    ],
)
def test_a_key_that_does_not_count_is_named_and_the_others_do(name: str, value: object) -> None:
    read, complaints = GuardSettings.from_json(
        json.dumps({"max_staleness": 2, "orphan_hold_s": 60} | {name: value})
    )
    assert len(complaints) == 1
    assert name in complaints[0]
    assert getattr(read, name, None) == getattr(GuardSettings(), name, None)
    assert name in ("max_staleness", "orphan_hold_s") or (read.max_staleness, read.orphan_hold_s) == (2, 60.0)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 50_000, '{"orphan_hold_s": Infinity}', "\0"])
def test_broken_files_mean_the_defaults_and_a_complaint(tmp_path: Path, text: str) -> None:
    (tmp_path / "guard.json").write_text(text)
    read, complaints = GuardSettings.read(tmp_path)
    assert read == GuardSettings()
    assert len(complaints) == 1
    assert str(tmp_path / "guard.json") in complaints[0]


def test_no_file_is_no_complaint_and_an_unreadable_one_is(tmp_path: Path) -> None:
    assert GuardSettings.read(tmp_path) == (GuardSettings(), ())
    (tmp_path / "guard.json").mkdir()
    read, complaints = GuardSettings.read(tmp_path)
    assert read == GuardSettings()
    assert len(complaints) == 1


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_any_text_gives_settings(text: str) -> None:
    assert isinstance(GuardSettings.from_json(text)[0], GuardSettings)
