"""
Which message goes to whom, and when.

A *case* is one incident, or one notice that belongs to none. A *line* is what one channel was told of a case.
A message is written when it is sent, out of everything that is known by then: what a channel was not told
because it waits, sleeps (quiet hours) or is full (rate limit) is in the next message, and nothing is queued
up here but "there is something to say".

    what happened              the channel hears of it
    ------------------------   -------------------------------------------------------------
    an incident opened         after the channel's own wait, so that the first remedy is in it
    goes on, again, a person   at once
    a remedy, a refused batch  with the next message, at the latest after `update_after_s`
    a person is needed         at once, whatever the wait, the hour and the rate
    it is still open           every `repeat_s`, unless somebody said that they know
    it ended                   at once; a channel that had heard nothing gets the whole story in one

Times are seconds of the monotonic clock; a reboot moves them (`resumed`).
"""

from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum

from ..breaker import Phase
from ..commands import Notify
from ..reasons import Reason
from .facts import About

CASES_MAX = 200
NOTES_MAX = 40
CASE_AGE_MAX_S = 7 * 86_400.0
INHIBITS_FOR_S = 600.0
HOUR_S = 3600.0


class Level(IntEnum):
    """How much a message asks of a person."""

    INFO = 0  # to know
    ALERT = 1  # the run is held, and Stepguard works on it
    CALL = 2  # nothing goes on until a person acts


class Kind(StrEnum):
    """What a message is. The values are stable: webhooks carry them."""

    OPENED = "opened"
    UPDATED = "updated"
    REPEATED = "repeated"
    RESOLVED = "resolved"
    NOTE = "note"
    DIGEST = "digest"
    TEST = "test"


_CALLS = frozenset({"call", "locked_out"})
_TURNS = frozenset({"resumed", "relapse", "person", "acked"})
_DESPITE_ACK = frozenset({"locked_out", "resolved", "acked"})

