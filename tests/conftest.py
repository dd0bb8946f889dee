"""What holds for all tests: in which company they run, two at a time, and how Ctrl-C arrives."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# One costly machine for all tests of the folder: they stay together, one after the other.
SHARED = {"real_systemd", "real_sglang", "browser"}

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background deaf to Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    Say what may run beside what, and begin with what takes longest.

    The tests of a file stay together, for their fixtures; those that start processes of their own are each
    for itself.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:  # a file may say which of its own stay together
            item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=_rank)


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(HERE).parts[0]


def _group(item: pytest.Item) -> str:
    if _folder(item) in SHARED:
        return _folder(item)
    alone = item.get_closest_marker("e2e") is not None
    return item.nodeid if alone else str(item.path)


def _rank(item: pytest.Item) -> int:
    if _folder(item) in SHARED:
        return 0
    return 1 if item.get_closest_marker("e2e") is not None else 2
