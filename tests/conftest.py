"""What holds for all tests: in which company they run, how Ctrl-C arrives, and a Ray cluster."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

HERE = Path(__file__).parent
# What only one test at a time may have, by folder or `xdist_group`, longest first: a server that takes both
# processors, a machine's systemd, a Ray cluster (two starve each other, and their calls hang), a browser.
ONE_AT_A_TIME = ("real_sglang", "real_systemd", "ray", "browser")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background deaf to Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Take care of the company that tests keep, where there is any."""
    if config.getoption("dist", "no") == "loadgroup":
        config.pluginmanager.register(Company())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes longest, and in a worker say which of them stay together."""
    groups = {item.nodeid: _group(item) for item in items}
    items.sort(key=lambda item: _rank(item, groups[item.nodeid]))
    told = getattr(config, "workerinput", {}).get("groups")
    if told is not None:
        Path(told).write_text(json.dumps(groups), encoding="utf-8")


class Company:
    """
    Hands whole groups to workers, and tells the groups from what the workers found out while collecting.

    pytest-xdist's own groups are a suffix of the test's id, which pytest 9.2 does not let it set; and with it
    `--last-failed` would know no test.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="stepguard-groups-")

    def pytest_configure_node(self, node: WorkerController) -> None:
        """Give each worker its own file: they collect at the same time."""
        node.workerinput["groups"] = str(Path(self._folder.name) / node.gateway.id)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> LoadScopeScheduling:
        """Schedule by group."""
        return ByGroup(config, log, Path(self._folder.name))

    def pytest_unconfigure(self) -> None:
        """Leave nothing behind."""
        self._folder.cleanup()


class ByGroup(LoadScopeScheduling):
    """A group is one worker's, whole; groups are handed out in the order of their first tests."""

    def __init__(self, config: pytest.Config, log: Any, folder: Path) -> None:
        config.option.loadscopereorder = False  # by the number of tests is not by the time they take
        super().__init__(config, log)
        self._folder = folder
        self._groups: dict[str, str] = {}

    def _split_scope(self, nodeid: str) -> str:
        if not self._groups:
            self._groups = json.loads(next(self._folder.iterdir()).read_text(encoding="utf-8"))
        return self._groups[nodeid]


def _group(item: pytest.Item) -> str:
    """
    Whose company the test keeps.

    The tests of a file stay together, for their fixtures; those that start processes of their own are each
    for itself.
    """
    folder = item.path.relative_to(HERE).parts[0]
    if folder in ONE_AT_A_TIME:
        return folder
    said = item.get_closest_marker("xdist_group")
    if said is not None:
        return str(said.args[0])
    return item.nodeid if item.get_closest_marker("e2e") is not None else str(item.path)


def _rank(item: pytest.Item, group: str) -> int:
    if group in ONE_AT_A_TIME:
        return ONE_AT_A_TIME.index(group)
    e2e = item.get_closest_marker("e2e") is not None
    return len(ONE_AT_A_TIME) + (0 if e2e else 1)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    """The address of a Ray cluster of the tests' own, to which they are connected."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", str(HERE))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80 << 20,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()
