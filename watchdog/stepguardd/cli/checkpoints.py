"""
`stepguard checkpoints list | verify | rollback`: checkpoints without a daemon.

`list` and `verify` change nothing. `rollback` sets newer checkpoints aside and moves the framework's marker;
it never asks, because `stepguard rollback --undo` brings everything back. Exit code 1: not everything is good
(`verify`), or nothing good is left (`rollback`, which then has touched nothing).
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepguardd import clock
from stepguardd.checkpoints.layouts import (
    Checkpoint,
    Folder,
    Framework,
    LayoutError,
    custom_layout,
    find_checkpoints,
    marker_step,
    open_folder,
    resumes_from,
    size_bytes,
)
from stepguardd.checkpoints.offline import OfflineRollback, roll_back_offline
from stepguardd.checkpoints.rollback import RollbackError, find_unfinished, undo_command
from stepguardd.checkpoints.vetting import VettingLimits, vet_all
from stepguardd.cli.output import console, fail, print_json, say
from stepguardd.core.choice import explain
from stepguardd.core.verdict import Depth, Verdict, Vetting

if TYPE_CHECKING:
    from rich.progress import Progress

app = typer.Typer(rich_markup_mode=None)

# A bar appears only for what takes longer than this.
QUIET_S = 2.0

AUTO = "auto"
FRAMEWORKS = (AUTO, *(framework.value for framework in Framework))

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", show_default=False, help="The folder that holds the checkpoints.")
]
Named = Annotated[
    str,
    typer.Option("--framework", metavar="NAME", help=f"Who wrote the checkpoints: {', '.join(FRAMEWORKS)}."),
]
Pattern = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="For --framework custom: one step's folder, e.g. 'ckpt-{step}'."),
]
MarkerName = Annotated[
    str | None,
    typer.Option("--marker", metavar="FILE", help="For --framework custom: the file with the newest step."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Bandwidth = Annotated[
    int | None, typer.Option(metavar="MIB", min=1, help="Read at most this many MiB a second.")
]


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("list")
def list_(
    directory: Directory,
    *,
    framework: Named = AUTO,
    pattern: Pattern = None,
    marker: MarkerName = None,
    json: AsJson = False,
) -> None:
    """Every checkpoint, and whether its files are whole. Numbers are not read."""
    folder = _open(directory, framework, pattern, marker)
    limits = VettingLimits(depth=Depth.STRUCTURE)
    checkpoints, verdicts = _vet(folder, limits, as_json=json)
    _show(folder, checkpoints, verdicts, as_json=json)


@app.command()
def verify(
    directory: Directory,
    *,
    framework: Named = AUTO,
    pattern: Pattern = None,
    marker: MarkerName = None,
    bandwidth: Bandwidth = None,
    json: AsJson = False,
) -> None:
    """Every checkpoint, read through: checksums, and every number finite. Exit 1 unless all are good."""
    folder = _open(directory, framework, pattern, marker)
    checkpoints, verdicts = _vet(folder, _full(bandwidth), as_json=json)
    _show(folder, checkpoints, verdicts, as_json=json)
    if any(vetting.verdict is not Verdict.GOOD for vetting in verdicts):
        raise typer.Exit(1)


@app.command()
def rollback(
    directory: Directory,
    *,
    before: Annotated[
        int, typer.Option(metavar="STEP", min=0, help="The first step of the trouble.", show_default=False)
    ],
    framework: Named = AUTO,
    pattern: Pattern = None,
    marker: MarkerName = None,
    bandwidth: Bandwidth = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")
    ] = False,
    json: AsJson = False,
) -> None:
    """
    Go back to the newest good checkpoint before STEP. Stop the trainer first.

    Newer checkpoints are set aside in DIR/quarantine, never deleted, and the framework's marker is moved.
    """
    folder = _open(directory, framework, pattern, marker)
    name = datetime.fromtimestamp(clock.wall(), UTC).strftime("%Y%m%dT%H%M%SZ")
    try:
        with _bar(_total(find_checkpoints(folder)), "Vetting") as advance:
            outcome = roll_back_offline(
                folder,
                before,
                name=name,
                dry_run=dry_run,
                limits=_full(bandwidth),
                progress=lambda checkpoint, read_bytes: advance(str(checkpoint.path), read_bytes),
            )
    except RollbackError as error:
        fail(str(error))
    if outcome.settled is not None:
        say(f"finished the interrupted rollback {outcome.settled.name} first")
    if json:
        print_json(_rollback_json(folder, outcome))
    else:
        _tell(folder, outcome, before, dry_run=dry_run)
    if outcome.plan is None:
        raise typer.Exit(1)


def _open(directory: Path, name: str, pattern: str | None, marker: str | None) -> Folder:
    if name not in FRAMEWORKS:
        fail(f"--framework {name} is not known: use one of {', '.join(FRAMEWORKS)}")
    framework = None if name == AUTO else Framework(name)
    if framework is not Framework.CUSTOM and (pattern is not None or marker is not None):
        fail("--pattern and --marker belong to --framework custom")
    try:
        if framework is not Framework.CUSTOM:
            return open_folder(directory, framework)
        if pattern is None:
            fail("--framework custom needs --pattern, e.g. --pattern 'ckpt-{step}'")
        return open_folder(directory, custom=custom_layout(pattern, marker))
    except LayoutError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{directory} cannot be read: {error}")


def _full(bandwidth: int | None) -> VettingLimits:
    return VettingLimits(depth=Depth.FULL, bytes_per_s=None if bandwidth is None else bandwidth << 20)


def _vet(folder: Folder, limits: VettingLimits, *, as_json: bool) -> tuple[list[Checkpoint], list[Vetting]]:
    unfinished = find_unfinished(folder.root)
    if unfinished is not None:
        say(
            f"the rollback {unfinished.name} was interrupted: finish it with "
            f"stepguard checkpoints rollback, or take it back with {undo_command(folder.root)}"
        )
    checkpoints = find_checkpoints(folder)
    with _bar(_total(checkpoints), "Vetting") as advance:
        verdicts = vet_all(
            folder,
            checkpoints,
            limits,
            progress=lambda index, read_bytes: advance(str(checkpoints[index].path), read_bytes),
        )
    return checkpoints, verdicts


def _show(folder: Folder, checkpoints: list[Checkpoint], verdicts: list[Vetting], *, as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "step": checkpoint.step,
                    "path": str(checkpoint.path),
                    "verdict": vetting.verdict,
                    "reason": vetting.reason,
                    "bytes": vetting.size_bytes,
                }
                for checkpoint, vetting in zip(checkpoints, verdicts, strict=True)
            ]
        )
        return
    from rich.table import Table  # noqa: PLC0415 - only a drawing command pays for it

    screen = console(as_json=False)
    table = Table(box=None, pad_edge=False, width=min(80, screen.width))
    table.add_column("Step", justify="right", no_wrap=True)
    table.add_column("Verdict", no_wrap=True)
    table.add_column("Size", justify="right", no_wrap=True)
    table.add_column("Reason", overflow="fold", ratio=1)
    for checkpoint, vetting in zip(checkpoints, verdicts, strict=True):
        kept = "; a copy of Stepguard's own" if checkpoint.pinned else ""
        style = _STYLES[vetting.verdict]
        table.add_row(
            "?" if checkpoint.step is None else str(checkpoint.step),
            f"[{style}]{vetting.verdict}[/]",
            _size(vetting.size_bytes),
            _plain(vetting.reason + kept),
        )
    screen.print(f"{folder.layout.framework} checkpoints in {_plain(str(folder.root))}", soft_wrap=True)
    screen.print(table)
    screen.print(_plain(_resume_sentence(folder)))


_STYLES = {Verdict.GOOD: "green", Verdict.BAD: "red", Verdict.INCOMPLETE: "yellow", Verdict.UNKNOWN: "yellow"}


def _resume_sentence(folder: Folder) -> str:
    """What the framework would do by itself: the trap that a moved or missing folder sets."""
    name, markers = folder.layout.framework, folder.layout.markers
    step = resumes_from(folder)
    if step is not None:
        return f"{name} would resume from step {step}."
    if not markers:
        return f"{name} would find nothing to resume from."
    marked = marker_step(folder)
    if marked is None:
        return f"{markers[0][0]} is missing or names no step: {name} would not resume by itself."
    return (
        f"{markers[0][0]} names step {marked}, which is not there: {name} would not resume from any of these."
    )


def _rollback_json(folder: Folder, outcome: OfflineRollback) -> dict[str, object]:
    plan = outcome.plan
    if plan is None:
        return {"chosen": None, "quarantined": [], "marker": None, "undo": None}
    return {
        "chosen": plan.chosen_step,
        "quarantined": list(plan.from_steps),
        "marker": str(folder.root / plan.markers[0].path) if plan.markers else None,
        "undo": None if plan.empty else undo_command(folder.root),
    }


def _tell(folder: Folder, outcome: OfflineRollback, before: int, *, dry_run: bool) -> None:
    for line in explain(outcome.choice):
        typer.echo(textwrap.fill(f"Refused: {line}.", 80, subsequent_indent="  ", break_on_hyphens=False))
    plan = outcome.plan
    if plan is None:
        say(f"no good checkpoint before step {before} in {folder.root}; nothing was touched")
        return
    would = "Would go" if dry_run else "Went"
    typer.echo(f"{would} back to step {plan.chosen_step}.")
    if plan.empty:
        typer.echo("The folder already stands there: nothing to do.")
        return
    steps = ", ".join(str(step) for step in plan.from_steps) or "nothing"
    aside = "Would be set aside" if dry_run else "Set aside"
    typer.echo(f"{aside} in quarantine/{plan.name}: {steps}")
    for marker in plan.markers:
        typer.echo(f"{marker.path}: {_marker_words(marker.before)} -> {_marker_words(marker.after)}")
    if not dry_run:
        typer.echo(f"Undo with: {undo_command(folder.root)}")


def _marker_words(text: str | None) -> str:
    return "(none)" if text is None else text.strip()[:40] or "(empty)"


# --- progress -----------------------------------------------------------------------------------------------


@contextmanager
def _bar(total_bytes: int, words: str) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr for bytes read, from the third second on; told each path and its bytes so far."""
    started = clock.monotonic()
    read: dict[str, int] = {}
    shown: list[Progress] = []

    def advance(path: str, read_bytes: int) -> None:
        read[path] = read_bytes
        if clock.monotonic() - started < QUIET_S:
            return
        if not shown:
            shown.append(_start_bar(total_bytes, words))
        shown[0].update(shown[0].task_ids[0], completed=min(sum(read.values()), total_bytes))

    try:
        yield advance
    finally:
        for bar in shown:
            bar.stop()


def _start_bar(total_bytes: int, words: str) -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(24), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console(as_json=True), transient=True)
    bar.add_task(words, total=total_bytes)
    bar.start()
    return bar


def _total(checkpoints: list[Checkpoint]) -> int:
    return sum(size_bytes(checkpoint) for checkpoint in checkpoints)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _plain(text: str) -> str:
    from rich.markup import escape  # noqa: PLC0415

    return escape(text)
