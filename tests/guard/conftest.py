"""Fixtures of the guard's tests: everything made here is closed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from guard.virtual_daemon import VirtualDaemon, VirtualTime, virtual_guard
from stepguard.guard import Guard


@pytest.fixture
def time() -> VirtualTime:
    return VirtualTime()


@pytest.fixture
def daemons(tmp_path: Path, time: VirtualTime) -> Iterator[Callable[..., VirtualDaemon]]:
    with ExitStack() as stack:

        def make(**options: Any) -> VirtualDaemon:
            daemon = VirtualDaemon(options.pop("run_dir", tmp_path), time, **options)
            stack.callback(daemon.close)
            return daemon

        yield make


@pytest.fixture
def daemon(daemons: Callable[..., VirtualDaemon]) -> VirtualDaemon:
    return daemons()


@pytest.fixture
def guards(tmp_path: Path, time: VirtualTime) -> Iterator[Callable[..., Guard]]:
    with ExitStack() as stack:

        def make(run_dir: Path | None = tmp_path, **options: Any) -> Guard:
            return stack.enter_context(virtual_guard(run_dir, time, **options))

        yield make
