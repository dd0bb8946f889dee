"""
Reads the configuration: flags over environment over file over defaults, and where each value came from.

Whatever is wrong with it comes out as one `ConfigError` of one line that names the place, the key and the
remedy.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from stepguardd.config.settings import Config, ServerSettings
from stepguardd.oneline import one_line

ENV_PREFIX = "STEPGUARD__"
FILE_BYTES_MAX = 1 << 20

KeyPath = tuple[str | int, ...]


class ConfigError(Exception):
    """The configuration cannot be used. The message is one line for a person: place, key, remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a value came from; `place` is the file and line, the environment variable or the flag."""

    kind: Literal["default", "file", "env", "flag"]
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A configuration together with the origin of every value that is not a default, by dotted key."""

    config: Config
    origins: Mapping[str, Origin]
    file: Path | None

    def origin(self, key: str) -> Origin:
        """Where the value of this key came from, or the table around it if that was given as a whole."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return Origin(kind="default")


def load_config(
    file: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """
    The configuration of a run.

    Args:
        file: A TOML file; without one only the environment and the overrides speak.
        overrides: Flags, by dotted key ("probe.interval_s", "servers.0.url"). Text is read as the key's type.
        environ: Its variables STEPGUARD__SECTION__KEY override the file.

    Raises:
        ConfigError: with one line that names the key, its place and the nearest valid one.
    """
    return read_config(file, overrides, environ=environ).config


def read_config(
    file: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> LoadedConfig:
    """As `load_config`, and tells where each value came from."""
    text = _read_text(file) if file else ""
    data = _parse(text, file)
    single = _single_server(data, file)
    lines = _key_lines(text)
    origins = {
        _dotted(path): Origin(kind="file", place=_place(file, _line(lines, path, single=single)))
        for path in _leaves(data)
    }
    given: list[tuple[str, object, Origin]] = [
        (_env_key(name), value, Origin(kind="env", place=name))
        for name, value in sorted(environ.items())
        if name.startswith(ENV_PREFIX)
    ]
    given += [(key, value, Origin(kind="flag", place="flag")) for key, value in (overrides or {}).items()]
    for key, value, origin in given:
        path = _split(key)
        _put(data, path, _from_text(path, value) if isinstance(value, str) else value, origin)
        origins = {k: o for k, o in origins.items() if not k.startswith(_dotted(path) + ".")}
        origins[_dotted(path)] = origin
    base = (file.parent if file else Path()).absolute()
    try:
        config = Config.model_validate_json(
            json.dumps(data, default=str), strict=True, context={"base": base}
        )
    except ValidationError as refused:
        described = [
            _describe(error, lines, origins, file, single=single)
            for error in refused.errors()
            if error["type"] != "default_factory_not_called"  # only ever follows from another error
        ]
        described.sort(key=lambda item: item[0])
        more = f" (and {len(described) - 1} more)" if len(described) > 1 else ""
        raise ConfigError(one_line(described[0][1]) + more) from None
    return LoadedConfig(config=config, origins=origins, file=file)


def parse_assignments(assignments: Sequence[str]) -> dict[str, object]:
    """`["probe.interval_s=2"]`, as flags give it, to overrides; ConfigError where key or value is missing."""
    overrides: dict[str, object] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {_shown(assignment)}: must look like section.key=value")
        overrides[key.strip()] = value.strip()
    return overrides


def keys() -> list[str]:
    """Every key there is, dotted, in the order of the sections; a server's keys begin with `servers.`."""
    return [f"{section}.{key}" for section, model in sections().items() for key in model.model_fields]


def sections() -> dict[str, type[BaseModel]]:
    """The tables of the configuration by name, in their order."""
    models: dict[str, type[BaseModel]] = {}
    for name, field in Config.model_fields.items():
        annotation: Any = ServerSettings if name == "servers" else field.annotation
        models[name] = annotation
    return models


# --- the file ---


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None
    if len(raw) > FILE_BYTES_MAX:
        raise ConfigError(f"{file}: is larger than 1 MiB; is it a configuration?")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}:{line}: is not UTF-8 text") from None


def _parse(text: str, file: Path | None) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        at = re.search(r" \(at line (\d+), column (\d+)\)$", message)
        line = int(at[1]) if at else text.count("\n") + 1
        reason = (
            message[: at.start()] if at else re.sub(r" \(at end of document\)$", " before the end", message)
        )
        raise ConfigError(f"{_place(file, line)}: is not TOML: {reason}") from None
    except RecursionError:
        raise ConfigError(f"{file}: is nested too deeply") from None


