"""`stepguard replay`: what Stepguard would have done in a recorded run."""

import gc
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from stepguardd.cli.output import console, fail, print_json, say
from stepguardd.core.reward import RewardConfig
from stepguardd.history import HistoryError, read_history
from stepguardd.oneline import one_line
from stepguardd.replay import Replayed, as_json
from stepguardd.replay import replay as run


def replay(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE…", help="CSV, JSON lines, a W&B run, TensorBoard files, or a log."),
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
    """Judge recorded runs as live ones would be: what would have been held, what warned about."""
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
