"""The trainer's package brings nothing into a training environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import stepguard

MODULES = sorted(
    path.stem
    for path in Path(stepguard.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "_command")  # the console script is the daemon's door
)

CODE = """
import json, sys
before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import stepguard
early = sorted(set(sys.modules) - before)
for name in sys.argv[2:]:
    __import__("stepguard." + name)
for name in stepguard.__all__:
    getattr(stepguard, name)
late = set(sys.modules) - before
own = {name for name in late if name.split(".")[0] == "stepguard"}
foreign = sorted(n for n in late - own if n.split(".")[0] not in sys.stdlib_module_names)
print(json.dumps({"early": early, "foreign": foreign, "asyncio": "asyncio" in late, "own": sorted(own)}))
"""


def test_nothing_outside_the_standard_library_is_imported() -> None:
    root = Path(stepguard.__file__).parent.parent
    command = [sys.executable, "-I", "-S", "-c", CODE, str(root), *MODULES]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["foreign"] == []
    assert not found["asyncio"]
    assert len(found["own"]) == len(MODULES) + 1
    assert not {"dataclasses", "logging", "socket", "json"} & set(found["early"]), (
        "names are imported on first use"
    )


def test_every_public_name_is_there_and_no_other() -> None:
    assert set(stepguard.__all__) == set(stepguard._HOMES)
    for name in stepguard.__all__:
        assert getattr(stepguard, name) is not None
    assert not hasattr(stepguard, "Gaurd")
