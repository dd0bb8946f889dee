"""The settings as text for people: the annotated `config.toml` and the reference page. Both are generated."""

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stepguardd.config.loading import sections

_HEAD = """\
# The settings of `stepguard run --config config.toml`, with their defaults.
#
# Every line that sets something is commented out and shows the default; "not set" marks a key that has
# none, with an example. Times are in seconds. An unknown key is an error.
# Each key can also come from the environment (STEPGUARD__PROBE__INTERVAL_S=2) or from a flag
# (--set probe.interval_s=2). A flag beats the environment, which beats this file.
# `stepguard config check --config FILE` checks a file; `stepguard config show` tells where each value
# is from.
"""


def default_file() -> Path:
    """Where the annotated default file lies: in an installed wheel, else at the root of the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "config.toml"
    return installed if installed.exists() else package.parents[1] / "config.toml"


def as_toml() -> str:
    """The annotated default file."""
    parts = [_HEAD]
    for name, model in sections().items():
        several = name == "servers"
        header = f"# [[{name}]]" if several else f"[{name}]"
        parts.append(f"\n{_comment(_about(model))}{header}\n")
        for key, field in model.model_fields.items():
            parts.append(f"\n{_comment(field.description or '')}# {key} = {_shown(field)}\n")
    return "".join(parts)


def as_markdown() -> str:
    """The reference page."""
    parts = [
        "# Configuration\n",
        "This page is generated from the settings; `stepguard config schema` prints the same as TOML.",
        "Times are in seconds. An unknown key is an error that names the nearest valid one.\n",
        "A flag (`--set section.key=value`) beats the environment (`STEPGUARD__SECTION__KEY`), which beats",
        "the file, which beats the default. A relative path is relative to the file's folder.",
        "`stepguard config show` prints every value with its origin.",
    ]
    for name, model in sections().items():
        parts.append(f"\n## [{name}]\n" if name != "servers" else "\n## [[servers]]\n")
        parts.append(_about(model))
        for key, field in model.model_fields.items():
            words = (field.description or "").replace("<", "&lt;")
            parts.append(f"\n**`{key}`** = `{_shown(field)}`  \n{words}")
    return "\n".join(parts) + "\n"


def toml_value(value: object) -> str:
    """A plain value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{int(value)}" if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_toml_key(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, SecretStr):
        return toml_value(str(value))
    return _quoted(str(value))


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )  # the one that JSON allows and TOML not


def _about(model: type[BaseModel]) -> str:
    return textwrap.dedent("    " + (model.__doc__ or "").strip("\n")).strip()


def _comment(text: str) -> str:
    lines = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines += textwrap.wrap(" ".join(paragraph.split()), width=96)
    return "".join(f"# {line}\n" for line in lines)


def _shown(field: FieldInfo) -> str:
    """The default, or an example marked as such where there is none that could be written down."""
    default: Any = field.get_default()
    example = field.examples[0] if field.examples else None
    if field.is_required():
        return f"{toml_value(example)}   # required"
    if default is None or default is PydanticUndefined or field.default_factory is not None or default == ():
        return f"{toml_value(example)}   # not set"
    return toml_value(default)
