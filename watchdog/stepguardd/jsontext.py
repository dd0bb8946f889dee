"""JSON as Stepguard writes it: strict, one line, and `null` for numbers that JSON has no word for."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any


def to_json(value: object) -> str:
    """The value as one line of JSON. NaN becomes null; what has no form in JSON raises TypeError."""
    return json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False)


def jsonable(value: Any) -> Any:
    """The value in JSON's own types: paths as text, tuples and sets as lists, unknown numbers as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return [jsonable(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
