"""`stepguard replay`: what Stepguard would have done in a recorded run."""

import gc
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from stepguardd.cli.output import console, fail, print_json, say
from stepguardd.core.reward import RewardConfig
from stepguardd.history import HistoryError, read_history
from stepguardd.incidents.folders import is_decision_log
from stepguardd.oneline import one_line
from stepguardd.replay import Replayed, as_json
from stepguardd.replay import replay as run


def replay(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…",
            help="CSV, JSON lines, a W&B run, TensorBoard files, a log; or an incident's decisions.jsonl.",
        ),
    ],
    *,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The configuration to judge by.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="KEY", help="The reward's name. By default found.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a file, and nothing else.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write the curves to one page.")
    ] = None,
) -> None:
    """
    Judge recorded runs as live ones would be: what would have been held, what warned about.

    An incident's decisions.jsonl is decided again instead, and compared byte for byte: exit code 1 if
    anything comes out otherwise.
    """
    logs = [path for path in files if is_decision_log(path)]
    if logs:
        if len(logs) < len(files) or html is not None or config is not None or metric is not None:
            fail("a decision log is decided again by itself: no other files, no option but --json")
        _decide_again(logs, as_json=json)
        return
    judged_by, named = settings(config, metric)
    try:
        with _without_collecting(), console(as_json=True).status("reading") as status:
            # Read all before judging any: a bad file is wrong use, and wrong use prints no half answer.
            histories = [read_history(path, metric=named) for path in files]
            results = []
            for history in histories:
                status.update(escape(f"judging {history.source}"))
                results.append(run(judged_by, history))
    except HistoryError as wrong:
        fail(str(wrong))
    for result in results:
        if json:
            print_json(as_json(result))
        else:
            _show(result)
    if html is not None:
        from stepguardd.curves import page  # noqa: PLC0415 - only this option needs plotly

        try:
            html.write_text(page(results), encoding="utf-8")
        except ModuleNotFoundError:
            fail("--html needs plotly; install it with: pip install 'stepguard[daemon]'")
        except OSError as wrong:
            fail(f"{html}: {wrong.strerror}")
        say(f"wrote {html}")


def _decide_again(logs: list[Path], *, as_json: bool) -> None:
    from stepguardd.incidents.decisions import DecisionLogError, redecide  # noqa: PLC0415 - pydantic, for these

    same = True
    for path in logs:
        try:
            result = redecide(path)
        except DecisionLogError as wrong:
            fail(str(wrong))
        difference = result.difference
        same = same and result.same
        if as_json:
            told = None if difference is None else asdict(difference)
            print_json(
                {
                    "source": result.source,
                    "incident": result.incident,
                    "decisions": result.decisions,
                    "commands": result.commands,
                    "same": result.same,
                    "first_difference": told,
                }
            )
            continue
        _say(f"{one_line(result.source)}: incident {result.incident}", indent=0)
        if difference is None:
            _say(
                f"{result.decisions} decisions decided again: all {result.commands} commands came out byte "
                "for byte as recorded"
            )
            continue
        _say(f"{result.decisions} decisions came out as recorded, then row {difference.seq} did not:")
        _say(f"event {difference.event}", indent=4)
        _say(f"recorded {one_line(difference.recorded, 600)}", indent=4)
        _say(f"decided  {one_line(difference.decided, 600)}", indent=4)
        _say("another version of Stepguard wrote it, or this one has a bug: please report it with the file")
    if not same:
        raise typer.Exit(1)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """A million small tuples and no cycle among them: collecting would take a third of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def settings(config: Path | None, metric: str | None) -> tuple[RewardConfig, str | None]:
    """The settings of the judgement and the reward's name: from the configuration, else the defaults."""
    if config is None:
        return RewardConfig(), metric
    from stepguardd.config import ConfigError, read_config  # noqa: PLC0415 - pydantic is for files
    from stepguardd.settings import core_settings  # noqa: PLC0415 - as above

    try:
        loaded = read_config(config).config
    except ConfigError as wrong:
        fail(str(wrong))
    named = None if loaded.reward.metric == "auto" else loaded.reward.metric
    return core_settings(loaded).reward, metric or named


def _show(result: Replayed) -> None:
    history = result.history
    size = len(history.steps)
    unknown = f", {history.unknown} unknown" if history.unknown else ""
    _say(one_line(history.source), indent=0)
    _say(f"{size} steps of {one_line(history.metric)}{unknown}")
    for trip in result.trips:
        end = "to the end" if trip.until >= size else f"until step {history.steps[trip.until]}"
        since = f"bad since {trip.onset_step}, {end}"
        _say(f"step {trip.step}: HOLD {trip.reason.value} ({trip.kind.value}), {since}")
        _say(", ".join(f"{key} {value:.4g}" for key, value in trip.evidence.items()), indent=4)
    for warning in result.warnings:
        _say(f"step {warning.step}: warning {warning.reason.value}")
    if not result.trips and not result.warnings:
        _say("nothing to hold, nothing to warn about")
    if result.garbage_steps_avoided:
        _say(f"{result.garbage_steps_avoided} optimizer steps on garbage would not have been taken")


def _say(text: str, indent: int = 2) -> None:
    for line in textwrap.wrap(text, 80 - indent, break_on_hyphens=False):
        typer.echo(" " * indent + line)
