"""A day of a run in which nothing is wrong, and nothing is quiet either; a part of it colocated."""

import random
from dataclasses import dataclass, field

import pytest

from stepguardd.core.commands import ContinueServer, Notify, PublishGate, RunCanary, StopServer
from stepguardd.core.events import (
    Answer,
    RequestsFailed,
    SchedulerAsked,
    ServerProbed,
    StepCommitted,
)
from stepguardd.core.state import ServerState, Settings
from stepguardd.testing import FakeServer, World

HOUR_S = 3600.0
LOST = 0.005


@dataclass(slots=True, kw_only=True)
class NoisyServer(FakeServer):
    """One whose probes get lost now and then, whole or in part, and whose pace varies tenfold."""

    rng: random.Random = field(default_factory=lambda: random.Random(0))
    lost: int = 0

    def work(self, now: float, tick_s: float = 0.25, *, rollouts: bool) -> None:
        self.rate = int(2000 * self.rng.lognormvariate(0.0, 1.0))
        # Now and then nothing comes for a few seconds: a long prompt, a collection of garbage, a slow disk.
        if self.chunk_s == 0.0 and self.rng.random() < 0.002:
            self.chunk_s = self.rng.choice([3.0, 5.0, 7.0])
        elif self.rng.random() < 0.05:
            self.chunk_s = 0.0
        FakeServer.work(self, now, tick_s, rollouts=rollouts)

    def probed(self, now: float) -> ServerProbed:
        event = FakeServer.probed(self, now)
        if self.rng.random() < LOST:
            self.lost += 1
            return ServerProbed(server=self.name, ready=Answer.TIMEOUT, model_info=Answer.TIMEOUT)
        if self.rng.random() < LOST:
            self.lost += 1
            return ServerProbed(server=self.name, ready=event.ready, model_info=event.model_info)
        return event

    def opinion(self, now: float) -> SchedulerAsked:
        event = FakeServer.opinion(self, now)
        if self.rng.random() < 10 * LOST:
            return SchedulerAsked(server=self.name, info=Answer.TIMEOUT, waited_s=3.0)
        return event


class Day:
    """The trainer's phases, over and over, with the servers as they are in each."""

    def __init__(self, seed: int, *, colocated: bool) -> None:
        self.rng = random.Random(seed)
        self.fakes = [
            NoisyServer(name=name, load=16, rng=random.Random(seed + n)) for n, name in enumerate("ab")
        ]
        settings = Settings(push_weights=True, colocated=colocated)
        self.colocated = colocated
        self.world = World(*self.fakes, settings=settings, tick_s=1.0)

    def spend(self, phase: str, seconds: float) -> None:
        self.world.trainer.phase = phase
        self.world.see_trainer()
        self.world.run(seconds)

    def offload(self, gone: bool) -> None:
        if self.colocated:
            for fake in self.fakes:
                fake.frozen, fake.busy = gone, not gone

    def step(self) -> None:
        world, rng = self.world, self.rng
        self.spend("ROLLOUT", min(900.0, 120.0 * rng.lognormvariate(0.0, 0.7)))
        if rng.random() < 0.3:  # the stragglers: one server has nothing left to do
            self.fakes[0].load = self.fakes[0].running = 0
            self.spend("ROLLOUT", rng.uniform(5.0, 200.0))
            self.fakes[0].load = 16
        for count in range(1, rng.randrange(7)):
            world.feed(RequestsFailed(attempt=0, in_a_row=count))
        world.feed(RequestsFailed(attempt=0, in_a_row=0))
        self.spend("REWARD", rng.uniform(1.0, 40.0))
        assert world.batch(0.7 + rng.gauss(0.0, 0.03))
        self.offload(True)
        self.spend("TRAIN", 90.0 * rng.uniform(0.5, 3.0) + (700.0 if rng.random() < 0.1 else 0.0))
        world.trainer.step += 1
        version = f"v{world.trainer.step}"
        world.feed(StepCommitted(attempt=0, step=world.trainer.step, reward=0.7, weight_version=version))
        if world.trainer.step % 25 == 0:
            self.spend("CHECKPOINT", rng.uniform(10.0, 400.0))
        self.offload(False)
        self.sync(version)

    def sync(self, version: str) -> None:
        """Paused in one of the modes, or blocked by the update; one takes the weights after the other."""
        mode = self.rng.choice(["abort", "in_place", "retract", None])
        for fake in self.fakes:
            fake.paused, fake.frozen, fake.busy = mode is not None, mode is None, self.rng.random() < 0.5
            fake.pause_mode = mode or "in_place"
        for fake in self.fakes:
            self.spend("SYNC", self.rng.uniform(1.0, 30.0))
            fake.version = version
        self.world.trainer.version = version
        self.world.see_trainer()
        for fake in self.fakes:
            fake.paused, fake.frozen, fake.busy = False, False, True


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("seed", "colocated", "hours"), [(11, False, 14), (12, True, 10)])
def test_twenty_four_healthy_hours_with_servers_hold_nothing(seed: int, colocated: bool, hours: int) -> None:
    day = Day(seed, colocated=colocated)
    world = day.world
    while world.now < 1000.0 + hours * HOUR_S:
        day.step()
    assert world.orders() == ["GO"], [(at, said) for at, said in world.said if isinstance(said, PublishGate)]
    assert not [said for said in world.all(Notify) if said.what != "warning"]
    for kind in (StopServer, ContinueServer, RunCanary):
        assert not world.all(kind)
    # It was no quiet day.
    assert world.trainer.step > 60
    assert sum(fake.lost for fake in day.fakes) > 300
    assert any(state is ServerState.PLANNED for _, _, state in world.moves)
    assert any(what == "scheduler" for _, _, what in world.asked)
