"""One booted systemd for all tests of this folder, with Stepguard installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grpo.server_process import free_port
from real_systemd.machine import Machine, booted, why_not
from real_systemd.site import Site, install
from requirements import require
from stepguard_grpo.model import write_base_model


@pytest.fixture(scope="package")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    reason = why_not()
    if reason is not None:
        require("systemd", reason)
    folder = tmp_path_factory.mktemp("machine")
    write_base_model(folder / "shared" / "training" / "base", seed=0)
    with booted(folder) as machine:
        install(machine)
        yield machine


@pytest.fixture(scope="package")
def site(machine: Machine) -> Site:
    """A run with a server and no trainer."""
    return Site(machine, "night", port=free_port())
