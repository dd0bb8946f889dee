"""
The command line `stepguard`: one module per command, imported only when that command runs.

Promises: `--help` and `--version` import no command; a wrong use is one line on stderr and exit code 2; a
command whose extra is not installed says which one to install.
"""

import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, NoReturn

import typer
from typer.main import get_command

# Each command, in the order of the help. Its module is named like it and exports a function of that name, or,
# for a command with commands of its own, a `typer.Typer` called `app`.
COMMANDS = {
    "run": "Watch a training run, and protect it.",
    "exec": "Run a command with the daemon beside it.",
    "wait": "Block until servers and GPUs are ready.",
    "agent": "Serve another machine of a run; its head decides.",
    "cluster": "Place an agent on every machine of a Ray cluster.",
    "status": "How the run is, and what to do.",
    "pause": "Hold the run before its next optimizer step.",
    "resume": "Let a held run go on.",
    "ack": "Take an incident in hand, by name and with a reason.",
    "rollback": "Go back to a checkpoint from before the trouble.",
    "restart-server": "Restart an inference server; renew its weights.",
    "plan-server": "Announce a server's silence, so that it holds nothing.",
    "mode": "How far Stepguard may go by itself.",
    "open": "A link that opens the run's page.",
    "init": "Write a config for what runs on this machine.",
    "doctor": "Check this machine: is all well, and what helps if not.",
    "demo": "A real training run with a real fault, protected.",
    "simulate": "Days of a run in minutes, faults and all.",
    "drill": "Strike a server of a staging run; a scorecard.",
    "config": "Check, show and explain the configuration.",
    "checkpoints": "List, vet and choose checkpoints.",
    "replay": "What Stepguard would have done in a recorded run.",
    "tune": "Find settings for the reward tests from recorded runs.",
    "shim": "W&B's rows at once, without a change to the code.",
    "stream": "Show the reward stream as Stepguard reads it.",
    "completion": "Complete commands and options in your shell.",
    "alert-test": "Send a test message through every alert channel.",
    "install-service": "Install the systemd units.",
    "report": "What happened in an incident, and what to do.",
    "diagnose": "What most likely went wrong, with the evidence.",
}
COMPLETE = "_STEPGUARD_COMPLETE"
EXTRAS = {"demo": "demo"}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line on these arguments (default: the process's own) and exit with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if COMPLETE in os.environ and arguments is None:
        _complete()
    wanted = next((word for word in given if not word.startswith("-")), None)
    if wanted is None and "--version" in given:  # typer would load pydantic to read this one flag
        _print_version()
    try:
        code = get_command(_app(wanted)).main(given, prog_name="stepguard", standalone_mode=False)
    except typer.TyperException as wrong:
        _wrong_use(wrong, wanted)
    except typer.Abort:
        print("stepguard: stopped", file=sys.stderr)
        raise SystemExit(1) from None
    except ModuleNotFoundError as missing:
        _not_installed(wanted or "", missing)
    raise SystemExit(code if isinstance(code, int) else 0)


def _complete() -> NoReturn:
    """Answer a shell that completes a line; of the commands, only the one in the line is real."""
    words = os.environ.get("_TYPER_COMPLETE_ARGS", os.environ.get("COMP_WORDS", "")).split()[1:]
    wanted = next((word for word in words if word in COMMANDS), None)
    get_command(_app(wanted, completes=True)).main([], prog_name="stepguard")
    raise SystemExit(0)


def _app(wanted: str | None, *, completes: bool = False) -> typer.Typer:
    """The whole command line, of which only the wanted command is real; the others are there to be listed."""
    app = typer.Typer(
        add_completion=completes,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
        help="A circuit breaker for RL post-training: no optimizer step on garbage, and no night lost.",
        epilog="Exit codes: 0 done, 1 the answer is bad news, 2 wrong use. "
        "With --json, stdout is JSON and nothing else.",
    )
    app.callback(invoke_without_command=True)(_root)
    for name, help_line in COMMANDS.items():
        if not (Path(__file__).parent / f"{_module(name)}.py").exists():
            continue
        if name == wanted:
            _add(app, name, importlib.import_module(f"stepguardd.cli.{_module(name)}"), help_line)
        else:
            app.command(name, help=help_line)(lambda: None)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        _print_version()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _print_version() -> NoReturn:
    from stepguard import __version__  # noqa: PLC0415 - only this flag needs it

    typer.echo(f"stepguard {__version__}")
    raise SystemExit(0)


def _add(app: typer.Typer, name: str, module: ModuleType, help_line: str) -> None:
    group = getattr(module, "app", None)
    if isinstance(group, typer.Typer):
        app.add_typer(group, name=name, help=help_line)
    else:
        context = getattr(module, "CONTEXT", None)
        app.command(name, context_settings=context)(getattr(module, _module(name)))


def _module(name: str) -> str:
    return name.replace("-", "_")


def _not_installed(name: str, missing: ModuleNotFoundError) -> NoReturn:
    """One line with the extra to install; a missing part of our own is a bug and shows its traceback."""
    if missing.name is None or missing.name.startswith("stepguard"):
        raise missing
    extra = EXTRAS.get(name, "daemon")
    print(
        f"stepguard: {name} needs {missing.name}, which is not installed; "
        f"install it with: pip install 'stepguard[{extra}]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None


# The library's words for a value that does not fit, as a person would say them.
_PLAINER = (
    (r"Input should be ", "must be "),
    (r", unable to parse string as an? \w+", ""),
    (r"Value error, ", ""),
    (r"Got unexpected extra arguments?(?:\(s\))? \((.*?)\)", r"there is no place for: \1"),
    (r"\bvalid integer\b", "whole number"),
    (r"\bvalid number\b", "number"),
    (r"greater than or equal to", "at least"),
    (r"less than or equal to", "at most"),
)


def _wrong_use(wrong: typer.TyperException, wanted: str | None) -> NoReturn:
    """One line: what is wrong, and where the right use is written."""
    context = getattr(wrong, "ctx", None)
    named = f"stepguard {wanted}" if wanted in COMMANDS else "stepguard"
    command = named if context is None else context.command_path
    text = " ".join(wrong.format_message().split()).rstrip(".")
    for pattern, plainer in _PLAINER:
        text = re.sub(pattern, plainer, text)
    print(f"stepguard: {text} (see: {command} --help)", file=sys.stderr)
    raise SystemExit(2)
