"""`stepguard diagnose`: what most likely went wrong, with the evidence for and against."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from stepguardd.cli.output import console, fail, print_json, say
from stepguardd.cli.replay import settings
from stepguardd.diagnosis.case import CaseError, investigate
from stepguardd.diagnosis.report import as_json, as_markdown, as_page


def diagnose(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH…", help="A run's folder, or its metrics, logs, kernel log. Default: here."
        ),
    ] = None,
    *,
    at: Annotated[
        int | None,
        typer.Option("--at", metavar="STEP", min=0, help="Explain this step. By default the first incident."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The configuration to judge by.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="KEY", help="The reward's name. By default found.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, and nothing else.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write the report and the curve to one page.")
    ] = None,
) -> None:
    """Read metrics, logs, kernel log and checkpoints of a run, and say what most likely went wrong."""
    judged_by, named = settings(config, metric)
    try:
        with console(as_json=True).status("reading") as status:
            case = investigate(
                paths or [Path()],
                judged_by,
                metric=named,
                at=at,
                progress=lambda what: status.update(escape(f"reading {what}")),
            )
    except CaseError as wrong:
        fail(str(wrong))
    if html is not None:
        try:
            html.write_text(as_page(case), encoding="utf-8")
        except ModuleNotFoundError:
            fail("--html needs plotly; install it with: pip install 'stepguard[daemon]'")
        except OSError as wrong:
            fail(f"{html}: {wrong.strerror}")
        say(f"wrote {html}")
    if json:
        print_json(as_json(case))
    else:
        typer.echo(as_markdown(case), nl=False)