# A server in trouble explains these: they are told in its incident, never beside it.
_SYMPTOMS = frozenset(
    {
        Reason.REWARD_COLLAPSE, Reason.REWARD_PARTIAL_LOSS, Reason.REWARD_LEVEL_FALL,
        Reason.REWARD_START_LEVEL, Reason.REWARD_STUCK, Reason.REWARD_MISSING, Reason.REWARD_NOT_FINITE,
        Reason.REWARD_VARIANCE_COLLAPSE, Reason.ZERO_STREAK, Reason.MIN_REWARD, Reason.ABORTED_RATIO,
        Reason.LOGPROB_MISMATCH, Reason.LENGTH_SHIFT, Reason.FAILED_FRACTION, Reason.NO_GROUP,
        Reason.OUTAGE, Reason.ROLLOUTS_FAILED, Reason.STALE_WEIGHTS, Reason.CALLS_HUNG,
    }
)  # fmt: skip
_OF_SERVERS = frozenset(
    {
        Reason.SERVER_DIED, Reason.SERVER_STOPPED, Reason.SERVER_HUNG, Reason.SERVER_SPINNING,
        Reason.SERVER_UNREACHABLE, Reason.PAUSED_TOO_LONG, Reason.STALE_WEIGHTS, Reason.START_FAILED,
        Reason.CANARY_FAILED, Reason.RESTART_BUDGET_SPENT, Reason.REQUESTS_FAILED,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """
    One channel, as far as the book cares.

    Args:
        name: the channel's.
        wait_s: how long the first message of an incident waits, for what follows at once to be in it.
        level: cases below this are not told there.

    """

    name: str
    wait_s: float = 1.0
    level: Level = Level.INFO


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """
    When messages are sent.

    Args:
        repeat_s: an open incident is told again after this long.
        update_after_s: remedies that changed nothing visible are told at the latest after this long.
        warning_wait_s: a warning waits this long for an incident that explains it.
        max_per_hour: messages to one channel; what is beyond is told in one digest. Calls may take as many
            again.
        quiet: from and to, in minutes of the day; only calls are sent in between.

    """

    repeat_s: float = 4 * HOUR_S
    update_after_s: float = 300.0
    warning_wait_s: float = 30.0
    max_per_hour: int = 20
    quiet: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A `Notify` and when it was decided: on the monotonic clock, and for people."""

    at: float
    wall: float
    notify: Notify


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """
    What one channel was told of a case.

    Args:
        route: the channel.
        due: when it hears more; None while there is nothing more to say.
        loud: the next message minds neither quiet hours nor the rate: a person is needed, or was called.
        called: it was told that a person is needed.
        told: it was told anything.
        told_at: when it was told last.
        heard: how many of the case's notes it knows.
        held_back: its message waits for the rate limit.
        done: it knows how the case ended.

    """

    route: str
    due: float | None = None
    loud: bool = False
    called: bool = False
    told: bool = False
    told_at: float | None = None
    heard: int = 0
    held_back: bool = False
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One thing that happened in a case."""

    wall: float
    what: str
    reason: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thread of messages. `noted` counts the notes that it ever had; the newest are kept."""

    thread: int
    incident: int | None
    reason: str
    level: Level
    opened_at: float
    opened_wall: float
    notes: tuple[Note, ...] = ()
    noted: int = 0
    about: About | None = None
    known_to: str | None = None
    closed_wall: float | None = None
    symptoms: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """One message to be written and sent: a case as it is now, or for a digest several."""

    number: int
    route: str
    kind: Kind
    level: Level
    cases: tuple[Case, ...]
    new: tuple[Note, ...] = ()
    first: bool = False

    @property
    def thread(self) -> int:
        """The thread of its case; a digest is a thread of its own."""
        return 0 if self.kind is Kind.DIGEST else self.cases[0].thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """Everything that people still have to be told. `last_wall` is the newest notice that is in it."""

    at: float = 0.0
    boot: str = ""
    last_wall: float | None = None
    threads: int = 0
    sendings: int = 0
    cases: tuple[Case, ...] = ()
    sent: tuple[tuple[str, float], ...] = ()
    server_trouble_until: float | None = None
    dropped: int = 0


def take(book: Book, policy: Policy, routes: tuple[Route, ...], notice: Notice) -> Book:
    """The book with one more notice in it. Says nothing yet: see `due`."""
    notify = notice.notify
    note = Note(wall=notice.wall, what=notify.what, reason=notify.reason, text=notify.text)
    book = replace(book, at=max(book.at, notice.at), last_wall=notice.wall)
    if notify.what == "resolved" and _of_server(notify.reason):
        book = replace(book, server_trouble_until=notice.at + INHIBITS_FOR_S)
    found = next((case for case in book.cases if case.incident == notify.incident and not _over(case)), None)
    if notify.incident is None or found is None:
        if _explained(book, notify, notice.at):
            return book
        found = Case(
            thread=book.threads + 1,
            incident=notify.incident,
            reason=notify.reason,
            level=Level.INFO,
            opened_at=notice.at,
            opened_wall=notice.wall,
            lines=tuple(Line(route=route.name) for route in routes),
        )
        book = replace(book, threads=found.thread)
        if notify.incident is not None:
            book, symptoms = _absorbed(book)
            found = replace(found, symptoms=symptoms)
    return _kept(book, _noted(found, policy, routes, note, notify, notice.at))


def due(
    book: Book, policy: Policy, routes: tuple[Route, ...], at: float, minute: int
) -> tuple[Book, tuple[Sending, ...]]:
    """
    What is to be sent now, the oldest first, and the book in which it counts as told.

    Args:
        book: what is known.
        policy: when messages are sent.
        routes: the channels; a case's lines follow them.
        at: seconds of the monotonic clock.
        minute: of the day, where the people live, for quiet hours.

    """
    sent = tuple((name, when) for name, when in book.sent if at - when < HOUR_S)
    book = replace(book, at=max(book.at, at), sent=sent)
    sendings: list[Sending] = []
    for route in routes:
        book, more = _due_on(book, policy, route, at, quiet=_quiet(policy, minute))
        sendings += more
    cases = tuple(
        case
        for case in book.cases
        if at - case.opened_at < CASE_AGE_MAX_S
        and (not _over(case) or any(line.due is not None for line in case.lines))
    )
    return (book if cases == book.cases else replace(book, cases=cases)), tuple(sendings)


def next_at(book: Book) -> float | None:
    """When there may be something to send; None while nothing waits. Quiet hours and rates need a look."""
    times = [line.due for case in book.cases for line in case.lines if line.due is not None]
    return min(times, default=None)


def resumed(
    book: Book, policy: Policy, routes: tuple[Route, ...], *, at: float, wall: float, boot: str,
    open_incident: int | None,
) -> Book:  # fmt: skip
    """
    The book of an earlier daemon, taken up.

    Times of another boot are moved to this one's clock, channels follow today's config, and an incident that
    nobody has any more (the machine was rebooted) is ended: its end was not seen.
    """
    if book.boot != boot:
        book = _moved(book, at - book.at)
    book = replace(book, boot=boot, at=max(at, book.at))
    names = [route.name for route in routes]
    for case in book.cases:
        known = {line.route: line for line in case.lines}
        lines = tuple(known.get(name, Line(route=name, done=True)) for name in names)
        book = _kept(book, replace(case, lines=lines))
    for case in book.cases:
        if case.incident is None or _over(case) or case.incident == open_incident:
            continue
        text = "the watchdog was started anew and knows this incident no more: its end was not seen"
        note = Note(wall=wall, what="resolved", reason=case.reason, text=text)
        notify = Notify(incident=case.incident, what="resolved", reason=case.reason, text=text)
        book = _kept(book, _noted(case, policy, routes, note, notify, at))
    return book


# --- one notice


def _noted(
    case: Case, policy: Policy, routes: tuple[Route, ...], note: Note, notify: Notify, at: float
) -> Case:
    what, about = notify.what, notify.about or case.about
    level = Level.INFO if what == "resolved" else _level(case, what, about)
    known_to = case.known_to
    if about is not None and about.incident is not None and about.incident.known_to is not None:
        known_to = about.incident.known_to
    case = replace(
        case,
        level=max(case.level, level),
        notes=(*case.notes, note)[-NOTES_MAX:],
        noted=case.noted + 1,
        about=about,
        known_to=known_to,
        closed_wall=note.wall if what == "resolved" or case.incident is None else None,
    )
    waits = {route.name: route for route in routes}
    lines = tuple(
        _told_of(line, case, policy, waits[line.route], what, level, at) if line.route in waits else line
        for line in case.lines
    )
    return replace(case, lines=lines)


def _level(case: Case, what: str, about: About | None) -> Level:
    """A run that is held and that nobody but a person will let go on is a call, whatever opened it."""
    if what in _CALLS or (_nobody_is_at_it(about) and case.incident is not None):
        return Level.CALL
    return Level.INFO if case.incident is None else Level.ALERT


def _nobody_is_at_it(about: About | None) -> bool:
    """Whether the run waits for a person, and not for the one who paused it: whoever did knows."""
    return about is not None and about.person and about.phase is not Phase.FORCED_OPEN


def _told_of(
    line: Line, case: Case, policy: Policy, route: Route, what: str, level: Level, at: float
) -> Line:
    if line.done or case.level < route.level:
        return line
    if case.known_to is not None and what not in _DESPITE_ACK:
        return line
    if level is Level.CALL and (what in _CALLS or not line.called):
        return replace(_sooner(line, at), loud=True)
    if case.incident is None:
        return _sooner(line, at + (policy.warning_wait_s if what == "warning" else 0.0))
    if line.called and (what in _TURNS or what == "resolved"):
        line = replace(line, loud=True)  # whoever was woken wants to know
    if what == "resolved":
        return _sooner(line, at)
    if not line.told:
        return _sooner(line, case.opened_at + route.wait_s)
    if what in _TURNS:
        return _sooner(line, at)
    return _sooner(line, max(at, (line.told_at or at) + policy.update_after_s))


def _sooner(line: Line, at: float) -> Line:
    return line if line.due is not None and line.due <= at else replace(line, due=at)


def _explained(book: Book, notify: Notify, at: float) -> bool:
    """Whether a server's trouble, of now or of a moment ago, explains a notice without an incident."""
    if notify.what != "warning" or notify.reason not in _SYMPTOMS:
        return False
    if book.server_trouble_until is not None and at < book.server_trouble_until:
        return True
    return any(
        case.incident is not None and not _over(case) and _of_server(case.reason) for case in book.cases
    )


def _absorbed(book: Book) -> tuple[Book, tuple[str, ...]]:
    """The warnings that nobody was told of yet: an incident that opens now is what they were about."""
    ours = [
        case
        for case in book.cases
        if case.incident is None
        and case.reason in _SYMPTOMS
        and all(note.what == "warning" for note in case.notes)
        and not any(line.told for line in case.lines)
    ]
    rest = tuple(case for case in book.cases if case not in ours)
    return replace(book, cases=rest), tuple(note.text for case in ours for note in case.notes)[-NOTES_MAX:]


def _of_server(reason: str) -> bool:
    return reason in _OF_SERVERS


def _over(case: Case) -> bool:
    return case.closed_wall is not None


def _kept(book: Book, case: Case) -> Book:
    """The book with this case's next value. Too many cases cost the oldest that ended, and are counted."""
    if any(case.thread == other.thread for other in book.cases):
        cases = tuple(case if case.thread == other.thread else other for other in book.cases)
        return replace(book, cases=cases)
    cases = (*book.cases, case)
    if len(cases) <= CASES_MAX:
        return replace(book, cases=cases)
    victim = next((other for other in cases if _over(other)), cases[0])
    return replace(
        book, cases=tuple(other for other in cases if other is not victim), dropped=book.dropped + 1
    )


def _moved(book: Book, by_s: float) -> Book:
    def moved(when: float | None) -> float | None:
        return None if when is None else when + by_s

    cases = tuple(
        replace(
            case,
            opened_at=case.opened_at + by_s,
            lines=tuple(
                replace(line, due=moved(line.due), told_at=moved(line.told_at)) for line in case.lines
            ),
        )
        for case in book.cases
    )
    return replace(
        book,
        at=book.at + by_s,
        cases=cases,
        sent=tuple((name, when + by_s) for name, when in book.sent),
        server_trouble_until=moved(book.server_trouble_until),
    )


# --- what is due


def _due_on(
    book: Book, policy: Policy, route: Route, at: float, *, quiet: bool
) -> tuple[Book, list[Sending]]:
    waiting = [
        (line.due, case, line)
        for case in book.cases
        for line in case.lines
        if line.route == route.name and line.due is not None and line.due <= at
    ]
    waiting.sort(key=lambda entry: (entry[0], entry[1].thread))
    sendings: list[Sending] = []
    count = sum(name == route.name for name, _ in book.sent)
    held = [(case, line) for _, case, line in waiting if line.held_back and not line.loud]
    if len(held) > 1 and count < policy.max_per_hour and not quiet:
        book, digest = _digest(book, policy, route, held, at)
        sendings.append(digest)
        count += 1
        waiting = [entry for entry in waiting if not entry[2].held_back or entry[2].loud]
    for _, case, line in waiting:
        if quiet and not line.loud:
            continue
        if count >= policy.max_per_hour * (2 if line.loud else 1):
            if not line.held_back:
                book = _kept(book, _with(case, replace(line, held_back=True)))
            continue
        book, sending = _said(book, policy, route, case, line, at)
        sendings.append(sending)
        count += 1
    return book, sendings


def _said(
    book: Book, policy: Policy, route: Route, case: Case, line: Line, at: float
) -> tuple[Book, Sending]:
    over = _over(case)
    if case.incident is None:
        kind = Kind.NOTE
    elif over:
        kind = Kind.RESOLVED
    elif not line.told:
        kind = Kind.OPENED
    else:
        kind = Kind.UPDATED if case.noted > line.heard else Kind.REPEATED
    fresh = case.noted - line.heard
    new = case.notes[-fresh:] if fresh else ()
    sending = Sending(
        number=book.sendings + 1,
        route=route.name,
        kind=kind,
        level=_level_now(case, new, kind),
        cases=(case,),
        new=new,
        first=not line.told,
    )
    book = replace(book, sendings=sending.number, sent=(*book.sent, (route.name, at)))
    return _kept(book, _with(case, _after(line, case, policy, at))), sending


def _level_now(case: Case, new: tuple[Note, ...], kind: Kind) -> Level:
    """What this message asks for, which may be less than the case once did."""
    if kind is Kind.RESOLVED:
        return Level.INFO
    if kind in {Kind.OPENED, Kind.NOTE} or any(note.what in _CALLS for note in new):
        return case.level
    return Level.CALL if _nobody_is_at_it(case.about) and case.known_to is None else Level.INFO


def _digest(
    book: Book, policy: Policy, route: Route, held: list[tuple[Case, Line]], at: float
) -> tuple[Book, Sending]:
    sending = Sending(
        number=book.sendings + 1,
        route=route.name,
        kind=Kind.DIGEST,
        level=max(case.level for case, _ in held),
        cases=tuple(case for case, _ in held),
        first=True,
    )
    book = replace(book, sendings=sending.number, sent=(*book.sent, (route.name, at)))
    for case, line in held:
        book = _kept(book, _with(case, _after(line, case, policy, at)))
    return book, sending


def _after(line: Line, case: Case, policy: Policy, at: float) -> Line:
    """The line once everything up to now was said: an incident that is open is told again after a while."""
    silent = _over(case) or case.known_to is not None
    return replace(
        line,
        due=None if silent else at + policy.repeat_s,
        loud=_nobody_is_at_it(case.about) and not silent,
        called=line.called or case.level is Level.CALL,
        told=True,
        told_at=at,
        heard=case.noted,
        held_back=False,
        done=_over(case),
    )


def _with(case: Case, line: Line) -> Case:
    return replace(case, lines=tuple(line if line.route == old.route else old for old in case.lines))


def _quiet(policy: Policy, minute: int) -> bool:
    if policy.quiet is None:
        return False
    begin, end = policy.quiet
    return begin <= minute < end if begin <= end else minute >= begin or minute < end
