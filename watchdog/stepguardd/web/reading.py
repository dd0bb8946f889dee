"""What can be read of a run beside its status, as JSON-able objects. Times are seconds since 1970. Pure."""

from collections.abc import Sequence

from typing_extensions import TypedDict  # the standard one has no schema before Python 3.12

from stepguardd.chronicle.chronicle import Chronicle, Episode, Notice

POINTS_MAX = 20_000
POINTS_DEFAULT = 4_000


class NoticeDict(TypedDict):
    """One thing that was told: `what` is its kind (opened, action, resumed, resolved, warning, …)."""

    id: int
    time: float
    incident: int | None
    what: str
    reason: str
    text: str


class EpisodeDict(TypedDict):
    """An incident with its turns on the curve; null is unknown or not yet."""

    id: int
    cause: str
    server: str | None
    attempt: int
    stage: str
    onset_step: int | None
    opened_step: int | None
    opened_at: float
    resumed_step: int | None
    resumed_at: float | None
    closed_step: int | None
    closed_at: float | None
    restarts: int
    resyncs: int
    rollbacks: int
    refused_batches: int
    evidence: list[str]
    known_to: str | None
    actions: list[str]
    notices: list[NoticeDict]


class LineDict(TypedDict):
    """One attempt's stretch of the curve, three lists of one length; a value of null is a gap."""

    attempt: int
    steps: list[int]
    times: list[float]
    values: list[float | None]


class SeriesDict(TypedDict):
    """The curve, thinned to about the points asked for; `points` counts all there ever were."""

    name: str
    points: int
    lines: list[LineDict]


class CheckpointDict(TypedDict, total=False):
    """A checkpoint; `verdict` is good, bad, incomplete or unknown, and null is unknown."""

    step: int
    attempt: int
    path: str
    verdict: str
    reason: str | None
    proven: bool | None
    healthy_steps: int | None
    quarantined: bool
    pinned: bool
    gone: bool


def series(chronicle: Chronicle, from_step: int | None, to_step: int | None, points: int) -> SeriesDict:
    """The reward curve within a window of steps, with every peak and trough of it."""
    drawn = chronicle.curve.draw(from_step, to_step, points)
    return {
        "name": "reward",
        "points": chronicle.curve.points,
        "lines": [
            {"attempt": one.attempt, "steps": one.steps, "times": one.walls, "values": one.values}
            for one in drawn
        ],
    }


def incidents(chronicle: Chronicle, limit: int) -> list[EpisodeDict]:
    """The incidents with what was told of each, the newest first."""
    told: dict[int | None, list[NoticeDict]] = {}
    for notice in chronicle.notices:
        told.setdefault(notice.incident, []).append(notice_json(notice))
    newest = sorted(chronicle.episodes.values(), key=lambda episode: -episode.number)[:limit]
    return [_episode(episode, told.get(episode.number, [])) for episode in newest]


def events(chronicle: Chronicle, after: int, limit: int) -> list[NoticeDict]:
    """What was told after a notice's id, in order; of too many the newest."""
    return [notice_json(notice) for notice in chronicle.told_since(after)[-limit:]]


def notice_json(notice: Notice) -> NoticeDict:
    """A notice as it is answered."""
    return {
        "id": notice.id,
        "time": round(notice.wall, 3),
        "incident": notice.incident,
        "what": notice.what,
        "reason": notice.reason,
        "text": notice.text,
    }


def _episode(episode: Episode, notices: Sequence[NoticeDict]) -> EpisodeDict:
    resumed, closed = episode.resumed_wall, episode.closed_wall
    return {
        "id": episode.number,
        "cause": episode.reason,
        "server": episode.server,
        "attempt": episode.attempt,
        "stage": "closed" if closed is not None else ("probation" if resumed is not None else "held"),
        "onset_step": episode.onset_step,
        "opened_step": episode.opened_step,
        "opened_at": round(episode.opened_wall, 3),
        "resumed_step": episode.resumed_step,
        "resumed_at": _rounded(resumed),
        "closed_step": episode.closed_step,
        "closed_at": _rounded(closed),
        "restarts": episode.restarts,
        "resyncs": episode.resyncs,
        "rollbacks": episode.rollbacks,
        "refused_batches": episode.refused_batches,
        "evidence": list(episode.evidence),
        "known_to": episode.known_to,
        "actions": list(episode.actions),
        "notices": list(notices),
    }


def _rounded(wall: float | None) -> float | None:
    return None if wall is None else round(wall, 3)
