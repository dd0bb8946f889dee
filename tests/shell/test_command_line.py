"""The command line: one line for every mistake, the exit codes it promises, and JSON alone on stdout."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shell.fake_daemon import WELL, FakeDaemon, serving
from stepguardd.cli import COMMANDS, main
from stepguardd.control.contract import SOCKET_NAME
from stepguardd.control.server import listen

HERE = [
    name
    for name in COMMANDS
    if (Path(main.__code__.co_filename).parent / f"{name.replace('-', '_')}.py").exists()
]


@pytest.fixture(autouse=True)
def no_run_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that happens to live here must not be found, and this terminal's width must not matter."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("STEPGUARD_RUN_DIR", *(name for name in os.environ if name.startswith("STEPGUARD__"))):
        monkeypatch.delenv(name, raising=False)


def stepguard(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


def failing(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Exit code and the one line on stderr of a command that cannot do what is asked."""
    code, out, err = stepguard(capsys, *arguments)
    assert out == ""
    assert err.startswith("stepguard: ")
    assert err.count("\n") == 1
    return code, err.removeprefix("stepguard: ").strip()


def test_help_and_version_import_no_command_and_no_heavy_library() -> None:
    for flag in ("--help", "--version"):
        code = (
            f"import sys; from stepguardd.cli import main\ntry: main(['{flag}'])\nexcept SystemExit: pass\n"
            "heavy = {'pydantic', 'httpx', 'fastapi', 'uvicorn', 'rich', 'numpy', 'asyncio', 'apscheduler'}\n"
            "ours = {m for m in sys.modules if m.startswith('stepguardd.') and m != 'stepguardd.cli'}\n"
            "print(sorted(heavy & set(sys.modules)), sorted(ours))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
        )
        assert done.stdout.splitlines()[-1] == "[] []"


def test_help_names_every_command_within_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        code, out, err = stepguard(capsys, *arguments)
        assert (code, err) == (0, "")
        assert max(map(len, out.splitlines())) <= 80
        for name in HERE:
            assert f"\n  {name} " in out
        assert "..." not in out.partition("Commands:")[2], "a command's line of help is too long"


