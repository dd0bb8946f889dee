"""What holds for all tests: in which company they run, two at a time, and how Ctrl-C arrives."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from xdist.scheduler import LoadGroupScheduling

HERE = Path(__file__).parent
# One costly machine for all tests of the folder: they stay together, one after the other.
SHARED = {"real_systemd", "real_sglang", "browser"}
# A Ray cluster each, and two at once starve each other: their calls then hang for want of a processor.
RAY = {"tests/cluster/test_on_ray.py", "tests/frameworks/test_ray_calls.py"}

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


class RayTogether(LoadGroupScheduling):
    """
    Scheduling by group, in which all tests on Ray are one.

    pytest-xdist 3.8 tells a group by a suffix of the test's id, which pytest 9.2 does not let it set.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.partition("::")[0] in RAY else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadGroupScheduling | None:
    """Take our scheduler where groups are asked for."""
    return RayTogether(config, log) if config.getvalue("dist") == "loadgroup" else None


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
