"""The deployment pages and their example files: parsed, their commands known, their settings valid."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from kubernetes_validate import ValidationError, validate
from typer.main import get_command

from stepguardd.cli import COMMANDS, _app
from stepguardd.config import ConfigError, load_config

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
EXAMPLES = DEPLOY / "examples"
PAGES = sorted(DEPLOY.glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def named(pattern: str) -> list[Path]:
    found = sorted(EXAMPLES.glob(pattern))
    assert found, f"no {pattern} in {EXAMPLES}"
    return found


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def leaves(value: Any) -> Iterator[list[Any] | str]:
    """Every list and every text in a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from leaves(one)
    elif isinstance(value, list):
        yield value
        for one in value:
            yield from leaves(one)


def in_script(script: str) -> Iterator[list[str]]:
    """The stepguard commands of a shell script, up to what ends each of them."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for at, word in enumerate(words):
            if word == "stepguard" or word.endswith("/bin/stepguard"):
                rest = words[at + 1 :]
                end = next((n for n, one in enumerate(rest) if set(one) <= set("&|;<>()")), len(rest))
                yield rest[:end]


def commands() -> list[tuple[str, list[str]]]:
    """Every stepguard command in the pages and examples, with the name of its file."""
    found = []
    for page in PAGES:
        blocks = (text for kind, text in BLOCK.findall(page.read_text()) if kind in {"sh", "bash"})
        found += [(page.name, words) for text in blocks for words in in_script(text)]
    for script in (*named("*.sbatch"), *named("*.sh")):
        found += [(script.name, words) for words in in_script(script.read_text())]
    for path in named("*.yaml"):
        for value in leaves(documents(path)):
            if isinstance(value, list) and "stepguard" in value:
                assert all(isinstance(word, str) for word in value), (
                    f"{path.name}: quote the numbers: {value}"
                )
                found.append((path.name, value[value.index("stepguard") + 1 :]))
    return found


def settings() -> list[tuple[str, str]]:
    """Every configuration in the pages and examples."""
    found = [(path.name, path.read_text()) for path in named("*.toml")]
    for page in PAGES:
        found += [(page.name, text) for kind, text in BLOCK.findall(page.read_text()) if kind == "toml"]
    for path in named("kubernetes-*.yaml"):
        maps = [document["data"] for document in documents(path) if document["kind"] == "ConfigMap"]
        assert maps, f"{path.name} has no configuration"
        found += [(path.name, text) for data in maps for text in data.values()]
    return found


def parse(words: list[str]) -> None:
    """Put a command line to its own parser, without running the command; typer's error where it is wrong."""
    assert words[0] in COMMANDS, f"no such command: {words[0]}"
    command: Any = get_command(_app(words[0])).commands[words[0]]  # type: ignore[attr-defined]
    rest = words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(words[0], list(rest))


@pytest.mark.parametrize(
    ("file", "words"), commands(), ids=lambda one: one if isinstance(one, str) else one[0]
)
def test_every_command_shown_is_one_that_the_command_line_takes(file: str, words: list[str]) -> None:
    parse(words)


def test_each_page_and_example_was_looked_at() -> None:
    assert {file for file, _ in commands()} == {
        *(page.name for page in PAGES),
        *(path.name for path in (*named("*.yaml"), *named("*.sbatch"), *named("*.sh"))),
    }
    assert {"exec", "wait", "status", "run", "drill"} <= {words[0] for _, words in commands()}


@pytest.mark.parametrize("words", [["exec", "--no-such", "--", "true"], ["wait", "--timeout-s", "soon"]])
def test_a_command_that_is_wrong_would_be_found(words: list[str]) -> None:
    with pytest.raises(typer.TyperException):
        parse(words)


