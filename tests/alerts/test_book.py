"""Which message goes where and when: grouped by incident, quiet at night, never without the end."""

from dataclasses import replace
from typing import Any

from stepguardd.core.alerts import book as books
from stepguardd.core.alerts.book import Book, Kind, Level, Notice, Policy, Route, Sending
from stepguardd.core.alerts.facts import About
from stepguardd.core.alerts.words import Place, write
from stepguardd.core.breaker import Phase
from stepguardd.core.commands import Notify
from stepguardd.core.reasons import Reason
from stepguardd.core.state import GateOrder, Incident, Mode

SLACK, MAIL = Route(name="slack", wait_s=1.0), Route(name="email", wait_s=60.0, level=Level.ALERT)
ROUTES = (SLACK, MAIL)
NOON, NIGHT = 720, 120


class Desk:
    """A book with the hands that feed it."""

    def __init__(self, **policy: object) -> None:
        self.policy = replace(Policy(), **policy)  # type: ignore[arg-type]
        self.book = Book()
        self.minute = NOON

    def take(
        self, at: float, what: str, *, incident: int | None = 1, text: str = "", person: bool = False,
        known_to: str | None = None, reason: Reason = Reason.SERVER_DIED, phase: Phase = Phase.OPEN,
    ) -> list[Sending]:  # fmt: skip
        told = None
        if incident is not None:
            told = Incident(
                number=incident, reason=reason, server="s", onset_step=31, opened_at=at, known_to=known_to
            )
        about = About(mode=Mode.ACT, phase=phase, order=GateOrder.HOLD, incident=told, person=person)
        notify = Notify(incident=incident, what=what, reason=reason.value, text=text or what, about=about)
        self.book = books.take(self.book, self.policy, ROUTES, Notice(at=at, wall=at + 1e9, notify=notify))
        return self.at(at)

    def at(self, at: float) -> list[Sending]:
        self.book, sendings = books.due(self.book, self.policy, ROUTES, at, self.minute)
        return list(sendings)


def kinds(sendings: list[Sending], route: str = "slack") -> list[Kind]:
    return [one.kind for one in sendings if one.route == route]


def test_an_incident_that_heals_is_three_messages_in_a_thread_and_one_mail() -> None:
    desk = Desk()
    sent = desk.take(0.0, "opened") + desk.take(0.0, "action") + desk.at(1.0)
    sent += desk.take(3.0, "action") + desk.take(6.0, "resumed") + desk.take(8.0, "resolved")
    assert kinds(sent) == [Kind.OPENED, Kind.UPDATED, Kind.RESOLVED]
    assert kinds(sent, "email") == [Kind.RESOLVED]
    assert {one.thread for one in sent} == {1}
    assert desk.book.cases == ()


def test_an_open_incident_is_told_again_until_somebody_knows() -> None:
    desk = Desk()
    desk.take(0.0, "opened")
    desk.at(1.0)
    assert kinds(desk.at(4 * 3600.0)) == []
    assert kinds(desk.at(4 * 3600.0 + 1)) == [Kind.REPEATED]
    assert kinds(desk.take(15_000.0, "acked", known_to="ann: on it")) == [Kind.UPDATED]
    assert desk.take(15_001.0, "action", known_to="ann: on it") == []
    assert desk.at(80_000.0) == []
    assert kinds(desk.take(80_001.0, "locked_out", known_to="ann: on it")) == [Kind.UPDATED]
    assert kinds(desk.take(80_002.0, "resolved", known_to="ann: on it")) == [Kind.RESOLVED]


def test_at_night_only_a_call_is_heard_and_the_rest_follows_as_one_message() -> None:
    desk = Desk(quiet=(1320, 420))
    desk.minute = NIGHT
    assert desk.take(0.0, "opened") + desk.at(1.0) + desk.take(6.0, "resumed") == []
    assert kinds(desk.take(7.0, "call", incident=2)) == [Kind.OPENED]
    assert desk.take(8.0, "resolved") == []
    desk.minute = NOON
    assert kinds(desk.at(20_000.0)) == [Kind.RESOLVED, Kind.REPEATED]


