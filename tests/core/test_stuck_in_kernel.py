"""Processes that wait in the kernel (state D): told when it lasts, no reason to hold by itself."""

from stepguardd import status
from stepguardd.core.events import TreeSampled
from stepguardd.core.state import STUCK_IN_KERNEL_S
from stepguardd.incidents.timeline import stuck_in_kernel
from stepguardd.testing import World


def sample(world: World, *pids: int) -> str:
    world.feed(TreeSampled(server=world.fake.name, stopped=(), cpu_s=world.fake.cpu_s, uninterruptible=pids))
    return stuck_in_kernel(world.state, world.fake.name)


def test_a_disk_that_is_busy_for_moments_is_nobodys_business() -> None:
    """Another process at each look, or none at every second one."""
    world = World()
    for look in range(40):
        world.now += 0.5
        assert sample(world, look) == ""
        assert sample(world) == ""
        assert sample(world, 7) == ""
    assert world.orders() == ["GO"]


def test_one_that_does_not_come_back_is_told_with_what_that_means() -> None:
    world = World()
    began = world.now
    told = sample(world, 7, 9)
    while not told:
        assert world.now - began <= STUCK_IN_KERNEL_S
        world.now += 0.5
        told = sample(world, 7, 9)
    assert world.now - began == STUCK_IN_KERNEL_S
    assert told.startswith("processes 7, 9 wait in the kernel (state D)")
    shown = status.of(
        world.state,
        run="r",
        state_dir="/s",
        urls={},
        now=world.now,
        started_at=began,
        stream=None,
        notes=(),
        lost_rows=0,
        journal_failure=None,
    )
    assert shown["servers"][0]["stuck_in_kernel"] == [7, 9]  # type: ignore[index]
    assert world.orders() == ["GO"], "it is evidence, and no reason by itself"
    world.now += 0.5
    assert sample(world) == ""
