"""What the examples show is what runs."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from frameworks.tiny_trl import policy, tokenizer
from guard.real_daemon import RealDaemon

ROOT = Path(__file__).parents[2]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RealDaemon]:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    made = RealDaemon(run_dir, boot_id=None)
    yield made
    made.close()


@pytest.mark.e2e
def test_the_example_for_trl_is_guarded(tmp_path: Path, daemon: RealDaemon) -> None:
    policy().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    ended = subprocess.run(
        [sys.executable, "examples/trl_grpo.py", str(tmp_path / "model"), str(tmp_path / "out"), "5"],
        cwd=ROOT,
        env=os.environ
        | {
            "STEPGUARD_RUN_DIR": str(daemon.run_dir),
            "PYTHONPATH": str(ROOT / "trainer"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        },
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    daemon.settle()
    assert [report["step"] for report in daemon.of_kind("step")] == [1, 2, 3, 4, 5]
    assert len(daemon.of_kind("batch")) == 5
    assert [report["step"] for report in daemon.of_kind("saved")] == [5]


def test_the_lines_to_add_are_three_at_most() -> None:
    code = (ROOT / "examples/trl_grpo.py").read_text().split("# " + "-" * 63)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 3
    arguments = (ROOT / "examples/slime_arguments.sh").read_text()
    named = re.findall(r"^  --\S+ (\S+)$", arguments, re.MULTILINE)
    assert len(named) == 3
    for path in named:
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("page", sorted((ROOT / "docs/frameworks").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_is_short_and_its_lines_to_add_exist(page: Path) -> None:
    text = page.read_text()
    assert text.count("\n") <= 60
    for module, name in re.findall(r"from (stepguard\.integrations\.\w+) import (\w+)", text):
        source = (ROOT / "trainer" / (module.replace(".", "/") + ".py")).read_text()
        assert re.search(rf"^(class|def) {name}\b", source, re.MULTILINE), f"{page.name}: {module}.{name}"
    for link in re.findall(r"\]\(([\w./-]+\.md)\)", text):
        assert (page.parent / link).is_file(), link


def test_the_table_of_the_readme_says_in_short_what_the_longer_one_says() -> None:
    short, long = table(ROOT / "README.md"), table(ROOT / "docs/frameworks/README.md")
    assert short[0][:-1] == long[0][:-1], "the same columns, but for how it was tested"
    assert [row[0] for row in short] == [re.sub(r"\[(.+)\]\(.+\)", r"\1", row[0]) for row in long]
    for one, other in zip(short[1:], long[1:], strict=True):
        assert one[1] == other[1].split(",")[0], f"{one[0]}: the version"
        assert one[2:-1] == [in_short(cell) for cell in other[2:-1]], one[0]
        assert one[-1], one[0]


def table(page: Path) -> list[list[str]]:
    """The page's table of frameworks: its head, then a row for each."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if len(row) == 8 and set(row[0]) != {"-"}]


def in_short(cell: str) -> str:
    """What begins with "no" or "not tried" is that; all else is a yes with its conditions."""
    found = re.match(r"not tried|no\b", cell)
    return found[0] if found else "yes"