def test_whoever_was_woken_hears_at_night_that_it_is_over() -> None:
    desk = Desk(quiet=(1320, 420))
    desk.minute = NIGHT
    assert kinds(desk.take(0.0, "opened", person=True)) == [Kind.OPENED]
    assert desk.take(1.0, "refused", person=True) == [], "the same call is not made twice"
    assert kinds(desk.take(2.0, "resumed")) == [Kind.UPDATED]


def test_nobody_is_woken_for_a_run_that_a_person_pauses() -> None:
    """With an incident or without: whoever paused knows, the others read it in the morning."""
    desk = Desk(quiet=(1320, 420))
    paused: dict[str, Any] = {"person": True, "phase": Phase.FORCED_OPEN, "reason": Reason.OPERATOR_PAUSE}
    (told,) = desk.take(0.0, "person", incident=None, text="paused by ada: a look", **paused)
    assert (told.route, told.level) == ("slack", Level.INFO)
    desk.take(10.0, "opened")
    assert kinds(desk.at(11.0)) == [Kind.OPENED]
    desk.minute = NIGHT
    assert desk.take(12.0, "person", **paused) == []
    assert desk.at(20_000.0) == []
    desk.minute = NOON
    assert [one.level for one in desk.at(20_001.0) if one.route == "slack"] == [Level.INFO]


def test_a_server_in_trouble_explains_warnings_before_during_and_after() -> None:
    desk = Desk()
    assert desk.take(0.0, "warning", incident=None, reason=Reason.REWARD_COLLAPSE) == []
    desk.take(2.0, "opened")
    assert desk.book.cases[0].symptoms == ("warning",)
    desk.take(3.0, "warning", incident=None, reason=Reason.ABORTED_RATIO)
    desk.take(4.0, "resolved")
    desk.take(5.0, "warning", incident=None, reason=Reason.REWARD_LEVEL_FALL)
    assert kinds(desk.at(500.0)) == []
    desk.take(700.0, "warning", incident=None, reason=Reason.REWARD_LEVEL_FALL)
    assert kinds(desk.at(731.0)) == [Kind.NOTE]


def test_a_flood_ends_in_one_digest_and_loses_no_call() -> None:
    desk = Desk(max_per_hour=3)
    sent = []
    for number in range(1, 11):
        sent += desk.take(float(number), "opened", incident=number) + desk.at(number + 1.0)
    assert kinds(sent) == [Kind.OPENED] * 3
    assert kinds(desk.take(12.0, "call", incident=9)) == [Kind.OPENED], "a call passes"
    (digest,) = [one for one in desk.at(3700.0) if one.kind is Kind.DIGEST and one.route == "slack"]
    assert len(digest.cases) == 6
    assert "6 messages held back" in write(digest, Place(run="r", option=""), 4e9).headline


def test_a_reboot_ends_what_nobody_knows_any_more() -> None:
    desk = Desk()
    desk.take(1000.0, "opened")
    desk.at(1001.0)
    desk.book = books.resumed(
        desk.book, desk.policy, ROUTES, at=5.0, wall=2e9, boot="another", open_incident=None
    )
    assert kinds(desk.at(5.0)) == [Kind.RESOLVED]


def test_outside_text_cannot_set_the_form_of_a_message() -> None:
    from stepguardd.alerts.channels.email import compose
    from stepguardd.alerts.render import as_html, as_mrkdwn

    desk = Desk()
    evil = "<!channel> *x* \r\nBcc: a@b.c \x1b[31m <script>alert(1)</script> `" + "y" * 5000
    desk.take(0.0, "opened")
    (sending,) = [one for one in desk.take(0.5, "call", text=evil) if one.route == "slack"]
    message = write(sending, Place(run="r", option="--run-dir /r"), 2e9)
    slack = as_mrkdwn(message)
    assert "&lt;!channel&gt;" in slack
    assert "<!channel>" not in slack
    assert "<script>" not in as_html(message, None)
    assert "\x1b" not in slack + as_html(message, None)
    assert len(slack) < 6000
    mail = compose(replace(message, headline=evil.replace("\r\n", " ")), "a@b.c", ("d@e.f",), None, None)
    assert mail["Bcc"] is None
