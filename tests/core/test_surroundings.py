"""What memory, GPUs and logs tell the core: kept within bounds, told once, and a hold only for a crash."""

import pytest

from stepguardd.core.events import (
    GpuTrouble,
    GpuTroubled,
    LogRead,
    LogSeen,
    MemoryPressed,
    OomKind,
    OomSeen,
    Role,
)
from stepguardd.core.signs import Sign
from stepguardd.core.state import SEEN_KEPT, LogPosition, ServerState
from stepguardd.core.surroundings import newest_oom
from stepguardd.testing.world import World


@pytest.mark.parametrize("kind", OomKind)
def test_memory_that_ran_out_is_told_once_and_holds_nothing(kind: OomKind) -> None:
    world = World()
    event = OomSeen(kind=kind, role=Role.SERVER, server="s", pid=7, used_bytes=3 << 30, cgroup="/a")
    world.feed(event)
    world.feed(event)
    assert world.order == "GO"
    assert len(world.told("warning")) == 1
    assert "3.0 GiB" in world.told("warning")[0] or kind is OomKind.KV_FULL
    ((at, kept),) = world.state.surroundings.ooms
    assert (at, kept.kind, kept.count) == (world.now, kind, 2)


def test_a_servers_newest_out_of_memory_is_found_and_a_full_kv_pool_is_none() -> None:
    world = World("a", "b")
    began = world.now
    world.feed(OomSeen(kind=OomKind.CUDA_RUN, role=Role.SERVER, server="a"))
    world.feed(OomSeen(kind=OomKind.KV_FULL, role=Role.SERVER, server="a"))
    found = newest_oom(world.state, "a", began)
    assert found is not None
    assert found[1].kind is OomKind.CUDA_RUN
    assert newest_oom(world.state, "b", began) is None
    assert newest_oom(world.state, "a", began + 1.0) is None


@pytest.mark.parametrize("first", ["counter", "victim"])
def test_a_kernel_kill_seen_by_log_and_counter_is_one_with_its_victim(first: str) -> None:
    world = World()
    reports = [
        OomSeen(kind=OomKind.CGROUP_COUNTER, role=Role.SERVER, server="s", cgroup="/run/s"),
        OomSeen(kind=OomKind.KERNEL_CGROUP, role=Role.SERVER, pid=7, name="python", cgroup="/run/s"),
    ]
    for report in reports if first == "counter" else reversed(reports):
        world.feed(report)
    ((_, kept),) = world.state.surroundings.ooms
    assert (kept.kind, kept.pid, kept.server, kept.count) == (OomKind.KERNEL_CGROUP, 7, "s", 1)
    assert len(world.told("warning")) == 1


def test_kills_in_two_cgroups_are_two() -> None:
    world = World()
    world.feed(OomSeen(kind=OomKind.CGROUP_COUNTER, role=Role.SERVER, cgroup="/run/a"))
    world.feed(OomSeen(kind=OomKind.KERNEL_CGROUP, role=Role.OTHER, pid=7, cgroup="/run/ab"))
    assert len(world.state.surroundings.ooms) == 2


def test_nobody_hears_of_a_stranger_at_a_limit_of_their_own() -> None:
    """On a shared machine others are killed all day; a machine that is out of memory is everybody's."""
    world = World()
    world.feed(OomSeen(kind=OomKind.KERNEL_CGROUP, role=Role.OTHER, pid=7, cgroup="/theirs"))
    assert world.told("warning") == []
    world.feed(OomSeen(kind=OomKind.KERNEL_HOST, role=Role.OTHER, pid=8))
    world.feed(OomSeen(kind=OomKind.KERNEL_CGROUP, role=Role.UNKNOWN, pid=9, cgroup="/whose"))
    assert len(world.told("warning")) == 2


@pytest.mark.parametrize("sign", [Sign.SCHEDULER_EXCEPTION, Sign.SCHEDULER_CRASHED, Sign.CHILD_FAILED])
def test_a_crash_told_by_the_log_holds_at_once_and_kills_nothing_that_generates(sign: Sign) -> None:
    world = World()
    world.feed(LogSeen(sign=sign, server="s", line="Scheduler hit an exception"))
    assert world.order == "HOLD"
    assert world.server().state is ServerState.SUSPECT
    assert world.run(20.0, until=lambda: world.order == "GO")
    assert world.fake.starts == ["by hand"]


def test_a_log_line_of_a_server_under_repair_changes_nothing() -> None:
    world = World()
    world.kill()
    repairing = world.server()
    world.feed(LogSeen(sign=Sign.SCHEDULER_CRASHED, server="s"))
    assert world.server() == repairing


@pytest.mark.parametrize("sign", [Sign.CONNECTION_REFUSED, Sign.CANCELLED, Sign.HEALTH_FAILED, Sign.READY])
def test_a_harmless_line_is_kept_and_told_to_nobody(sign: Sign) -> None:
    world = World()
    world.feed(LogSeen(sign=sign, line="…"))
    assert world.order == "GO"
    assert not world.told("warning")
    assert len(world.state.surroundings.logs) == 1


def test_a_flood_of_harmless_lines_is_told() -> None:
    world = World()
    world.feed(LogSeen(sign=Sign.CANCELLED, line="CancelledError", count=500))
    assert world.told("warning") == ["the log of the trainer: CancelledError"]


def test_where_each_log_stands_is_kept_and_no_line_carries_it_along() -> None:
    """The newest position of each log; one of a server that is not there any more is forgotten."""
    world = World("a", "b")
    world.feed(LogRead(server="a", position="1"))
    world.feed(LogRead(server=None, position="2"))
    world.feed(LogSeen(sign=Sign.XID, server="a", position="3"))
    world.feed(LogSeen(sign=Sign.XID, server="a"))
    world.feed(LogRead(server="gone", position="4"))
    world.feed(LogRead(server="b", position="5"))
    around = world.state.surroundings
    assert set(around.log_positions) == {
        LogPosition(server="a", position="3"),
        LogPosition(server=None, position="2"),
        LogPosition(server="b", position="5"),
    }
    assert [(line.position, line.count) for _, line in around.logs] == [(None, 2)]


def test_gpu_trouble_is_told_once_a_kind_and_gpu() -> None:
    world = World()
    for number in (79, 79, 48):
        world.feed(GpuTroubled(trouble=GpuTrouble.XID, gpu=0, number=number, text=f"GPU 0: Xid {number}"))
    world.feed(GpuTroubled(trouble=GpuTrouble.FILLING, gpu=0, number=20, text="GPU 0: full in 20 minutes"))
    world.feed(GpuTroubled(trouble=GpuTrouble.FILLING, gpu=0, number=19, text="GPU 0: full in 19 minutes"))
    assert world.told("warning") == ["GPU 0: Xid 79", "GPU 0: Xid 48", "GPU 0: full in 20 minutes"]
    assert world.order == "GO"


def test_memory_pressure_is_told_when_it_begins() -> None:
    world = World()
    for short in (True, True, False, True):
        world.feed(MemoryPressed(short=short, some_10s=40.0, full_10s=10.0))
    assert len(world.told("warning")) == 2
    assert world.state.surroundings.memory_short_since == world.now


def test_what_is_kept_is_bounded() -> None:
    world = World()
    for pid in range(100):
        world.feed(OomSeen(kind=OomKind.KERNEL_HOST, role=Role.OTHER, pid=pid))
    kept = world.state.surroundings.ooms
    assert len(kept) == SEEN_KEPT
    assert kept[-1][1].pid == 99
