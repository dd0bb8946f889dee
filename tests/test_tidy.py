"""
The house rules, as code. Each rule is a function from a file to its violations, and is tried on a sample.

What a linter already checks is not repeated here.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SKIPPED = {".git", ".venv", "__pycache__", "build", "dist", "wandb", "scratch", "demo-runs"}
WORDS = {".py", ".md", ".toml", ".txt", ".cfg", ".yaml", ".yml", ".json", ".sh", ".service", ".conf", ""}

# A file this long can no longer be held in the head. Splitting a thought to get under it is no better.
FILE_LINES_OUTRAGEOUS = 1500
FILE_BYTES_MAX = 4 << 20
BROAD_EXCEPTS_MAX = 10

# What holds or computes values, and can neither wait, nor read a clock, nor touch the world.
VALUE_MODULES = {
    "__future__", "abc", "bisect", "collections", "dataclasses", "decimal", "enum", "fractions", "functools",
    "heapq", "itertools", "math", "operator", "re", "statistics", "string", "textwrap", "types", "typing",
}  # fmt: skip
HEAVY = {"stepguard_grpo", "torch", "transformers", "wandb", "ray"}

Rule = Callable[[Path, str], Iterator[str]]


def files() -> list[Path]:
    """What git has or would take, by path from the root; without git, everything outside of build folders."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if listed.returncode == 0:
        found = [Path(line) for line in listed.stdout.splitlines()]
    else:
        found = [
            path.relative_to(ROOT)
            for path in ROOT.rglob("*")
            if not SKIPPED & {*path.relative_to(ROOT).parts}
        ]
    return sorted(path for path in found if (ROOT / path).is_file() and not (ROOT / path).is_symlink())


FILES = files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
TEXT = [path for path in FILES if path.suffix in WORDS]


def within(path: Path, *folders: str) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


@functools.cache
def tree(source: str) -> ast.Module:
    return ast.parse(source)


@functools.cache
def nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(tree(source)))


