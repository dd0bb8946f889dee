"""The virtual daemon of the guard's tests, and a guard that lives by its clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guard.virtual_daemon import VirtualDaemon, VirtualTime, virtual_guard
from stepguard.guard import Guard


@pytest.fixture
def time() -> VirtualTime:
    return VirtualTime()


@pytest.fixture
def daemon(tmp_path: Path, time: VirtualTime) -> Iterator[VirtualDaemon]:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    made = VirtualDaemon(run_dir, time)
    yield made
    made.close()


@pytest.fixture
def guard(daemon: VirtualDaemon, time: VirtualTime) -> Iterator[Guard]:
    with virtual_guard(daemon.run_dir, time) as made:
        yield made
