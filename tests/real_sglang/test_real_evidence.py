"""The tests of evidence, on a real SGLang."""

from collections.abc import Iterator

import pytest

from daemon_parts.http_subject import HttpSubject, http_subject
from daemon_parts.server_evidence import *  # noqa: F403 - every test of it, on this folder's server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def subject(server_url: str) -> Iterator[HttpSubject]:
    with http_subject(server_url) as found:
        yield found