def _single_server(data: dict[str, Any], file: Path | None) -> bool:
    """Turns `[server]` into the one entry of `[[servers]]`; True if it did."""
    if "server" not in data:
        return False
    if "servers" in data:
        raise ConfigError(f"{file}: has both [server] and [[servers]]; keep [[servers]], one for each server")
    if not isinstance(data["server"], dict):
        raise ConfigError(f"{file}: server must be a table: [server]")
    data["servers"] = [data.pop("server")]
    return True


_HEADER = re.compile(r"^\s*(\[\[?)\s*([A-Za-z0-9_.\- ]+?)\s*\]")
_KEY = re.compile(r"^\s*([A-Za-z0-9_\-]+(?:\s*\.\s*[A-Za-z0-9_\-]+)*)\s*=")


def _key_lines(text: str) -> dict[KeyPath, int]:
    """
    The line of each key and table, by a scan that knows headers and bare keys.

    It may miss a quoted key, or take a line of a multi-line string for one: a wrong line number is all that
    costs.
    """
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    entries: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            parts = tuple(part.strip() for part in header[2].split("."))
            if header[1] == "[[":
                entries[header[2]] = entries.get(header[2], -1) + 1
            index = entries.get(parts[0])
            table = parts if index is None else (parts[0], index, *parts[1:])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault(table + tuple(part.strip() for part in key[1].split(".")), number)
    return lines


def _line(lines: Mapping[KeyPath, int], path: KeyPath, *, single: bool) -> int | None:
    """The line of a path or of the nearest thing around it."""
    if single and path[:2] == ("servers", 0):
        path = ("server", *path[2:])
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None


def _place(file: Path | None, line: int | None) -> str:
    return f"{file}:{line}" if line else f"{file}"


def _leaves(data: object, path: KeyPath = ()) -> list[KeyPath]:
    """The paths of all values; a list of plain values is one value."""
    if isinstance(data, dict):
        return [leaf for key, value in data.items() for leaf in _leaves(value, (*path, key))]
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        return [leaf for index, item in enumerate(data) for leaf in _leaves(item, (*path, index))]
    return [path]


# --- environment and flags ---


def _env_key(name: str) -> str:
    """STEPGUARD__PROBE__INTERVAL_S to probe.interval_s; what follows a server's ENV keeps its case."""
    parts = name.removeprefix(ENV_PREFIX).split("__")
    names_a_variable = [part.lower() for part in parts[:-1]][-1:] == ["env"]
    return ".".join(
        [*(part.lower() for part in parts[:-1]), parts[-1] if names_a_variable else parts[-1].lower()]
    )


def _split(key: str) -> KeyPath:
    parts: list[str | int] = [
        int(part) if part.isascii() and part.isdigit() else part for part in key.split(".")
    ]
    return ("servers", 0, *parts[1:]) if parts[0] == "server" else tuple(parts)


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def _from_text(path: KeyPath, text: str) -> object:
    """Text that is valid for the key as it stands is taken so; else it is read as a TOML value."""
    annotation = _annotation(path)
    if annotation is None:
        return text
    try:
        TypeAdapter(annotation).validate_json(json.dumps(text), strict=True)
    except ValidationError:
        try:
            value: object = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return text
        return value
    return text


def _annotation(path: KeyPath) -> Any:
    """The type of a key, or None where there is no such key."""
    model: type[BaseModel] = Config
    for depth, part in enumerate(path):
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            return None
        if depth == len(path) - 1:
            return field.annotation
        inner = next((arg for arg in (field.annotation, *get_args(field.annotation)) if _is_model(arg)), None)
        if inner is None:
            return str
        model = inner
    return None


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _put(data: Any, path: KeyPath, value: object, origin: Origin) -> None:
    """Sets a value deep in the data, making the tables on the way."""
    here = data
    for part, following in zip(path, (*path[1:], None), strict=True):
        if isinstance(here, list):
            if not isinstance(part, int) or part > len(here):
                raise ConfigError(
                    f"{origin.place}: the servers are counted from 0, and there are {len(here)}"
                )
            if part == len(here):
                here.append({})
        elif not isinstance(here, dict):
            raise ConfigError(f"{origin.place}: {_dotted(path)} is inside of what is no table")
        else:
            part = str(part)  # noqa: PLW2901 - a table's keys are text
        if following is None:
            here[part] = value
            return
        if isinstance(here, dict):
            here = here.setdefault(part, [] if isinstance(following, int) else {})
        else:
            here = here[part]