def imports(source: str) -> Iterator[tuple[int, str, int]]:
    """Line, module and level (dots) of every import, wherever in the file it stands."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", node.level


@functools.cache
def calls(source: str) -> list[tuple[int, str, ast.Call]]:
    """Line, dotted name and node of every call."""
    return [
        (node.lineno, ast.unparse(node.func), node) for node in nodes(source) if isinstance(node, ast.Call)
    ]


# --- the rules ---


def the_core_is_pure(path: Path, source: str) -> Iterator[str]:
    """`core/` decides: it imports value modules and itself, nothing that waits or touches the world."""
    core = Path("watchdog/stepguardd/core")
    if not within(path, str(core)):
        return
    depth = len(path.parent.relative_to(core).parts) + 1
    for line, module, level in imports(source):
        own = level in range(1, depth + 1) or module.startswith("stepguardd.core")
        if not own and module.partition(".")[0] not in VALUE_MODULES:
            yield f"{line}: the core may not import {'.' * level}{module}"


def the_trainers_package_is_stdlib_only(path: Path, source: str) -> Iterator[str]:
    """`stepguard` brings nothing into a training environment; integrations import theirs late."""
    if not within(path, "trainer/stepguard") or within(path, "trainer/stepguard/integrations"):
        return
    opens_the_command_line = path.name == "_command.py"
    for line, module, level in imports(source):
        top = module.partition(".")[0]
        if level or top == "stepguard" or (opens_the_command_line and top == "stepguardd"):
            continue
        if top not in sys.stdlib_module_names:
            yield f"{line}: {module} is not in the standard library"


def the_daemon_knows_no_trainer(path: Path, source: str) -> Iterator[str]:
    """`stepguardd` runs where no torch is; only its demo starts the reference trainer."""
    if within(path, "watchdog/stepguardd/demo"):
        return
    for line, module, _ in imports(source):
        top = module.partition(".")[0]
        if within(path, "watchdog/stepguardd") and top in HEAVY:
            yield f"{line}: the daemon may not import {module}"
        if within(path, "trainer/stepguard_grpo") and top == "stepguardd":
            yield f"{line}: the reference trainer may not import {module}"


def nothing_runs_what_it_reads(path: Path, source: str) -> Iterator[str]:
    """No pickle, no eval, no shell: input is data."""
    if within(path, "tests"):
        return
    for line, module, level in imports(source):
        if not level and module.partition(".")[0] in {"pickle", "marshal", "shelve", "dill", "cloudpickle"}:
            yield f"{line}: {module} runs what it reads"
    for line, name, call in calls(source):
        if name in {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput"}:
            yield f"{line}: {name}()"
        for keyword in call.keywords:
            if keyword.arg == "shell" and not (
                isinstance(keyword.value, ast.Constant) and not keyword.value.value
            ):
                yield f"{line}: shell=True"


def wall_time_comes_from_the_clock_module(path: Path, source: str) -> Iterator[str]:
    """Durations must survive a clock that jumps, and tests must be able to say what time it is."""
    if not within(path, "trainer/stepguard", "watchdog/stepguardd") or path.name == "clock.py":
        return
    for line, name, _ in calls(source):
        if name in {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.utcnow"}:
            yield f"{line}: {name}() outside of clock.py"


def queues_are_bounded(path: Path, source: str) -> Iterator[str]:
    """An unbounded queue is a leak that waits for a bad night."""
    if within(path, "tests"):
        return
    for line, name, call in calls(source):
        kind = name.rpartition(".")[2]
        if kind == "SimpleQueue" or (kind.endswith("Queue") and not call.args and not call.keywords):
            yield f"{line}: {name}() has no bound"


def broad_excepts(path: Path, source: str) -> Iterator[tuple[int, bool]]:
    """Handlers of everything that do not raise it again: their line, and whether it says why."""
    if within(path, "tests", "benchmarks"):
        return
    lines = source.splitlines()
    for node in nodes(source):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "BaseException" if node.type is None else ast.unparse(node.type)
        raised_again = any(isinstance(step, ast.Raise) and step.exc is None for step in node.body)
        if re.search(r"\b(Base)?Exception\b", caught) and not raised_again:
            said = lines[node.lineno - 1].partition("#")[2]
            yield node.lineno, len(said.replace("noqa: BLE001", "").strip(" -")) > 10


def a_broad_except_says_why(path: Path, source: str) -> Iterator[str]:
    """Catching everything is for the border of a task, with the reason beside it."""
    yield from (
        f"{line}: catches everything and does not say why"
        for line, why in broad_excepts(path, source)
        if not why
    )


def nothing_is_left_to_do(path: Path, source: str) -> Iterator[str]:
    """A note to oneself belongs into an issue."""
    for number, line in enumerate(source.splitlines(), start=1):
        if re.search(r"\b(FIXME|TODO|XXX)\b", line):
            yield f"{number}: {line.strip()[:60]}"


def no_test_waits_for_time(path: Path, source: str) -> Iterator[str]:
    """A sleep is either too short or too long: tests turn the clock themselves. Real processes (e2e) may."""
    if not within(path, "tests") or within(path, "tests/e2e"):
        return
    real = [
        node for node in tree(source).body if "pytest.mark.e2e" in " ".join(map(ast.unparse, _marks(node)))
    ]
    if any(isinstance(node, ast.Assign) for node in real) or not path.name.startswith("test_"):
        return
    excused = {line for node in real for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    clocks = {f"{module}.sleep" for _, module, _ in imports(source) if module in {"time", "asyncio"}}
    for line, name, call in calls(source):
        yields_only = (
            len(call.args) >= 1 and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0
        )
        if name in clocks and not yields_only and line not in excused:
            yield f"{line}: {name}() outside of an e2e test"


def _marks(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign) and any(ast.unparse(target) == "pytestmark" for target in node.targets):
        return [node.value]
    return getattr(node, "decorator_list", [])


def no_test_patches(path: Path, source: str) -> Iterator[str]:
    """A fake is code that can be read and is itself tested; a patch knows the inside of what it tests."""
    if not within(path, "tests"):
        return
    for line, module, _ in imports(source):
        if module in {"mock", "unittest.mock", "pytest_mock"}:
            yield f"{line}: imports {module}"
    for line, name, _ in calls(source):
        if name in {"monkeypatch.setattr", "monkeypatch.delattr", "mocker.patch"}:
            yield f"{line}: {name}()"


def no_test_is_switched_off(path: Path, source: str) -> Iterator[str]:
    """A test runs, or has a condition and a reason (skipif), or is deleted."""
    if not within(path, "tests"):
        return
    for node in nodes(source):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"pytest.mark.skip", "unittest.skip"}:
            yield f"{node.lineno}: a test is switched off"


def nothing_of_the_makers_machine(path: Path, source: str) -> Iterator[str]:
    """The tree must mean the same on every machine: no home folders, no package mirrors."""
    for number, line in enumerate(source.splitlines(), start=1):
        if re.search(
            r"(?<![\w.])/(work|root)/|/simple/|(extra-)?index-url|trusted-host|artifactory",
            line,
        ):
            yield f"{number}: {line.strip()[:80]}"


def a_file_can_be_held_in_the_head(path: Path, source: str) -> Iterator[str]:
    """Only what is outrageous is refused; see the figure's own comment."""
    lines = source.count("\n")
    if path.suffix == ".py" and lines > FILE_LINES_OUTRAGEOUS:
        yield f"has {lines} lines"


