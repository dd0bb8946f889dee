"""One booted systemd for all tests of this folder, with Stepguard installed and a run configured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.server_process import free_port
from real_systemd.machine import booted, why_not
from real_systemd.site import Site
from requirements import require
from stepguard_grpo.model import write_base_model


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    reason = why_not()
    if reason is not None:
        require("systemd", reason)
    folder: Path = tmp_path_factory.mktemp("machine")
    write_base_model(folder / "shared" / "model", seed=0)
    with booted(folder) as machine:
        site = Site(machine, port=free_port())
        site.install()
        yield site
