"""The tests' own driver library behind the real `pynvml`: compiled when they run, and told what to say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from requirements import require

SOURCE = Path(__file__).with_name("fake_nvml.c")


def compiled_library(folder: Path) -> Path:
    """The folder with the library, for LD_LIBRARY_PATH."""
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    compiler = shutil.which("cc")
    if compiler is None:
        require("cc", "no C compiler to make the fake driver library with")
    target = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(target), str(SOURCE)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def write_script(script: Path, **lines: int) -> None:
    """Let the driver say this from now on: `gpu0_used` is `0.used` there, and `_` is written twice."""
    text = "".join(f"{_key(name)} {value}\n" for name, value in lines.items())
    beside = script.with_suffix(".new")
    beside.write_text(text)
    beside.replace(script)


def _key(name: str) -> str:
    return name.removeprefix("gpu").replace("__", "-").replace("_", ".").replace("-", "_")