PYTHON_RULES: list[Rule] = [
    the_core_is_pure,
    the_trainers_package_is_stdlib_only,
    the_daemon_knows_no_trainer,
    nothing_runs_what_it_reads,
    wall_time_comes_from_the_clock_module,
    queues_are_bounded,
    a_broad_except_says_why,
    no_test_waits_for_time,
    no_test_patches,
    no_test_is_switched_off,
    a_file_can_be_held_in_the_head,
]
TEXT_RULES: list[Rule] = [nothing_is_left_to_do, nothing_of_the_makers_machine]


@pytest.mark.parametrize("rule", [*PYTHON_RULES, *TEXT_RULES], ids=lambda rule: rule.__name__)
def test_the_tree_keeps(rule: Rule) -> None:
    found = [
        f"{path}:{violation}"
        for path in (PYTHON if rule in PYTHON_RULES else TEXT)
        if path != Path("tests/test_tidy.py")
        for violation in rule(path, (ROOT / path).read_text())
    ]
    assert found == [], f"{rule.__doc__}\n" + "\n".join(found)


CORE, GUARD, DAEMON, GRPO, TEST = (
    Path("watchdog/stepguardd/core/x.py"),
    Path("trainer/stepguard/x.py"),
    Path("watchdog/stepguardd/x.py"),
    Path("trainer/stepguard_grpo/x.py"),
    Path("tests/shell/test_x.py"),
)


