"""The tests of evidence, on the embedded server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon_parts.http_subject import HttpSubject, http_subject
from daemon_parts.server_evidence import *  # noqa: F403 - every test of it, on this server
from grpo.server_process import running

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def url(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("evidence") / "server.log"
    with running(base_model, log, "--health-timeout-s", "3") as server:
        yield server.until_up().url


@pytest.fixture
def subject(url: str) -> Iterator[HttpSubject]:
    with http_subject(url) as found:
        yield found
