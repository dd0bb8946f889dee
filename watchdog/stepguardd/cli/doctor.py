"""`stepguard doctor`: the one-shot check of this machine, with a remedy for whatever is not well."""

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from stepguardd.cli.output import console, fail, print_json
from stepguardd.cli.runs import AsJson, ConfigFile
from stepguardd.oneline import one_line

if TYPE_CHECKING:
    from stepguardd.doctor.examination import Examination

_WIDTH = 80
_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def doctor(
    *,
    config: ConfigFile = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Have each server generate one token: the proof that it lives.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read the newest checkpoints through, every number.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only what is not ok.")] = False,
    json: AsJson = False,
) -> None:
    """
    Check this machine once: servers, trainers, GPUs, memory, disks, checkpoints, clock, permissions.

    It needs no daemon and no config: what runs here is found in /proc. Nothing is changed. Exit code 1 if
    anything is bad.
    """
    if config is not None and not config.is_file():
        fail(f"{config}: there is no such file; without --config doctor finds out by itself")
    from rich.markup import escape  # noqa: PLC0415 - with the terminal's things, late

    from stepguardd.doctor.examination import examine  # noqa: PLC0415 - httpx, numpy and pydantic, late

    with console(as_json=True).status("looking") as status:
        examination = examine(
            config,
            generate=generate,
            deep=deep,
            progress=lambda what: status.update(escape(f"looking at {what}")),
        )
    if json:
        print_json(as_json(examination))
    else:
        _show(examination, quiet=quiet)
    if any(finding.level == "bad" for finding in examination.findings):
        raise typer.Exit(1)


def as_json(examination: "Examination") -> dict[str, object]:
    """The shape of `stepguard doctor --json`."""
    machine = examination.machine
    levels = [finding.level.value for finding in examination.findings]
    return {
        "ok": levels.count("ok"),
        "warn": levels.count("warn"),
        "bad": levels.count("bad"),
        "findings": [
            {
                "check": finding.check,
                "subject": finding.subject,
                "level": finding.level.value,
                "text": finding.text,
                "remedy": finding.remedy,
            }
            for finding in examination.findings
        ],
        "found": {
            "servers": [{"pid": one.process.pid, "url": one.url} for one in machine.servers],
            "trainers": [
                {"pid": one.process.pid, "framework": one.framework, "run_dir": one.run_dir}
                for one in machine.trainers
            ],
            "wandb": list(machine.wandb),
            "daemons": [path.parent for path in machine.sockets],
        },
    }


def _show(examination: "Examination", *, quiet: bool) -> None:
    from rich.text import Text  # noqa: PLC0415 - with the terminal's things, late

    screen = console(as_json=False)
    for finding in examination.findings:
        level = finding.level.value
        if quiet and level == "ok":
            continue
        head = f"{finding.check} {one_line(finding.subject, 200)}: "
        first, *rest = textwrap.wrap(head + one_line(finding.text, 600), _WIDTH - 6, break_on_hyphens=False)
        screen.print(Text.assemble((f"{level:<4}  ", _STYLES[level]), first), soft_wrap=True)
        for line in rest:
            screen.print(Text("      " + line), soft_wrap=True)
        if finding.remedy is not None:
            lines = textwrap.wrap(one_line(finding.remedy, 600), _WIDTH - 8, break_on_hyphens=False)
            for at, line in enumerate(lines):
                screen.print(Text(("      → " if not at else "        ") + line, "cyan"), soft_wrap=True)
    counts = as_json(examination)
    warned = f"{counts['warn']} warning{'' if counts['warn'] == 1 else 's'}"
    screen.print(Text(f"\n{counts['ok']} ok, {warned}, {counts['bad']} bad", "bold"), soft_wrap=True)
