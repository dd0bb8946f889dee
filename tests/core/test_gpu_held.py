"""GPU memory that does not come back after a stop: what a server began with is kept, what is held is told."""

from stepguardd.core.commands import StartServer, StopServer
from stepguardd.core.events import EffectEnded, GpuBaseline
from stepguardd.core.reasons import Reason
from stepguardd.core.state import ServerState, Settings
from stepguardd.testing import FakeServer, World

BASELINE = (GpuBaseline(gpu=0, unclaimed_bytes=1 << 30),)
NEVER_S = 1e9


def being_stopped() -> World:
    """A run whose server was started by the daemon, and is being ended again."""
    world = World(FakeServer(name="s", start_s=NEVER_S), settings=Settings(push_weights=True))
    world.kill()
    assert world.run(60, until=lambda: bool(world.all(StartServer)))
    world.fake.spawn(world.now)
    intent = world.all(StartServer)[-1].intent
    world.feed(EffectEnded(intent=intent, ok=True, procs=world.fake.procs, gpu_baseline=BASELINE))
    assert world.run(60, until=lambda: world.order == "GO")
    world.fake.stop_s = NEVER_S
    world.kill()
    return world


def test_a_stop_knows_what_the_gpus_were_like_before_the_start() -> None:
    """Also when another daemon does it: it is part of the state."""
    assert being_stopped().all(StopServer)[-1].gpu_baseline == BASELINE


def test_memory_that_is_held_is_told_and_the_server_started_all_the_same() -> None:
    world = being_stopped()
    intent = world.all(StopServer)[-1].intent
    starts = len(world.all(StartServer))
    world.feed(EffectEnded(intent=intent, ok=True, memory_held="GPU 0 holds 9.0 GiB more"))
    assert world.told("call") == ["s starts although GPU 0 holds 9.0 GiB more"]
    assert world.run(60, until=lambda: len(world.all(StartServer)) > starts)


def test_the_wait_for_memory_is_part_of_the_stops_time() -> None:
    world = being_stopped()
    settings = world.state.settings
    world.run(4 * settings.stop_timeout_s + settings.gpu_free_timeout_s - 1.0)
    assert world.server().state is ServerState.RESTARTING
    world.run(2.0)
    assert world.gate.reason == Reason.STOP_FAILED.value