@pytest.mark.parametrize("name", HERE)
def test_every_command_explains_itself_and_speaks_json(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = stepguard(capsys, name, "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    if "Commands:" not in out:
        assert "--json" in out


def test_the_version_is_the_packages_own(capsys: pytest.CaptureFixture[str]) -> None:
    import stepguard as trainers_package

    assert stepguard(capsys, "--version") == (0, f"stepguard {trainers_package.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["stattus"], "No such command 'stattus'. Did you mean 'status'? (see: stepguard --help)"),
        (["status", "--jsn"], "No such option: --jsn"),
        (["config"], "Missing command (see: stepguard config --help)"),
        (["config", "check", "--config"], "Option '--config' requires an argument"),
        (["rollback", "--before-step", "x"], "Invalid value for '--before-step'"),
        (["status", "--every", "0"], "Invalid value for '--every'"),
        (["--nonsense"], "No such option: --nonsense"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    code, said = failing(capsys, *arguments)
    assert code == 2
    assert said.startswith(line)
    assert "--help)" in said


def test_a_library_that_is_not_installed_is_named_with_its_extra() -> None:
    code = "import sys; sys.modules['pydantic'] = None; from stepguardd.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "config", "check"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    needed, remedy = done.stderr.split("; ")
    assert needed == "stepguard: config needs pydantic, which is not installed"
    assert remedy == "install it with: pip install 'stepguard[daemon]'\n"


# --- a running daemon ---


def test_status_of_a_run_that_is_well(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with serving(tmp_path, FakeDaemon()):
        code, out, err = stepguard(capsys, "status", "--run-dir", tmp_path)
    assert (code, err) == (0, "")
    assert "GOING" in out
    assert "step 188" in out
    assert "What to do  Nothing." in out


@pytest.mark.parametrize("phase", ["open", "locked_out", "forced_open"])
def test_status_of_a_held_run_is_bad_news(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, phase: str
) -> None:
    state = {**WELL, "breaker": {"phase": phase, "since_s": 1.0, "reason": "server_exited"}}
    with serving(tmp_path, FakeDaemon(state)):
        assert stepguard(capsys, "status", "--run-dir", tmp_path)[0] == 1
        code, out, err = stepguard(capsys, "status", "--run-dir", tmp_path, "--json")
    assert (code, err) == (1, "")
    assert json.loads(out) == state


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["pause"], ("pause", {})),
        (["resume"], ("resume", {})),
        (["rollback", "--yes"], ("rollback", {"before_step": None})),
        (["rollback", "--yes", "--before-step", "188"], ("rollback", {"before_step": 188})),
        (["plan-server"], ("plan-server", {"server": None, "for_s": 600.0})),
        (["plan-server", "sglang", "--for", "0"], ("plan-server", {"server": "sglang", "for_s": 0.0})),
        (["restart-server", "-y"], ("restart-server", {"server": None})),
        (["restart-server", "sglang", "-y"], ("restart-server", {"server": "sglang"})),
        (["mode", "shadow"], ("mode", {"mode": "shadow"})),
        (["ack"], ("ack", {"incident": None})),
        (["ack", "3"], ("ack", {"incident": "3"})),
    ],
)
def test_a_wish_goes_to_the_daemon_and_its_answer_to_the_person(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    asked: tuple[str, dict[str, Any]],
) -> None:
    daemon = FakeDaemon()
    with serving(tmp_path, daemon):
        said = stepguard(capsys, *arguments, "--run-dir", tmp_path, "--why", "a look")
        said_in_json = stepguard(capsys, *arguments, "--run-dir", tmp_path, "--why", "a look", "--json")
    message = f"{asked[0]} is under way"
    assert said == (0, f"{message}\n", "")
    assert said_in_json == (0, json.dumps({"message": message}) + "\n", "")
    assert [(verb, why, args) for verb, _, why, args in daemon.asked] == [(asked[0], "a look", asked[1])] * 2


def test_mode_without_a_word_says_which_is_in_force_and_what_it_means(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with serving(tmp_path, FakeDaemon()):
        said = stepguard(capsys, "mode", "--run-dir", tmp_path)
        said_in_json = stepguard(capsys, "mode", "--run-dir", tmp_path, "--json")
        wrong = stepguard(capsys, "mode", "brave", "--run-dir", tmp_path)
    assert said == (0, "Mode act: it holds, restarts servers and rolls back by itself.\n", "")
    assert said_in_json == (0, '{"mode": "act"}\n', "")
    assert wrong[:2] == (2, "")
    assert "'shadow', 'hold', 'act'" in wrong[2]


@pytest.mark.parametrize("command", ["rollback", "restart-server"])
def test_what_interrupts_a_run_needs_a_yes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    """A script has no terminal to be asked on."""
    daemon = FakeDaemon()
    with serving(tmp_path, daemon):
        done = subprocess.run(
            [sys.executable, "-c", "from stepguardd.cli import main; main()", command, "--run-dir", tmp_path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "stepguard: this interrupts the run: add --yes\n"
    assert daemon.asked == []


def test_a_refusal_is_bad_news_with_the_daemons_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with serving(tmp_path, FakeDaemon(refusal="nothing is paused")):
        assert failing(capsys, "resume", "--run-dir", tmp_path) == (
            1,
            "the daemon will not: nothing is paused",
        )


# --- which run ---


def test_without_a_daemon_the_socket_and_the_remedy_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, said = failing(capsys, "status", "--run-dir", tmp_path)
    assert code == 1
    assert said == (
        f"no daemon at {tmp_path}/control.sock: No such file or directory; start one with: stepguard run "
        f"--config FILE"
    )
    assert failing(capsys, "status", "--json", "--run-dir", tmp_path)[0] == 1


def test_the_run_is_named_by_flag_config_or_environment(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[run]\nrun_dir = "here"')
    (tmp_path / "here").mkdir()
    with serving(tmp_path / "here", FakeDaemon()):
        assert stepguard(capsys, "status", "--config", file)[0] == 0
        assert stepguard(capsys, "status", "--run-dir", tmp_path / "here")[0] == 0
        monkeypatch.setenv("STEPGUARD_RUN_DIR", str(tmp_path / "here"))
        assert stepguard(capsys, "status")[0] == 0
        code, said = failing(capsys, "status", "--config", file, "--run-dir", tmp_path)
    assert (code, said) == (2, "give --config or --run-dir, not both: each names a run")
    file.write_text("[rum]")
    code, said = failing(capsys, "status", "--config", file)
    assert (code, said) == (2, f"{file}:1: unknown key rum; did you mean [run]?")


def test_the_only_run_of_this_user_is_taken_and_several_are_listed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    runs = tmp_path / "stepguard"
    for name in ("a", "b", "killed"):
        (runs / name).mkdir(parents=True)
    listen(runs / "killed" / SOCKET_NAME).close()  # what a killed daemon leaves behind
    with serving(runs / "a", FakeDaemon()):
        assert stepguard(capsys, "status")[0] == 0
        with serving(runs / "b", FakeDaemon()):
            code, said = failing(capsys, "status")
    assert (code, said) == (2, f"several runs, choose one with --run-dir: {runs}/a, {runs}/b")
    (code, said) = failing(capsys, "status")
    assert code == 1
    assert said.startswith(f"no daemon at {runs}/killed/control.sock: Connection refused")


def test_without_any_run_the_places_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    code, said = failing(capsys, "status")
    assert code == 1
    assert f"{tmp_path}/stepguard" in said
    assert "/run/stepguard" in said


# --- config ---


def test_config_check_says_good_or_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[server]\nurl = "http://127.0.0.1:1"\nbackend = "none"')
    assert stepguard(capsys, "config", "check", "--config", file) == (
        0,
        f"{file}: good. Run 'run', mode 'hold', 1 server.\n",
        "",
    )
    code, out, err = stepguard(capsys, "config", "check", "--config", file, "--json")
    assert (code, json.loads(out), err) == (0, {"ok": True, "error": None, "warnings": []}, "")
    code, out, err = stepguard(capsys, "config", "check", "--set", "probe.x=1", "--json")
    assert (code, json.loads(out)["ok"]) == (2, False)
    assert failing(capsys, "config", "check", "--set", "probe.x=1")[0] == 2


def test_config_show_tells_where_each_value_is_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[server]\nurl = "http://h:1"\ncommand = ["a"]\nenv = { TOKEN = "hunter2" }')
    monkeypatch.setenv("STEPGUARD__RUN__MODE", "act")
    code, out, err = stepguard(capsys, "config", "show", "--config", file, "--set", "probe.timeout_s=4")
    assert (code, err) == (0, "")
    assert f'servers.0.url = "http://h:1"  (file: {file}:2)\n' in out
    assert 'run.mode = "act"  (env: STEPGUARD__RUN__MODE)\n' in out
    assert "probe.timeout_s = 4  (flag)\n" in out
    assert "probe.interval_s = 1  (default)\n" in out
    assert "hunter2" not in out
    code, out, err = stepguard(capsys, "config", "show", "--config", file, "--json")
    assert json.loads(out)["servers.0.url"] == {"value": "http://h:1", "origin": "file", "place": f"{file}:2"}


def test_config_schema_is_the_annotated_file_or_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    assert stepguard(capsys, "config", "schema") == (0, (root / "config.toml").read_text(), "")
    assert "properties" in json.loads(stepguard(capsys, "config", "schema", "--json")[1])


@pytest.mark.e2e
def test_watching_goes_on_while_the_daemon_is_away_until_ctrl_c(tmp_path: Path) -> None:
    """One JSON object a line; an absence is said on stderr and waited out."""
    command = [sys.executable, "-c", "from stepguardd.cli import main; main()", "status", "--watch", "--json"]
    command += ["--every", "0.1", "--run-dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert "no daemon: " in watching.stderr.readline()
        with serving(tmp_path, FakeDaemon()):
            seen = [json.loads(watching.stdout.readline()) for _ in range(2)]
        watching.send_signal(signal.SIGINT)
        rest = watching.stderr.read()
        assert watching.wait(10) == 130
    assert seen == [WELL, WELL]
    assert "Traceback" not in rest
