"""
The contract tests, against a real SGLang.

The embedded server passes the same ones in tests/grpo; where a test says what only one of the two does, it
is told apart there, and docs/sglang.md has the table of differences.
"""

import pytest

from grpo.test_server_contract import *  # noqa: F403 - every test of it, run on this folder's server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
