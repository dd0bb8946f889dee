"""The fake behind the phase matrix keeps the same promises of evidence as the servers that it stands for."""

import pytest

from daemon_parts.server_evidence import *  # noqa: F403 - every test of it, on the fake
from daemon_parts.server_evidence import SENT
from stepguardd.core.events import GenerationAsked, SchedulerAsked, ServerProbed
from stepguardd.testing import FakeServer

TICK_S = 0.25


class FakeSubject:
    """The fake server on a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.fake = FakeServer(name="s", load_s=0.0, version="v0", base_version="v0")
        self.fake.spawn(self.now)

    def look(self) -> ServerProbed:
        return self.fake.probed(self.now)

    def opinion(self) -> SchedulerAsked:
        event = self.fake.opinion(self.now)
        self.let(event.waited_s)
        return event

    def token(self) -> GenerationAsked:
        began = self.now
        while (event := self.fake.token(began, self.now)) is None:
            self.let(TICK_S)
        return event

    def stopped(self) -> tuple[int, ...]:
        return tuple(known.pid for known in self.fake.procs) if self.fake.stopped else ()

    def send(self) -> None:
        self.fake.load = SENT
        self.let(TICK_S)

    def drop(self) -> None:
        self.fake.load = self.fake.running = 0

    def pause(self, mode: str) -> None:
        self.fake.paused, self.fake.pause_mode = True, mode
        self.let(TICK_S)

    def go_on(self) -> None:
        self.fake.paused = False

    def stop(self) -> None:
        self.fake.stopped = True

    def wake(self) -> None:
        self.fake.stopped = False

    def load(self, version: str) -> None:
        self.fake.version = version

    def let(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += TICK_S
            self.fake.work(self.now, rollouts=True)


@pytest.fixture
def subject() -> FakeSubject:
    return FakeSubject()
