"""
What the daemon sees of a server in each state, as promises that fakes and real servers keep alike.

Run by tests/core/test_fake_evidence.py on the fake of the phase matrix, by test_embedded_evidence.py here on
the embedded server, and by tests/real_sglang on a real one. Each test leaves the server as it found it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import pytest

from stepguardd.core.events import Answer, GenerationAsked, SchedulerAsked, ServerProbed

SENT = 3


class Subject(Protocol):
    """A server that can be looked at as the daemon does, and be brought into any state."""

    def look(self) -> ServerProbed: ...
    def opinion(self) -> SchedulerAsked: ...
    def token(self) -> GenerationAsked: ...
    def stopped(self) -> tuple[int, ...]:
        """Which of its processes are stopped."""
        ...

    def send(self) -> None:
        """Send SENT requests that take a while."""
        ...

    def drop(self) -> None:
        """End them."""
        ...

    def pause(self, mode: str) -> None: ...
    def go_on(self) -> None: ...
    def stop(self) -> None:
        """SIGSTOP to its scheduler."""
        ...

    def wake(self) -> None: ...
    def load(self, version: str) -> None:
        """Have it take weights from disk under this version."""
        ...

    def let(self, seconds: float) -> None:
        """Time passes."""
        ...


@pytest.fixture
def at_work(subject: Subject) -> Iterator[Subject]:
    """It has requests, and gives tokens."""
    subject.send()
    see(subject, lambda: (subject.look().running or 0) >= SENT, "the requests are in it")
    yield subject
    subject.drop()
    see(subject, lambda: subject.look().running == 0, "they are out of it")


def see(subject: Subject, holds: Callable[[], bool], what: str, within_s: float = 30.0) -> None:
    """Wait in the server's own time."""
    waited_s = 0.0
    while not holds():
        assert waited_s < within_s, f"never: {what}"
        subject.let(0.25)
        waited_s += 0.25


def tokens_come(subject: Subject) -> None:
    before = subject.look().tokens
    see(subject, lambda: subject.look().tokens != before, "a token")


def tokens_stand(subject: Subject) -> None:
    """What was in flight is counted; after that nothing is."""
    subject.let(1.5)
    before = subject.look().tokens
    subject.let(1.5)
    assert subject.look().tokens == before
    assert before is not None


def test_an_idle_server_answers_everything_and_its_snapshots_are_fresh(subject: Subject) -> None:
    see(subject, lambda: subject.look().running == 0, "nothing runs")
    found = subject.look()
    assert (found.ready, found.model_info, found.metrics) == (Answer.OK,) * 3
    assert found.weight_version is not None
    assert subject.stopped() == ()
    first = subject.opinion()
    assert (first.info, first.loads) == (Answer.OK, Answer.OK)
    assert first.loads_stamp is not None
    see(subject, lambda: subject.opinion().loads_stamp != first.loads_stamp, "another snapshot")


def test_a_token_asked_for_takes_a_second_at_least(subject: Subject) -> None:
    found = subject.token()
    assert found.answer is Answer.OK
    assert found.waited_s >= 0.95  # a contract of the server, and what tells a stub


def test_at_work_its_tokens_move_and_its_scheduler_answers(at_work: Subject) -> None:
    tokens_come(at_work)
    assert at_work.opinion().info is Answer.OK


@pytest.mark.parametrize("mode", ["abort", "in_place", "retract"])
def test_a_paused_server_says_no_and_its_scheduler_answers(at_work: Subject, mode: str) -> None:
    at_work.pause(mode)
    try:
        see(at_work, lambda: at_work.look().ready is Answer.UNAVAILABLE, "/ready says no")
        tokens_stand(at_work)
        found = at_work.look()
        assert found.model_info is Answer.OK
        assert bool(found.running) is (mode != "abort")
        assert at_work.opinion().info is Answer.OK
        assert at_work.stopped() == ()
    finally:
        at_work.go_on()
    see(at_work, lambda: at_work.look().ready is Answer.OK, "/ready says yes")


def test_a_stopped_scheduler_leaves_every_cheap_endpoint_well_and_does_not_answer(at_work: Subject) -> None:
    at_work.stop()
    try:
        see(at_work, lambda: at_work.stopped() != (), "a stopped process")
        tokens_stand(at_work)
        found = at_work.look()
        assert (found.ready, found.model_info, found.metrics) == (Answer.OK,) * 3
        assert (found.running or 0) >= SENT
        first, second = at_work.opinion(), at_work.opinion()
        assert first.info is second.info is Answer.TIMEOUT
        assert first.waited_s > 0.0
        assert first.loads_stamp == second.loads_stamp
    finally:
        at_work.wake()
    tokens_come(at_work)
    assert at_work.opinion().info is Answer.OK


def test_after_a_failed_health_check_ready_says_no_until_one_succeeds(subject: Subject) -> None:
    subject.pause("in_place")
    try:
        assert subject.token().answer is Answer.UNAVAILABLE
    finally:
        subject.go_on()
    subject.let(1.0)
    assert subject.look().ready is Answer.UNAVAILABLE
    assert subject.look().model_info is Answer.OK
    assert subject.token().answer is Answer.OK
    assert subject.look().ready is Answer.OK


def test_the_version_of_new_weights_is_seen(subject: Subject) -> None:
    before = subject.look().weight_version
    assert before is not None
    subject.load("31")
    try:
        assert subject.look().weight_version == "31"
    finally:
        subject.load(before)
    assert subject.look().weight_version == before
