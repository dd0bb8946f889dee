"""What can befall a simulated run: each fault as the hand that does it, and the hand that takes it back."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from .world import FakeServer, World

Undo = Callable[[], object]


class SimFault(StrEnum):
    """What is done to the run."""

    KILL = "kill"
    PARENT = "parent"
    STOP = "stop"
    FREEZE = "freeze"
    SPIN = "spin"
    DEAF = "deaf"
    PAUSE = "pause"
    STALE = "stale"
    NO_START = "no-start"
    NO_LOAD = "no-load"
    ZEROS = "zeros"
    TRAINER = "trainer"
    DAEMON = "daemon"
    PERSON = "person"


STORIES = {
    SimFault.KILL: "a server's scheduler is killed",
    SimFault.PARENT: "a server's first process is killed",
    SimFault.STOP: "a server is stopped (SIGSTOP)",
    SimFault.FREEZE: "requests run: no token, no CPU",
    SimFault.SPIN: "requests run: no token, a busy CPU",
    SimFault.DEAF: "a server's port does not answer",
    SimFault.PAUSE: "somebody pauses a server",
    SimFault.STALE: "a server serves the base weights",
    SimFault.NO_START: "a server dies, and starts fail",
    SimFault.NO_LOAD: "a server dies, weights do not load",
    SimFault.ZEROS: "the reward function returns 0",
    SimFault.TRAINER: "the trainer is killed",
    SimFault.DAEMON: "Stepguard itself is killed",
    SimFault.PERSON: "a person pauses the run",
}

# How long the cause lasts, in seconds, the least and the most; the others are over at once or by a repair.
LASTS: dict[SimFault, tuple[float, float]] = {
    SimFault.DEAF: (2.0, 300.0),
    SimFault.PAUSE: (5.0, 500.0),
    SimFault.STOP: (5.0, 600.0),
    SimFault.NO_START: (10.0, 900.0),
    SimFault.NO_LOAD: (10.0, 900.0),
    SimFault.ZEROS: (60.0, 600.0),
    SimFault.PERSON: (30.0, 900.0),
}
OF_THE_RUN = frozenset({SimFault.ZEROS, SimFault.TRAINER, SimFault.DAEMON, SimFault.PERSON})
"""These befall the run and no server of it."""


@dataclass(slots=True)
class Rewards:
    """The reward function, which may break."""

    zeros: bool = False

    def mend(self) -> None:
        """It works again."""
        self.zeros = False


def possible(fault: SimFault, world: World, fake: FakeServer) -> bool:
    """Whether it can be done now: nobody kills what is dead."""
    well = fake.generates(world.now) and len(fake.procs) > 1
    return not world.trainer.dead if fault in OF_THE_RUN else well


def strike(fault: SimFault, world: World, fake: FakeServer, rewards: Rewards, dice: Random) -> Undo:
    """Do it; what comes back takes it back, where its cause does not end by itself."""
    match fault:
        case SimFault.KILL:
            world.kill(fake.name)
        case SimFault.PARENT:
            world.kill(fake.name, role="server")
        case SimFault.STOP:
            fake.stopped, fake.cont_helps = True, dice.random() < 0.5
            return lambda: _set(fake, stopped=False, cont_helps=True)
        case SimFault.FREEZE:
            fake.frozen, fake.busy = True, False
        case SimFault.SPIN:
            fake.frozen, fake.busy = True, True
        case SimFault.DEAF:
            fake.listens = False
            return lambda: _set(fake, listens=True)
        case SimFault.PAUSE:
            fake.paused = True
            return lambda: _set(fake, paused=False)
        case SimFault.STALE:
            fake.version = fake.base_version
        case SimFault.NO_START:
            fake.can_start = False
            world.kill(fake.name)
            return lambda: _set(fake, can_start=True)
        case SimFault.NO_LOAD:
            fake.can_load = world.trainer.can_resync = False
            world.kill(fake.name)
            return lambda: _loads(world, fake)
        case SimFault.ZEROS:
            rewards.zeros = True
            return rewards.mend
        case SimFault.TRAINER:
            world.kill_trainer()
        case SimFault.DAEMON:
            world.restart_daemon()
        case SimFault.PERSON:
            world.ask("pause")
            return lambda: world.ask("resume")
    return _nothing


def _set(fake: FakeServer, **values: bool) -> None:
    for name, value in values.items():
        setattr(fake, name, value)


def _loads(world: World, fake: FakeServer) -> None:
    fake.can_load = world.trainer.can_resync = True


def _nothing() -> None:
    """Its cause is over at once."""
