"""Requests of a real SGLang that are paused and ended by the daemon."""

import pytest

from daemon_parts.test_generation import (  # noqa: F401 - run on this folder's server
    test_a_request_waits_through_a_pause_and_is_answered_whole,
    test_an_abort_ends_what_runs,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
