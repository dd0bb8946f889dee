"""Writes an incident's folder: whole file by whole file, so a reader never meets half a report."""

import os
from pathlib import Path

from ..core.diagnosis import NAMES
from ..jsontext import to_json
from .collected import Collected, write_whole
from .decisions import write_log
from .folders import DATA, DECISIONS, MARKDOWN, PAGE
from .markdown import as_markdown, costs
from .page import as_page
from .report import Report, build
from .slices import slice_text


def write_report(collected: Collected, folder: Path) -> Report:
    """
    Put an incident's report together and write it.

    Raises:
        ReportError: there is nothing to report.
        OSError: the folder cannot be written.

    """
    report = build(collected, folder)
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    _write_decisions(report, folder, collected.decision_bytes_max)
    for log in report.logs:
        if log.lines:
            write_whole(folder / "logs" / f"{_safe(log.name)}.log", slice_text(log))
    write_whole(folder / "config.toml", _config_text(report))
    write_whole(folder / MARKDOWN, as_markdown(report))
    write_whole(folder / PAGE, as_page(report))
    write_whole(folder / DATA, to_json(as_json(report)) + "\n")  # the last one: all is there by then
    return report


def as_json(report: Report) -> dict[str, object]:
    """The report in the shape of `stepguard report --json`."""
    incident, cost = report.incident, report.cost
    return {
        "run": report.run,
        "incident": incident.number,
        "title": report.title,
        "summary": " ".join(report.summary),
        "stage": report.stage,
        "mode": report.mode,
        "reason": incident.reason.value,
        "server": incident.server,
        "onset_step": incident.onset_step,
        "opened_wall": report.opened_wall,
        "written_wall": report.written_wall,
        "cost": {
            "held_s": cost.held_s,
            "refused_batches": cost.refused_batches,
            "garbage_steps": cost.garbage_steps,
            "steps_again": cost.steps_again,
            "steps_lost": cost.steps_lost,
            "step_s": cost.step_s,
            "gpus": cost.gpus,
            "gpu_hours": cost.gpu_hours,
            "told": costs(report),
        },
        "hypotheses": [
            {
                "cause": one.cause.value,
                "name": NAMES[one.cause],
                "confidence": one.confidence,
                "for": list(one.supporting),
                "against": list(one.opposing),
            }
            for one in report.hypotheses
        ],
        "timeline": [
            {
                "after_s": moment.after_s,
                "wall": moment.wall,
                "plane": moment.plane.value,
                "text": moment.text,
                "bad": moment.bad,
            }
            for moment in report.moments
        ],
        "actions": [
            {"name": a.name, "after_s": a.after_s, "took_s": a.took_s, "ok": a.ok, "detail": a.detail}
            for a in report.actions
        ],
        "advice": [*report.steps, *report.advice],
        "commands": [{"what": what, "command": command} for what, command in report.commands],
        "notes": list(report.notes),
        "decisions": report.decisions,
    }


def _write_decisions(report: Report, folder: Path, bytes_max: int) -> None:
    half = folder / f".{DECISIONS}.{os.getpid()}"
    try:
        with half.open("w", encoding="utf-8") as file:
            write_log(report.passage, file, bytes_max=bytes_max)
        half.replace(folder / DECISIONS)
    finally:
        half.unlink(missing_ok=True)


def _config_text(report: Report) -> str:
    """Every value in force, those that differ from the default marked; secrets are masked."""
    lines = [
        f"{key} = {value}{'  # not the default' if differs else ''}" for key, value, differs in report.config
    ]
    return "# The configuration in force, by dotted key.\n" + "\n".join(lines) + "\n"


def _safe(name: str) -> str:
    """A server's name is one already; a second look costs nothing."""
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in name) or "log"