@pytest.mark.parametrize(
    ("rule", "path", "bad", "good"),
    [
        (the_core_is_pure, CORE, "import asyncio", "import math"),
        (the_core_is_pure, CORE, "def f():\n    import time", "from .events import Event"),
        (the_core_is_pure, CORE, "from .. import clock", "from collections.abc import Mapping"),
        (
            the_core_is_pure,
            CORE.with_name("a") / "x.py",
            "from ...journal import J",
            "from ..state import State",
        ),
        (the_trainers_package_is_stdlib_only, GUARD, "import torch", "import mmap"),
        (
            the_trainers_package_is_stdlib_only,
            GUARD,
            "from stepguardd import config",
            "from .gate import Order",
        ),
        (the_daemon_knows_no_trainer, DAEMON, "import torch.nn", "import numpy"),
        (the_daemon_knows_no_trainer, GRPO, "from stepguardd import x", "import torch"),
        (nothing_runs_what_it_reads, DAEMON, "import pickle", "import pickletools"),
        (nothing_runs_what_it_reads, DAEMON, "eval('1')", "model.eval()"),
        (nothing_runs_what_it_reads, DAEMON, "run('ls', shell=True)", "run(['ls'], shell=False)"),
        (wall_time_comes_from_the_clock_module, DAEMON, "time.time()", "time.monotonic()"),
        (wall_time_comes_from_the_clock_module, GUARD, "datetime.now(UTC)", "clock.wall()"),
        (queues_are_bounded, DAEMON, "asyncio.Queue()", "asyncio.Queue(10)"),
        (queues_are_bounded, GUARD, "queue.SimpleQueue()", "queue.Queue(maxsize=3)"),
        (
            a_broad_except_says_why,
            DAEMON,
            "try: f()\nexcept Exception: pass",
            "try: f()\nexcept OSError: pass",
        ),
        (
            a_broad_except_says_why,
            DAEMON,
            "try: f()\nexcept:  # noqa: BLE001\n    pass",
            "try: f()\nexcept Exception:  # noqa: BLE001 - the border of the task\n    pass",
        ),
        (
            a_broad_except_says_why,
            DAEMON,
            "try: f()\nexcept (ValueError, Exception) as e: raise X from e",
            "try: f()\nexcept BaseException:\n    undo()\n    raise",
        ),
        (nothing_is_left_to_do, DAEMON, "# TODO: later", "# done"),
        (no_test_waits_for_time, TEST, "import time\ntime.sleep(0.1)", "def test_x(time): time.sleep(1)"),
        (
            no_test_waits_for_time,
            TEST,
            "import asyncio\nasyncio.sleep(n)",
            "import asyncio\nasyncio.sleep(0)",
        ),
        (
            no_test_waits_for_time,
            TEST,
            "import time\ndef test_x():\n    time.sleep(1)",
            "import time\n@pytest.mark.e2e\ndef test_x():\n    time.sleep(1)",
        ),
        (
            no_test_waits_for_time,
            TEST,
            "import time\ntime.sleep(1)",
            "import time\npytestmark = pytest.mark.e2e\ntime.sleep(1)",
        ),
        (
            no_test_patches,
            TEST,
            "from unittest.mock import patch",
            "from shell.fake_daemon import FakeDaemon",
        ),
        (no_test_patches, TEST, "monkeypatch.setattr(a, 'b', 1)", "monkeypatch.setenv('A', 'b')"),
        (
            no_test_is_switched_off,
            TEST,
            "@pytest.mark.skip\ndef test_x(): ...",
            "@pytest.mark.skipif(C)\ndef t(): ...",
        ),
        (nothing_of_the_makers_machine, DAEMON, "# see /work/main/x", "# see /run/stepguard/x"),
        (nothing_of_the_makers_machine, DAEMON, "p = '/root/x'", "root/x"),
        (nothing_of_the_makers_machine, DAEMON, "pip --index-url=x", "pip install x"),
        (a_file_can_be_held_in_the_head, DAEMON, "x\n" * 2000, "x\n" * 500),
    ],
)
def test_a_rule_sees_what_it_is_for(rule: Rule, path: Path, bad: str, good: str) -> None:
    assert list(rule(path, bad)) != []
    assert list(rule(path, good)) == []


def test_few_places_catch_everything() -> None:
    found = [
        f"{path}:{line}" for path in PYTHON for line, _ in broad_excepts(path, (ROOT / path).read_text())
    ]
    assert len(found) <= BROAD_EXCEPTS_MAX, "\n".join(found)


def test_nothing_in_the_tree_is_huge() -> None:
    assert [str(path) for path in FILES if (ROOT / path).stat().st_size > FILE_BYTES_MAX] == []


def test_every_rule_had_something_to_look_at() -> None:
    """Were the tree not found, every rule would hold."""
    for folder in (
        "watchdog/stepguardd/core",
        "trainer/stepguard",
        "trainer/stepguard_grpo",
        "tests",
        "docs",
    ):
        assert any(within(path, folder) for path in FILES), folder
    assert Path("config.toml") in TEXT
    assert Path("Makefile") in TEXT


def test_importing_the_trainers_package_brings_in_the_standard_library_alone() -> None:
    code = "import sys; sys.path.insert(0, 'trainer'); before = set(sys.modules); import stepguard; "
    code += "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    brought = set(done.stdout.split())
    assert "stepguard" in brought
    assert brought - {"stepguard"} <= sys.stdlib_module_names


def test_the_docs_mention_every_key_of_the_configuration() -> None:
    from stepguardd.config.loading import keys

    words = (ROOT / "docs" / "configuration.md").read_text()
    assert [key for key in keys() if f"**`{key.rpartition('.')[2]}`**" not in words] == []
