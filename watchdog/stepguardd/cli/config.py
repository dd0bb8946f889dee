"""`stepguard config`: check a configuration, show every value with its origin, explain every key."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from stepguardd.cli.output import fail, print_json
from stepguardd.config import Config, ConfigError, LoadedConfig, read_config, warnings
from stepguardd.config.loading import parse_assignments
from stepguardd.config.text import as_toml, toml_value

app = typer.Typer(no_args_is_help=False)

File = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="The TOML file. Without it: defaults and environment."
    ),
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.command()
def check(config: File = None, assignments: Assignments = None, json: AsJson = False) -> None:
    """Say whether this configuration can be used, and what in it will disappoint."""
    try:
        loaded = _read(config, assignments)
    except ConfigError as wrong:
        if json:
            print_json({"ok": False, "error": str(wrong), "warnings": []})
        fail(str(wrong))
    found = warnings(loaded.config)
    if json:
        print_json({"ok": True, "error": None, "warnings": found})
        return
    for warning in found:
        typer.echo(f"warning: {warning}")
    servers = len(loaded.config.servers)
    typer.echo(
        f"{config or 'the defaults'}: good. Run {loaded.config.run.name!r}, mode {loaded.config.run.mode!r}, "
        f"{servers} server{'' if servers == 1 else 's'}."
    )


@app.command()
def show(config: File = None, assignments: Assignments = None, json: AsJson = False) -> None:
    """Print every value and where it comes from: default, file, env or flag."""
    try:
        loaded = _read(config, assignments)
    except ConfigError as wrong:
        fail(str(wrong))
    rows = _rows(loaded)
    if json:
        told = {key: {"value": value, "origin": kind, "place": place} for key, value, kind, place in rows}
        print_json(told)
        return
    for key, value, kind, place in rows:
        shown = "(not set)" if value is None else toml_value(value)
        typer.echo(f"{key} = {shown}  ({kind if place in ('', kind) else f'{kind}: {place}'})")


@app.command()
def schema(json: AsJson = False) -> None:
    """Explain every key: the annotated default file, or the JSON Schema with --json."""
    if json:
        print_json(Config.model_json_schema())
    else:
        sys.stdout.write(as_toml())


def _read(file: Path | None, assignments: list[str] | None) -> LoadedConfig:
    return read_config(file, parse_assignments(assignments or []))


def _rows(loaded: LoadedConfig) -> list[tuple[str, object, str, str]]:
    """Key, value, kind and place of every setting; secrets are masked by their type."""
    rows: list[tuple[str, object, str, str]] = []
    for section, content in loaded.config.model_dump(mode="json").items():
        tables = (
            {f"{section}.{index}": table for index, table in enumerate(content)}
            if isinstance(content, list)
            else {section: content}
        )
        for prefix, table in tables.items():
            for key, value in table.items():
                origin = loaded.origin(f"{prefix}.{key}")
                rows.append((f"{prefix}.{key}", value, origin.kind, origin.place))
    return rows