@pytest.mark.parametrize(("file", "text"), settings(), ids=lambda one: one[:30].splitlines()[0])
def test_every_configuration_shown_is_valid(file: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    load_config(path)
    path.write_text(text + "[probe]\nno_such_key = 1\n")
    with pytest.raises(ConfigError, match="no_such_key"):
        load_config(path)


@pytest.mark.parametrize("script", [*named("*.sbatch"), *named("*.sh")], ids=lambda path: path.name)
def test_every_script_is_one_that_bash_reads(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stderr) == (0, "")


STAND_IN = """#!/bin/bash
[ "$1" = wait ] && exit 0
for word; do case "$word" in run.state_dir=*) state="${word#run.state_dir=}" ;; esac; done
mkdir -p "$state/incidents/1"
trap 'echo usr1 >>heard' USR1
trap 'echo term >>heard; exit 7' TERM
echo up >>heard
while :; do sleep 0.05; done
"""


@pytest.mark.e2e
def test_the_batch_script_hands_signals_on_and_ends_with_the_trainers_code(tmp_path: Path) -> None:
    """Slurm's warning must not end the job, and the reports are there afterwards."""
    (tmp_path / "stepguard").write_text(STAND_IN)
    (tmp_path / "stepguard").chmod(0o755)
    heard, job = tmp_path / "heard", f"test-{os.getpid()}"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": job}
    child = subprocess.Popen(["bash", EXAMPLES / "train.sbatch"], cwd=tmp_path, env=environment)
    try:
        for signum, answer in ((None, "up"), (signal.SIGUSR1, "usr1"), (signal.SIGTERM, "term")):
            if signum is not None:
                child.send_signal(signum)
            deadline = time.monotonic() + 20
            while not (heard.exists() and answer in heard.read_text()):
                assert time.monotonic() < deadline, f"{answer} was not heard"
                time.sleep(0.02)
        assert child.wait(timeout=20) == 7
    finally:
        child.kill()
        child.wait(timeout=10)
    assert heard.read_text().split() == ["up", "usr1", "term"]
    assert (tmp_path / f"incidents-{job}" / "1").is_dir()
    assert not Path(f"/tmp/stepguard-{job}").exists()


@pytest.mark.parametrize("path", named("kubernetes-*.yaml"), ids=lambda path: path.name)
def test_what_a_pod_mounts_it_has(path: Path) -> None:
    """A name that is mistyped would leave the pod pending."""
    jobs = [document for document in documents(path) if document["kind"] == "Job"]
    maps = {document["metadata"]["name"] for document in documents(path) if document["kind"] == "ConfigMap"}
    assert len(jobs) == 1
    pod = jobs[0]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
    assert mounted == set(volumes)
    assert {volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume} == maps
    assert ("shared" in path.name) == bool(pod.get("shareProcessNamespace"))


@pytest.mark.parametrize("path", named("compose*.yaml"), ids=lambda path: path.name)
def test_what_compose_mounts_is_beside_it(path: Path) -> None:
    (document,) = documents(path)
    for service in document["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source in document["volumes"] or source.startswith("/") or (EXAMPLES / source).exists()


def composed(path: Path) -> subprocess.CompletedProcess[str]:
    """What Compose's own schema says to a file."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("path", named("compose*.yaml"), ids=lambda path: path.name)
def test_compose_would_take_the_file(path: Path, tmp_path: Path) -> None:
    done = composed(path)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(path.read_text().replace("healthcheck:", "healthchecks:"))
    assert "healthchecks" in composed(wrong).stdout


@pytest.mark.parametrize("path", named("kubernetes-*.yaml"), ids=lambda path: path.name)
def test_kubernetes_would_take_every_object(path: Path) -> None:
    """1.29 is the first with sidecars; strict, so that a key it does not know is an error."""
    for document in documents(path):
        validate(document, "1.29", strict=True)
        with pytest.raises(ValidationError, match="no_such_key"):
            validate({**document, "no_such_key": 1}, "1.29", strict=True)


def test_one_container_is_started_alike_by_both_engines() -> None:
    """Compose's command is what is tried in a container (tests/supervised/test_container.py)."""
    (compose,) = documents(EXAMPLES / "compose.yaml")
    jobs = [one for one in documents(EXAMPLES / "kubernetes-exec.yaml") if one["kind"] == "Job"]
    (container,) = jobs[0]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == compose["services"]["train"]["command"]
