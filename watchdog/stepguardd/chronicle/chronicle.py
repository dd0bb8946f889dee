"""
The chronicle: taken in decision by decision, read by the page.

It decides nothing, and nothing waits for it. What it keeps is bounded, and what of it must outlive the daemon
is handed to the journal as an `Entry`.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from ..core.commands import Command, Notify
from ..core.events import Event, RewardLogged, StepCommitted
from ..core.state import Incident, State
from .curve import Curve, Point

NOTICES_KEPT: Final = 1000
EPISODES_KEPT: Final = 256
STEPS_MAX: Final = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One thing that was told to people."""

    id: int
    wall: float
    incident: int | None
    what: str
    reason: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """
    An incident with its place on the curve: the steps and the wall times of its turns.

    `onset_step` is the first bad step as estimated, `opened_step` where the trainer stood when it was held.
    """

    number: int
    reason: str
    server: str | None
    onset_step: int | None
    opened_step: int | None
    opened_wall: float
    resumed_step: int | None = None
    resumed_wall: float | None = None
    closed_step: int | None = None
    closed_wall: float | None = None
    attempt: int = 0
    restarts: int = 0
    resyncs: int = 0
    rollbacks: int = 0
    refused_batches: int = 0
    evidence: tuple[str, ...] = ()
    known_to: str | None = None
    actions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the journal has to keep of one decision."""

    point: Point | None = None
    episode: Episode | None = None


class Chronicle:
    """Empty at first; `restore` brings back what an earlier daemon kept."""

    def __init__(self) -> None:
        self.curve = Curve()
        self.episodes: dict[int, Episode] = {}
        self.notices: deque[Notice] = deque(maxlen=NOTICES_KEPT)
        self.recent: deque[tuple[int, Point]] = deque(maxlen=256)
        self.incidents_changed = 0  # a count that grows with each change of an episode
        self._since_start: list[Point] | None = []
        self._told = 0
        self._waiting: set[Callable[[], None]] = set()

    # ---- coming back ---------------------------------------------------------------------------------

    def restore(self, episodes: Iterable[Episode], notices: Iterable[Notice]) -> None:
        """The incidents and notices of earlier daemons, in order; before anything is taken in."""
        for episode in episodes:
            self.episodes[episode.number] = episode
        for notice in notices:
            self.notices.append(notice)
            self._told = notice.id
        self._forget()

    def restore_curve(self, earlier: Curve) -> None:
        """The curve of earlier daemons, read in the meantime; what came since goes on top of it."""
        since, self._since_start = self._since_start or [], None
        for point in since:
            earlier.append(point)
        self.curve = earlier

    # ---- going on ------------------------------------------------------------------------------------

    def take_in(
        self,
        event: Event,
        before: State,
        after: State,
        commands: tuple[Command, ...],
        *,
        now: float,
        wall: float,
    ) -> Entry | None:
        """
        Keep what is worth telling of one decision.

        Args:
            event: what happened.
            before: the state that it met.
            after: the state that it left.
            commands: what was decided.
            now: seconds of the monotonic clock, as the states count.
            wall: seconds since 1970, of the same moment.

        """
        told = [command for command in commands if isinstance(command, Notify)]
        for notify in told:
            self._told += 1
            self.notices.append(
                Notice(
                    id=self._told,
                    wall=wall,
                    incident=notify.incident,
                    what=notify.what,
                    reason=notify.reason,
                    text=notify.text,
                )
            )
        point = None
        if after.rewards is not before.rewards:
            point = _point(event, wall)
        if point is not None:
            self.curve.append(point)
            self.recent.append((self.curve.points, point))
            if self._since_start is not None:
                self._since_start.append(point)
        episode = self._episode(before, after, now=now, wall=wall)
        if told or episode is not None:
            self._wake()
        return None if point is None and episode is None else Entry(point=point, episode=episode)

    def waiting(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Have `wake` called when something was told; the answer ends that."""
        self._waiting.add(wake)
        return lambda: self._waiting.discard(wake)

    def told_since(self, last: int) -> list[Notice]:
        """The notices after this id, in order."""
        return [notice for notice in self.notices if notice.id > last]

    def _wake(self) -> None:
        for wake in tuple(self._waiting):
            wake()

    def _episode(self, before: State, after: State, *, now: float, wall: float) -> Episode | None:
        incident = after.incident
        if incident is None and after.last_incident is not before.last_incident:
            incident = after.last_incident
        elif incident is before.incident:
            return None
        if incident is None:
            return None
        episode = _drawn(self.episodes.get(incident.number), incident, after, now=now, wall=wall)
        if episode == self.episodes.get(incident.number):
            return None
        self.episodes[incident.number] = episode
        self.incidents_changed += 1
        self._forget()
        return episode

    def _forget(self) -> None:
        for number in sorted(self.episodes)[:-EPISODES_KEPT]:
            del self.episodes[number]


def _point(event: Event, wall: float) -> Point | None:
    if isinstance(event, StepCommitted | RewardLogged) and abs(event.step) >= STEPS_MAX:
        return None  # nonsense from a logged stream must not stop the daemon
    if isinstance(event, StepCommitted):
        return Point(attempt=event.attempt, step=event.step, wall=wall, reward=event.reward)
    if isinstance(event, RewardLogged):
        return Point(attempt=0, step=event.step, wall=wall, reward=event.reward)
    return None


def _drawn(old: Episode | None, incident: Incident, after: State, *, now: float, wall: float) -> Episode:
    """The incident with its place on the curve: a turn's step is where the trainer stood when it came."""
    step = after.trainer.step if after.trainer.step is not None else after.stream_step
    if old is None:
        old = Episode(
            number=incident.number,
            reason=incident.reason.value,
            server=incident.server,
            onset_step=incident.onset_step,
            opened_step=step,
            opened_wall=wall - max(0.0, now - incident.opened_at),
            attempt=after.trainer.attempt,
        )
    resumed, closed = incident.resumed_at is not None, incident.closed_at is not None
    return replace(
        old,
        reason=incident.reason.value,
        server=incident.server,
        onset_step=incident.onset_step,
        resumed_step=old.resumed_step if old.resumed_wall is not None else (step if resumed else None),
        resumed_wall=(old.resumed_wall or wall) if resumed else None,
        closed_step=old.closed_step if old.closed_wall is not None else (step if closed else None),
        closed_wall=(old.closed_wall or wall) if closed else None,
        restarts=incident.restarts,
        resyncs=incident.resyncs,
        rollbacks=incident.rollbacks,
        refused_batches=incident.refused_batches,
        evidence=incident.evidence,
        known_to=incident.known_to,
        actions=incident.actions,
    )
