"""
The demo as a person sees it: the reward's curve growing, the breaker's and the server's state, what was done.

On a terminal it is one picture that changes in place, within 80 columns; elsewhere it is one line for each
thing that happened. Colour never stands alone: every state is a word as well.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stepguard_grpo.ground_truth import TruthRecord

from ..cli.output import say
from .conduct import Plan, Progress
from .faults import Scenario
from .outcome import Figures, as_expected, ending

WIDTH: Final = 80
CHART_COLUMNS: Final = 66
CHART_ROWS: Final = 7
EVENTS_SHOWN: Final = 7
PLAIN_EVERY_STEPS: Final = 25
_BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_PHASE_STYLE: Final = {
    "closed": "bold green",
    "half_open": "bold yellow",
    "open": "bold red",
    "locked_out": "bold white on red",
    "forced_open": "bold magenta",
    "shadow": "bold cyan",
}


class View:
    """
    Draws one or two runs.

    Args:
        scenario: what is shown.
        plain: lines instead of a picture.
        picture: where to save the last picture as SVG.

    """

    def __init__(self, scenario: Scenario, *, plain: bool, picture: Path | None) -> None:
        self._scenario = scenario
        self._plain = plain
        self._picture = picture
        self._console = Console(stderr=True, highlight=False, width=WIDTH if not plain else None)
        self._live: Live | None = None
        self._runs: list[Progress] = []
        self._said = 0
        self._said_step = 0
        self._outcome: RenderableType | None = None

    def __enter__(self) -> Self:
        if self._plain:
            say(f"demo {self._scenario.fault.value}: {self._scenario.story}")
            say(f"expected: {self._scenario.expected}")
        else:
            self._live = Live(self._now(), console=self._console, refresh_per_second=8, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
            self._console.print(self._draw())
        if self._picture is not None and kind is None:
            self._save(self._picture)

    def begin(self, plan: Plan) -> None:
        """A run is about to begin."""
        self._runs.append(Progress(plan=plan))
        self._said = self._said_step = 0
        if self._plain:
            say(f"{_title(plan)}: starting server and trainer, {plan.steps} steps")
        self._refresh()

    def look(self, progress: Progress) -> None:
        """How the run is now."""
        self._runs[-1] = progress
        if self._plain:
            self._say(progress)
        self._refresh()

    def conclude(self, guarded: Figures, unguarded: Figures | None) -> None:
        """Both runs are over: what they came to."""
        self._outcome = _outcome(self._scenario, guarded, unguarded)
        if self._plain:
            self._console.print(self._outcome)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._now())

    def _say(self, progress: Progress) -> None:
        for event in progress.events[self._said :]:
            say(event)
        self._said = len(progress.events)
        if progress.records and progress.records[-1].step >= self._said_step + PLAIN_EVERY_STEPS:
            self._said_step = progress.records[-1].step
            reward = progress.records[-1].reward_mean_true
            garbage = sum(record.garbage for record in progress.records)
            say(
                f"step {self._said_step} of {progress.plan.steps}: reward "
                f"{'none' if reward is None else f'{reward:.2f}'}, {garbage} garbage steps"
            )

    def _now(self) -> Group:
        """What fits a terminal of 24 rows: the run under way, and a line for the one before."""
        before = [_summary(progress) for progress in self._runs[:-1]]
        return Group(self._head(), *before, *[_panel(progress) for progress in self._runs[-1:]])

    def _head(self) -> Text:
        return Text.assemble(
            ("stepguard demo", "bold"),
            "  ",
            (self._scenario.fault.value, "bold cyan"),
            f"  {self._scenario.story}",
            overflow="ellipsis",
            no_wrap=True,
        )

    def _draw(self) -> Group:
        """Everything: both runs, and what they came to."""
        parts: list[RenderableType] = [self._head()]
        parts.extend(_panel(progress) for progress in self._runs)
        if self._outcome is not None:
            parts.append(self._outcome)
        return Group(*parts)

    def _save(self, path: Path) -> None:
        console = Console(record=True, width=WIDTH, file=StringIO(), highlight=False, force_terminal=True)
        console.print(self._draw())
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = console.export_svg(title=f"stepguard demo --fault {self._scenario.fault.value}")
        # rich would have it load a font from the network; a picture in a repository should load nothing.
        path.write_text(re.sub(r"@font-face\s*{[^}]*}", "", picture))


def _title(plan: Plan) -> str:
    return "with Stepguard" if plan.guarded else "without Stepguard"


def _summary(progress: Progress) -> Text:
    garbage = sum(record.garbage for record in progress.records)
    return Text(f"{_title(progress.plan)}: {len(progress.records)} steps, {garbage} of them garbage", "dim")


def _panel(progress: Progress) -> Panel:
    plan = progress.plan
    parts: list[RenderableType] = [_chart(progress.records, plan.steps, progress.fault_step)]
    parts.append(_state(progress))
    done = progress.records[-1].step if progress.records else 0
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=plan.steps, completed=done, width=44),
        f"step {done} of {plan.steps}",
        f"{time.monotonic() - progress.began:.0f} s" if done < plan.steps else "done",
    )
    parts.append(bar)
    if plan.guarded and progress.events:
        events = Text()
        for event in progress.events[-EVENTS_SHOWN:]:
            events.append(f"· {event}"[: WIDTH - 6] + "\n", style="dim")
        events.rstrip()
        parts.append(events)
    return Panel(Group(*parts), title=_title(plan), title_align="left", width=WIDTH)


def _state(progress: Progress) -> Text:
    text = Text()
    garbage = sum(record.garbage for record in progress.records)
    if progress.plan.guarded:
        status: Mapping[str, Any] = progress.status
        phase = str((status.get("breaker") or {}).get("phase", "starting"))
        gate = str((status.get("gate") or {}).get("order", "-"))
        servers = status.get("servers") or [{}]
        server = str(servers[0].get("stage") or servers[0].get("state") or "starting")
        text.append("breaker ").append(phase.upper().replace("_", " "), _PHASE_STYLE.get(phase, "bold"))
        text.append("   gate ").append(gate, "bold green" if gate == "GO" else "bold red")
        text.append("   server ").append(server, "green" if server == "serving" else "yellow")
        text.append("   ")
    text.append("garbage steps ").append(str(garbage), "bold red" if garbage else "bold green")
    return text


def _chart(records: Sequence[TruthRecord], steps: int, fault_step: int | None) -> Text:
    """The reward by step: green what was learned from, red what was garbage; ▼ marks the fault."""
    columns = _columns(records, steps)
    text = Text()
    for row in range(CHART_ROWS, 0, -1):
        label = {CHART_ROWS: "1.0", 1: "0.0"}.get(row, "   ")
        text.append(f"{label} │" if row != 1 else f"{label} ┤", "dim")
        for value, garbage in columns:
            text.append(_cell(value, row), "red" if garbage else "green")
        text.append("\n")
    axis = ["─"] * CHART_COLUMNS
    if fault_step is not None:
        axis[min(CHART_COLUMNS - 1, fault_step * CHART_COLUMNS // max(1, steps))] = "▲"
    text.append("    └" + "".join(axis) + "\n", "dim")
    foot = f"0{steps:>{CHART_COLUMNS - 1}}"
    if fault_step is not None:
        at = min(CHART_COLUMNS - 16, max(2, fault_step * CHART_COLUMNS // max(1, steps) - 4))
        mark = f"fault at {fault_step}"
        foot = foot[:at] + mark + foot[at + len(mark) :]
    text.append(f"     {foot}", "dim")
    return text


def _columns(records: Sequence[TruthRecord], steps: int) -> list[tuple[float | None, bool]]:
    """One column for each few steps: the mean reward in the loss, and whether any step of it was garbage."""
    buckets: list[list[TruthRecord]] = [[] for _ in range(CHART_COLUMNS)]
    for record in records:
        buckets[min(CHART_COLUMNS - 1, (record.step - 1) * CHART_COLUMNS // max(1, steps))].append(record)
    columns: list[tuple[float | None, bool]] = []
    for bucket in buckets:
        values = [record.reward_mean_in_loss for record in bucket if record.reward_mean_in_loss is not None]
        mean = sum(values) / len(values) if values else None
        columns.append((mean, any(record.garbage for record in bucket)))
    # Runs of fewer steps than columns leave gaps between their bars.
    if steps < CHART_COLUMNS:
        for index in range(1, CHART_COLUMNS):
            if columns[index][0] is None and any(value is not None for value, _ in columns[index:]):
                columns[index] = columns[index - 1]
    return columns


def _cell(value: float | None, row: int) -> str:
    if value is None or math.isnan(value):
        return " "
    filled = max(0.0, min(1.0, value)) * CHART_ROWS - (row - 1)
    # A reward of nothing is still a step that was taken: the lowest row shows it.
    lowest = 1 if row == 1 else 0
    return _BLOCKS[max(lowest, min(8, round(filled * 8)))]


def _outcome(scenario: Scenario, guarded: Figures, unguarded: Figures | None) -> RenderableType:
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("")
    table.add_column("with Stepguard", justify="right")
    if unguarded is not None:
        table.add_column("without", justify="right")
    rows = [
        ("garbage steps", "garbage_steps", "{}"),
        ("steps committed", "steps", "{}"),
        ("final reward", "final_reward", "{:.3f}"),
        ("holds", "holds", "{}"),
        ("restarts by Stepguard", "restarts", "{}"),
        ("rollbacks", "rollbacks", "{}"),
        ("relaunches", "relaunches", "{}"),
        ("fault to hold", "detect_s", "{:.3f} s"),
        ("hold to going on", "recover_s", "{:.2f} s"),
        ("time lost", "lost_s", "{:.1f} s"),
    ]
    for label, name, form in rows:
        cells = [_form(form, getattr(run, name)) for run in (guarded, unguarded) if run is not None]
        table.add_row(label, *cells)
    if unguarded is not None and unguarded.died is not None:
        table.add_row("ended", ending(guarded), Text(ending(unguarded), "bold red"))
    wrong = as_expected(scenario, guarded)
    verdict = (
        Text(f"as expected: {scenario.expected}", "bold green")
        if not wrong
        else Text("not as expected: " + "; ".join(wrong), "bold red")
    )
    return Group(Text(), table, Text(), verdict)


def _form(form: str, value: object) -> str:
    return "-" if value is None else form.format(value)
