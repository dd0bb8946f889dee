"""The kernel's kills in the trainer's own cgroup: counted on its side and told once, in either version."""

import os
from pathlib import Path

import pytest

from stepguard.cgroups import OwnKills

TEXT = {1: "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n", 2: "low 0\nhigh 0\nmax 9\noom 2\noom_kill {}\n"}
FILE = {1: "memory.oom_control", 2: "memory.events"}
MOUNT = {
    1: "30 20 0:26 / {}/mnt rw - cgroup cgroup rw,memory\n",
    2: "30 20 0:26 / {}/mnt rw - cgroup2 cgroup2 rw\n",
}
GROUP = {1: "7:memory:/job\n0::/elsewhere\n", 2: "0::/job\n"}


class Kernel:
    """The files of a kernel with one memory cgroup, which this process is in."""

    def __init__(self, root: Path, version: int) -> None:
        self.proc, self.folder = root / "proc", root / "mnt" / "job"
        self._file, self._text = self.folder / FILE[version], TEXT[version]
        self.folder.mkdir(parents=True)
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "mountinfo").write_text(MOUNT[version].format(root))
        own = self.proc / str(os.getpid())
        own.mkdir()
        (own / "cgroup").write_text(GROUP[version])

    def killed(self, count: int) -> None:
        self._file.write_text(self._text.format(count))


@pytest.fixture(params=[1, 2])
def kernel(request: pytest.FixtureRequest, tmp_path: Path) -> Kernel:
    return Kernel(tmp_path, request.param)


def test_kills_from_before_are_where_counting_starts_and_new_ones_are_told_once(kernel: Kernel) -> None:
    kernel.killed(3)
    kills = OwnKills(kernel.proc)
    assert (kills.look(), kills.total, kills.identity) == (0, 3, kernel.folder.stat().st_ino)
    kills.told()
    assert kills.look() is None
    kernel.killed(5)
    assert kills.look() == 2
    kills.told()
    assert kills.look() is None


def test_what_did_not_get_through_is_told_again_with_what_came_since(kernel: Kernel) -> None:
    kernel.killed(0)
    kills = OwnKills(kernel.proc)
    kills.look()
    kills.told()
    kernel.killed(1)
    assert kills.look() == 1
    kernel.killed(2)
    assert kills.look() == 2


def test_a_count_that_cannot_be_read_is_no_zero(kernel: Kernel) -> None:
    kills = OwnKills(kernel.proc)
    assert kills.look() is None
    kernel.killed(4)
    assert kills.look() == 0
    kills.told()
    (kernel.folder / FILE[1]).unlink(missing_ok=True)
    (kernel.folder / FILE[2]).unlink(missing_ok=True)
    assert kills.look() is None


def test_without_a_memory_cgroup_there_is_nothing_to_tell(tmp_path: Path) -> None:
    assert OwnKills(tmp_path).look() is None