# --- what is said when it is wrong ---


def _describe(
    error: ErrorDetails,
    lines: Mapping[KeyPath, int],
    origins: Mapping[str, Origin],
    file: Path | None,
    *,
    single: bool,
) -> tuple[tuple[int, int], str]:
    """One error: its place in the order of telling (misspelt keys first, then by line), and its line."""
    path: KeyPath = tuple(error["loc"])
    unknown = error["type"] == "extra_forbidden"
    origin = next((origins[key] for key in _prefixes(path) if key in origins), None) or next(
        (origins[key] for key in origins if key.startswith(f"{_dotted(path)}.")), None
    )
    reason = _reason(error)
    about_a_table = error["type"] == "value_error" and (len(path) == 1 or isinstance(path[-1], int))
    line = _line(lines, (*path, reason.split()[0]) if about_a_table else path, single=single)
    if origin is not None and origin.kind != "file":
        place, line = origin.place, None
    else:
        place = _place(file, line) if file else "configuration"
    key = _display(path, single=single)
    if unknown:
        what = f"unknown key {key}; {_nearest(path, key.rpartition('.')[0])}"
    elif error["type"] == "missing":
        what = f"{key} is missing"
    elif about_a_table:
        what = f"{key}.{reason}"
    else:
        what = f"{key} {reason}" + _input(error, path)
    return (0 if unknown else 1, line or 0), f"{place}: {what}"


def _prefixes(path: KeyPath) -> list[str]:
    return [_dotted(path[:length]) for length in range(len(path), 0, -1)]


def _display(path: KeyPath, *, single: bool) -> str:
    """`servers[1].url` as a person writes it; `server.url` where the file has the single table."""
    if single and path[:2] == ("servers", 0):
        path = ("server", *path[2:])
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{_shown(part)[1:-1]}"
    return text.lstrip(".") or "configuration"


def _nearest(path: KeyPath, table: str) -> str:
    """Words that lead to the key that was meant: in the same table, else in another, else what there is."""
    models = sections()
    section, key = str(path[0]), str(path[-1])
    if len(path) == 1:
        known = list(models)
        close = difflib.get_close_matches(section, known, n=1, cutoff=0.5)
        elsewhere = [full for full in keys() if full.rpartition(".")[2] == section]
        if elsewhere and not close:
            return f"did you mean {elsewhere[0]}?"
        return f"did you mean [{close[0]}]?" if close else f"the sections are {', '.join(known)}"
    own = list(models[section].model_fields)
    close = difflib.get_close_matches(key, own, n=1, cutoff=0.6)
    if close:
        return f"did you mean {table}.{close[0]}?"
    elsewhere = [full for full in keys() if full.rpartition(".")[2] == key] or [
        full
        for match in difflib.get_close_matches(
            key, [full.rpartition(".")[2] for full in keys()], n=1, cutoff=0.8
        )
        for full in keys()
        if full.rpartition(".")[2] == match
    ]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    nearest = difflib.get_close_matches(key, own, n=1, cutoff=0.0)
    return f"the nearest one is {table}.{nearest[0]}"


def _reason(error: ErrorDetails) -> str:
    reason = error["msg"].removeprefix("Value error, ")
    for longer, shorter in (
        ("Input should be a valid ", "must be a "),
        ("Input should be ", "must be "),
        ("String should ", "must "),
        ("Object has no attribute", "has no"),
    ):
        reason = reason.replace(longer, shorter)
    return {
        "must be a integer": "must be a whole number",
        "must be a dictionary": "must be a table",
        "must be a tuple": "must be a list",
        "must be a array": "must be a list",
        "must be a object": "must be a table",
        "must be an object": "must be a table",
        "must be a string": "must be text in quotes",
        "must be a path": "must be a path in quotes",
    }.get(reason, reason)


def _input(error: ErrorDetails, path: KeyPath) -> str:
    """The offending value, where it is short and cannot be a secret."""
    value = error.get("input")
    if "env" in path or isinstance(value, dict | list | BaseModel) or error["type"] == "value_error":
        return ""
    return f", not {_shown(value)}"


def _shown(value: object) -> str:
    """A value quoted for one line: control characters escaped, cut at a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…" + text[-1]
