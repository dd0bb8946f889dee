"""`stepguard report`: the report on an incident, as the daemon wrote it or as it stands now."""

import json as jsonlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stepguardd.cli.output import bad_news, console, fail, print_json, say
from stepguardd.cli.runs import AsJson, ConfigFile, RunDir, state_dir_of
from stepguardd.incidents.folders import DATA, MARKDOWN, PAGE, folder_of, kept


def report(
    incident: Annotated[
        int | None,
        typer.Argument(
            metavar="INCIDENT", min=1, help="Its number. By default the newest.", show_default=False
        ),
    ] = None,
    *,
    run_dir: RunDir = None,
    config: ConfigFile = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            "--state-dir", metavar="DIR", help="The run's state_dir; needs no daemon and no config."
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="All incidents, one a line.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Write it anew from the journal first.")] = False,
    json: AsJson = False,
) -> None:
    """
    What happened in an incident, why, what was done, and what to do: the report, as Markdown.

    Reports lie in <state_dir>/incidents/<number>: report.md, report.html, logs, metrics, decisions.
    """
    home = state_dir if state_dir is not None else state_dir_of(config, run_dir)
    numbers = _known(home)
    if list_:
        _list(home, numbers, as_json=json)
        return
    if not numbers:
        bad_news(f"no incident so far: {home} has none")
    number = numbers[-1] if incident is None else incident
    if number not in numbers:
        shown = ", ".join(map(str, numbers[-12:]))
        fail(f"there is no incident {number}; there is {'… ' if len(numbers) > 12 else ''}{shown}")
    folder = folder_of(home, number)
    told = _read(folder)
    if again or told is None or told.get("stage") != "closed":
        told = _written_anew(home, folder, number, kept_report=told)
    if json:
        print_json(
            {**told, "folder": str(folder), "markdown": str(folder / MARKDOWN), "page": str(folder / PAGE)}
        )
    elif open_:
        _open(folder / PAGE)
    else:
        typer.echo((folder / MARKDOWN).read_text(encoding="utf-8"), nl=False)
        if sys.stdout.isatty():
            say(f"the page: {folder / PAGE}")


def _known(home: Path) -> list[int]:
    from stepguardd.incidents.passage import incidents  # noqa: PLC0415 - pydantic, once it is needed
    from stepguardd.journal import JournalError  # noqa: PLC0415 - as above

    try:
        told = incidents(home / "journal.db")
    except JournalError as error:
        if not kept(home):
            fail(str(error))
        told = []
    return sorted({*kept(home), *told})


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        told = jsonlib.loads((folder / DATA).read_bytes())
        return told if isinstance(told, dict) and (folder / MARKDOWN).is_file() else None
    except (OSError, ValueError):
        return None


def _written_anew(
    home: Path, folder: Path, number: int, *, kept_report: dict[str, Any] | None
) -> dict[str, Any]:
    """The report as the journal tells it now; an older one is good enough where that cannot be had."""
    from stepguardd.incidents.collected import Collected, read_collected  # noqa: PLC0415 - late, as it is heavy
    from stepguardd.incidents.report import ReportError  # noqa: PLC0415 - as above
    from stepguardd.incidents.writing import as_json, write_report  # noqa: PLC0415 - as above

    collected = read_collected(folder) or Collected(
        run=home.name, incident=number, journal=str(home / "journal.db")
    )
    try:
        with console(as_json=True).status("writing the report"):
            return as_json(write_report(collected, folder))
    except (ReportError, OSError) as error:
        if kept_report is None:
            bad_news(f"no report on incident {number}: {error}")
        say(f"this is the report as it was written before: {error}")
        return kept_report


def _list(home: Path, numbers: list[int], *, as_json: bool) -> None:
    rows = []
    for number in numbers:
        told = _read(folder_of(home, number)) or {}
        rows.append(
            {
                "incident": number,
                "stage": told.get("stage"),
                "title": told.get("title"),
                "onset_step": told.get("onset_step"),
                "opened_wall": told.get("opened_wall"),
                "folder": str(folder_of(home, number)),
            }
        )
    if as_json:
        print_json(rows)
        return
    for row in rows:
        since = "" if row["onset_step"] is None else f", step {row['onset_step']}"
        line = f"{row['stage']}{since}: {row['title']}" if row["title"] else "no report yet"
        typer.echo(f"{row['incident']:>4}  {line}")
    if not rows:
        say(f"no incident so far: {home} has none")


def _open(page: Path) -> None:
    """Hand the page to the desktop; where there is none, its path is the answer."""
    if not page.is_file():
        bad_news(f"{page}: was not written; install plotly: pip install 'stepguard[daemon]'")
    has_desktop = bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or os.environ.get("BROWSER")
    )
    if has_desktop:
        try:
            subprocess.Popen(
                [os.environ.get("BROWSER", "xdg-open"), str(page)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            say(f"no browser could be started: {error.strerror}")
    else:
        say("no desktop here; copy the page to where there is one, it needs no other file")
    typer.echo(str(page))
