"""One base model and one server for the whole session; fault tests start their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from grpo.server_process import running
from stepguard_grpo.model import write_base_model


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    write_base_model(path, seed=0)
    return path


@pytest.fixture(scope="session")
def server_url(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """
    A server under SGLang's contract: the embedded one, or the one that STEPGUARD_CONTRACT_URL names.

    A real SGLang must serve a model with at least the ids 0 to 13, from a path that this machine can read,
    with `--skip-tokenizer-init`.
    """
    given = os.environ.get("STEPGUARD_CONTRACT_URL")
    if given:
        yield given
        return
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running(base_model, log, "--health-timeout-s", "3", "--max-running-requests", "16") as server:
        yield server.until_up().url


@pytest.fixture
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=30, trust_env=False) as client:
        yield client
