"""
What a test needs of the machine, said in one place.

A test that needs a kernel, a GPU or another version of something skips with its reason where that is missing.
Where it must not be missing, the variable STEPGUARD_REQUIRE names the part (separated by commas), and the
test fails instead: `STEPGUARD_REQUIRE=oom,gpu make test`.
"""

import os
from typing import NoReturn

import pytest


def required(part: str) -> bool:
    """Whether `part` must not be missing here."""
    return part in {name.strip() for name in os.environ.get("STEPGUARD_REQUIRE", "").split(",")}


def require(part: str, reason: str) -> NoReturn:
    """Skip the test, because `part` is missing here for `reason`; fail it where the part is required."""
    if required(part):
        pytest.fail(f"{part} is required here (STEPGUARD_REQUIRE), but: {reason}", pytrace=False)
    pytest.skip(f"{part}: {reason}")
