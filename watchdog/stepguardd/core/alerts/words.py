"""
The message itself: what a calm engineer on call would write, out of a case's facts.

Plain text in named sections; each channel gives them its own form, and its own escapes. Whatever may have
come from outside (process output, a peer's answer, a person's reason) is cut and kept on one line here.
"""

from dataclasses import dataclass

from ..breaker import Phase
from ..reasons import Reason
from ..state import GateOrder, Mode, ServerState
from .book import Case, Kind, Level, Note, Sending
from .facts import About

TEXT_CHARS_MAX = 300
LINES_MAX = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A title and its lines."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """
    One message, before any channel's form.

    Args:
        number: unique over the life of the run: receivers may know a repeated one by it.
        thread: messages of one thread belong together; 0 is alone.
        first: nothing of this thread was sent on this channel before.
        kind: what it is.
        level: what it asks of a person.
        run: the run's name.
        headline: one sentence that can stand alone.
        lead: one or two sentences more; may be empty.
        sections: the details, in reading order.
        command: what a person may want to type, and what it does; None where there is nothing.
        link: where to look; None where no address is known.
        wall: when it was written, seconds since 1970.
        opened_wall: when the trouble began.
        incident: its number, as `stepguard status` shows it.
        reason: the stable code.
        onset_step: since which step; None is unknown.
        picture: whether the reward's curve belongs to it.

    """

    number: int
    thread: int
    first: bool
    kind: Kind
    level: Level
    run: str
    headline: str
    lead: str = ""
    sections: tuple[Section, ...] = ()
    command: tuple[str, str] | None = None
    link: str | None = None
    wall: float
    opened_wall: float
    incident: int | None = None
    reason: str = ""
    onset_step: int | None = None
    picture: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """
    Where the run is, for the commands and links of a message.

    Args:
        run: its name.
        option: what its commands need to find it: `--run-dir /run/stepguard/night`.
        link: the page's address; None without one.

    """

    run: str
    option: str
    link: str | None = None


# What happened, as the subject of "… at step 188". {server} is the server's name.
_WHAT = {
    Reason.SERVER_DIED: "{server} died",
    Reason.SERVER_STOPPED: "{server} was stopped",
    Reason.SERVER_HUNG: "{server} hangs",
    Reason.SERVER_SPINNING: "{server} spins without a token",
    Reason.SERVER_UNREACHABLE: "{server} does not answer",
    Reason.SERVER_RETURNED: "{server} came back, unproven",
    Reason.REQUESTS_FAILED: "the trainer's requests to {server} fail",
    Reason.SERVER_PAUSED: "{server} is paused",
    Reason.PAUSED_TOO_LONG: "{server} is paused for too long",
    Reason.START_FAILED: "{server} did not start",
    Reason.STOP_FAILED: "{server} could not be stopped",
    Reason.CANARY_FAILED: "{server} does not generate",
    Reason.RESYNC_FAILED: "{server} did not get the current weights",
    Reason.WEIGHTS_UNPROVEN: "{server}'s weights are not proven current",
    Reason.STALE_WEIGHTS: "{server} serves stale weights",
    Reason.VERSION_WENT_BACK: "{server} went back to older weights",
    Reason.CHECKSUM_DIFFERS: "{server} and another replica serve different weights as one version",
    Reason.ANSWER_DIFFERS: "{server} does not generate what its weights' version did",
    Reason.RESTART_BUDGET_SPENT: "{server} failed again, and its restarts are spent",
    Reason.REWARD_COLLAPSE: "the reward collapsed",
    Reason.REWARD_PARTIAL_LOSS: "a share of the reward is gone",
    Reason.REWARD_LEVEL_FALL: "the reward fell to a new level",
    Reason.REWARD_START_LEVEL: "the reward fell to the base model's level",
    Reason.REWARD_DECAY: "the reward decays",
    Reason.REWARD_STUCK: "the reward is stuck at one number",
    Reason.REWARD_NOT_FINITE: "the reward is not a number",
    Reason.REWARD_MISSING: "no reward arrives",
    Reason.REWARD_VARIANCE_COLLAPSE: "all rollouts score the same",
    Reason.ZERO_STREAK: "the reward is zero step after step",
    Reason.MIN_REWARD: "the reward is below reward.min_reward",
    Reason.LOSS_NOT_FINITE: "the loss is not a number",
    Reason.GRAD_NOT_FINITE: "the gradient is not a number",
    Reason.ABORTED_RATIO: "more rollouts fail than usual",
    Reason.ROLLOUTS_FAILED: "batch after batch has failed rollouts",
    Reason.PROMPT_QUARANTINED: "a prompt kills the server",
    Reason.CALLS_HUNG: "too many calls hung at once",
    Reason.NO_CHECKPOINT: "there is no good checkpoint to go back to",
    Reason.ROLLBACK_FAILED: "the rollback failed",
    Reason.TRAINER_EXITED: "the trainer exited",
    Reason.NODE_LOST: "a node of the run is lost",
    Reason.OPERATOR_PAUSE: "a person paused the run",
    Reason.OPERATOR_ROLLBACK: "a person asked for a rollback",
    Reason.OPERATOR_RESTART: "a person asked for a restart",
}


def write(sending: Sending, place: Place, wall: float) -> Message:
    """
    The message of a sending.

    Args:
        sending: what is to be told.
        place: where the run is.
        wall: now, in seconds since 1970.

    """
    if sending.kind is Kind.DIGEST:
        return _digest(sending, place, wall)
    case = sending.cases[0]
    incident = None if case.about is None else case.about.incident
    step = None if incident is None else incident.onset_step
    if sending.kind is Kind.NOTE:
        headline, lead, sections, command = _note(case)
    else:
        headline, lead = _headline(sending, case, wall)
        sections = _sections(sending, case, wall)
        command = _command(sending, case, place)
    return Message(
        number=sending.number,
        thread=sending.thread,
        first=sending.first,
        kind=sending.kind,
        level=sending.level,
        run=place.run,
        headline=cut(headline),
        lead=cut(lead),
        sections=tuple(Section(title=title, lines=_cut_all(lines)) for title, lines in sections if lines),
        command=command,
        link=place.link,
        wall=wall,
        opened_wall=case.opened_wall,
        incident=case.incident,
        reason=case.reason,
        onset_step=step,
        picture=sending.kind is Kind.RESOLVED or (sending.level is Level.CALL and case.incident is not None),
    )


def sample(place: Place, wall: float) -> Message:
    """What `stepguard alert-test` sends: it says what it is, and looks like the real one."""
    return Message(
        number=0,
        thread=0,
        first=True,
        kind=Kind.TEST,
        level=Level.INFO,
        run=place.run,
        headline="This is a test: alerts of this run arrive here",
        lead="Nothing happened. Somebody ran `stepguard alert-test`.",
        sections=(
            Section(title="How sure, and why", lines=("100% sure: a person typed a command",)),
            Section(title="What happens next", lines=("Nothing. The next message here is a real one.",)),
        ),
        command=(f"stepguard status {place.option}".strip(), "how the run is now"),
        link=place.link,
        wall=wall,
        opened_wall=wall,
        picture=True,
    )


def cut(text: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    """One line of bounded length, without control characters: nothing from outside sets a message's form."""
    flat = " ".join(text.split())
    if not flat.isprintable():
        flat = "".join(char if char.isprintable() else "�" for char in flat)
    return flat if len(flat) <= chars_max else flat[: chars_max - 1] + "…"


def lasting(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def counted(count: int, one: str, several: str | None = None) -> str:
    """A count with its word."""
    return f"{count} {one if count == 1 else several or one + 's'}"


def _cut_all(lines: list[str]) -> tuple[str, ...]:
    kept = tuple(cut(line) for line in lines[:LINES_MAX])
    return kept if len(lines) <= LINES_MAX else (*kept, f"… and {len(lines) - LINES_MAX} more")


def what(case: Case) -> str:
    """What happened, as a clause: "sglang died"."""
    incident = None if case.about is None else case.about.incident
    server = "a server" if incident is None or incident.server is None else incident.server
    clause = _WHAT.get(Reason(case.reason)) if case.reason in set(Reason) else None
    return (clause or case.reason.replace("_", " ")).replace("{server}", server)


def _sentence(text: str) -> str:
    """With a capital letter, unless it begins with a name."""
    return text[:1].upper() + text[1:] if text.partition(" ")[0] in _ARTICLES else text


_ARTICLES = {"a", "all", "batch", "more", "no", "the", "there"}


def _since(case: Case) -> str:
    incident = None if case.about is None else case.about.incident
    if incident is None or incident.onset_step is None:
        return ""
    return f" at step {incident.onset_step}"


# --- the headline


def _headline(sending: Sending, case: Case, wall: float) -> tuple[str, str]:
    event, about = _sentence(what(case)) + _since(case), case.about
    if sending.kind is Kind.RESOLVED:
        return _resolved(case, event)
    if sending.kind is Kind.REPEATED:
        return f"Still open after {lasting(wall - case.opened_wall)}: {event}", _standing(about)
    if sending.kind is Kind.UPDATED:
        return _updated(sending, event, about)
    if about is not None and about.phase is Phase.SHADOW:
        return f"{event}; in mode shadow nothing was held", "The run goes on as if Stepguard were not there."
    if sending.level is Level.CALL:
        return f"{event}; the run is held until a person decides", _standing(about)
    return f"{event}; the run is held", _standing(about)


def _updated(sending: Sending, event: str, about: About | None) -> tuple[str, str]:
    kinds = [note.what for note in sending.new]
    if "locked_out" in kinds:
        return f"A person is needed: {event}, and no remedy is left", _standing(about)
    if "call" in kinds:
        return f"A person is needed: {event}", _last(sending.new, "call")
    if "acked" in kinds:
        return f"Known: {event}", f"This is {_last(sending.new, 'acked')}."
    if kinds and kinds[-1] == "relapse":
        return f"It happened again during probation: {event}; the run is held", _standing(about)
    if "resumed" in kinds:
        return f"The run goes on, on probation: {event}", _standing(about)
    if "person" in kinds:
        return f"A person stepped in: {event}", _last(sending.new, "person")
    return f"Still at it: {event}", _standing(about)


def _resolved(case: Case, event: str) -> tuple[str, str]:
    incident = None if case.about is None else case.about.incident
    if case.notes and "no more" in case.notes[-1].text:
        return f"Closed without a look at its end: {event}", case.notes[-1].text
    if incident is None or incident.resumed_at is None:
        return f"Over: {event}", "The run is well again."
    held = lasting(incident.resumed_at - incident.opened_at)
    return f"Resolved: {event}; the run was held for {held} and is well again", "Nothing is left to do."


def _standing(about: About | None) -> str:
    """How the run stands, in one sentence."""
    if about is None:
        return ""
    if about.phase is Phase.SHADOW:
        return "In mode shadow Stepguard only looks on."
    if about.order is GateOrder.GO:
        return "The trainer takes optimizer steps; every batch is looked at."
    after = "" if about.committed_step is None else f" after step {about.committed_step}"
    if about.garbage_steps:
        taken = counted(about.garbage_steps, "optimizer step")
        return f"The trainer waits{after}; {taken} had been taken since the onset."
    return f"The trainer waits{after}; no optimizer step was taken on a bad batch."


def _last(notes: tuple[Note, ...], kind: str) -> str:
    return next((note.text for note in reversed(notes) if note.what == kind), "")


# --- the sections


def _sections(sending: Sending, case: Case, wall: float) -> list[tuple[str, list[str]]]:
    about = case.about
    incident = None if about is None else about.incident
    why = [] if incident is None else list(incident.evidence)
    why += [f"explained by it: {text}" for text in case.symptoms[:3]]
    new = sending.new if sending.kind is Kind.UPDATED else case.notes
    done = _squeezed([note for note in new if note.what in {"action", "refused", "would", "call", "person"}])
    sections = [] if sending.kind is Kind.UPDATED else [("How sure, and why", why)]
    sections.append(("What was done", done or ["Nothing yet."]))
    sections.append(("What it cost", _cost(case, wall)))
    if sending.kind is not Kind.RESOLVED:
        sections.append(("What happens next", _next(sending, case)))
    return sections


def _squeezed(notes: list[Note]) -> list[str]:
    """The notes' own words; refusals of many batches are one line."""
    refused = [note for note in notes if note.what == "refused"]
    texts: list[str] = []
    for note in notes:
        if note.what == "refused" and len(refused) > 1:
            if note is refused[-1]:
                texts.append(f"{len(refused)} batches refused, the last: {note.text}")
            continue
        if note.text not in texts:
            texts.append(note.text)
    return [_sentence_of_note(text) for text in texts]


def _sentence_of_note(text: str) -> str:
    """Reason codes in a note's text are for the journal; people read words."""
    head, colon, code = text.rpartition(": ")
    return head if colon and code in set(Reason) else text


def _cost(case: Case, wall: float) -> list[str]:
    about = case.about
    incident = None if about is None else about.incident
    if about is None or incident is None:
        return []
    if about.phase is Phase.SHADOW:
        return ["nothing was held"]
    if incident.resumed_at is not None:
        lines = [f"the run stood for {lasting(incident.resumed_at - incident.opened_at)}"]
    else:
        end = case.closed_wall if case.closed_wall is not None else wall
        lines = [f"the run stands since {lasting(end - case.opened_wall)}"]
    parts = [counted(incident.refused_batches, "batch refused", "batches refused")]
    if about.garbage_steps is not None or incident.rollbacks == 0:
        parts.append(
            counted(about.garbage_steps or 0, "optimizer step on garbage", "optimizer steps on garbage")
        )
    if incident.restarts:
        parts.append(counted(incident.restarts, "restart"))
    if incident.resyncs:
        parts.append(counted(incident.resyncs, "re-sync of weights", "re-syncs of weights"))
    if incident.rollbacks:
        parts.append(counted(incident.rollbacks, "rollback"))
    return [*lines, ", ".join(parts)]


_STAGES = {
    "continue": "{server} is sent SIGCONT and must generate again.",
    "watch": "{server} is watched; if it comes back by itself it must generate before it counts.",
    "stop": "{server}'s processes are ended, then it is started again.",
    "backoff": "{server} is started again after a short wait.",
    "start": "{server} is starting.",
    "ready": "{server} is loading.",
    "canary": "{server} must now generate.",
    "weights": "{server} must now show that it has the current weights.",
}


def _next(sending: Sending, case: Case) -> list[str]:
    about = case.about
    if about is None or about.incident is None:
        return []
    server = about.incident.server or "the server"
    if about.phase is Phase.SHADOW:
        return ["Nothing: set run.mode to hold or act to have such a run held."]
    if about.phase is Phase.HALF_OPEN:
        steps = counted(about.probation_left, "more good step")
        return [f"After {steps} this is over. Nothing for you to do."]
    if about.stop_in_s is not None:
        return [
            f"The gate stays closed. If nobody comes within {lasting(about.stop_in_s)}, the trainer is told "
            "to save and to stop, so that no GPUs burn all night."
        ]
    if about.person:
        return [_for_the_person(about, server)]
    lines = []
    if about.stage is not None:
        lines.append(_STAGES[about.stage].replace("{server}", server))
    if about.mode is Mode.ACT and about.managed and about.server is not None:
        lines.append(
            "Then the current weights are proven and the run goes on by itself. Nothing for you to do."
        )
        if about.restarts_left is not None:
            lines.append(f"{counted(about.restarts_left, 'restart')} left before a person is called.")
    elif about.server in {None, ServerState.SERVING}:
        lines.append("Every server is looked at; if one is at fault it is repaired, else a person is called.")
    return lines


def _for_the_person(about: About, server: str) -> str:
    if about.phase is Phase.FORCED_OPEN:
        return "The gate stays closed until somebody resumes the run."
    if about.server is not None and about.mode is not Mode.ACT:
        return (
            f"Nothing by itself: mode {about.mode.value} restarts nothing. Restart {server} (the command "
            "below also renews its weights), or set run.mode to act to have it done."
        )
    if about.server is not None and not about.managed:
        return f"Nothing by itself: {server} is not Stepguard's to restart. The run goes on once it is back."
    return (
        "The gate stays closed. Every server is well, so look at the reward function and the policy; then "
        "resume, or roll back."
    )


# --- the command


def _command(sending: Sending, case: Case, place: Place) -> tuple[str, str] | None:
    about = case.about
    if about is None or about.incident is None:
        return None

    def command(verb: str, rest: str = "") -> str:
        return " ".join(word for word in ("stepguard", verb, rest, place.option) if word)

    incident = about.incident
    if sending.kind is Kind.RESOLVED:
        if incident.rollbacks:
            return (
                "stepguard rollback --yes --undo CHECKPOINTS",
                "takes the rollback back: newer checkpoints return",
            )
        return command("report", str(incident.number)), "the whole story, with the evidence"
    if about.phase is Phase.SHADOW:
        return None
    if about.person:
        down = about.server not in {None, ServerState.SERVING}
        if down and about.managed and about.stop_in_s is None and about.mode is not Mode.ACT:
            return command("restart-server", incident.server or ""), "restarts it, whatever the mode"
        return command("resume", "--why '…'"), "lets the run go on: you answer for what is held back"
    if about.order is GateOrder.GO:
        return command("pause", "--why '…'"), "holds the run again, before its next optimizer step"
    if about.mode is Mode.ACT and about.stage is not None:
        return command("pause", "--why '…'"), "keeps the run held also when the server is back"
    return command("resume", "--why '…'"), "lets the run go on at once"


# --- what is no incident


def _note(case: Case) -> tuple[str, str, list[tuple[str, list[str]]], tuple[str, str] | None]:
    note = case.notes[-1]
    if note.what == "warning":
        about = case.about
        figures = []
        if about is not None and about.reward_now is not None and about.reward_before is not None:
            figures.append(f"reward {about.reward_now:.3g}; mean of the last steps {about.reward_before:.3g}")
        where, _, _ = note.text.partition(":")
        headline = f"{_sentence(what(case))} ({where})"
        lead = "A warning: the run goes on, and nothing was held."
        return headline, lead, [("Why", figures)], None
    if note.what == "call":
        return f"A person is needed: {note.text}", "", [], None
    return _capital(_sentence_of_note(note.text)), "", [], None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _digest(sending: Sending, place: Place, wall: float) -> Message:
    cases = sending.cases
    lines = []
    for case in cases:
        number = "" if case.incident is None else f"#{case.incident} "
        event = cut(
            case.notes[-1].text if case.incident is None and case.notes else what(case) + _since(case), 120
        )
        end = (
            "open"
            if case.closed_wall is None
            else f"over after {lasting(case.closed_wall - case.opened_wall)}"
        )
        lines.append(f"{number}{event}" + ("" if case.incident is None else f": {end}"))
    still = sum(case.closed_wall is None for case in cases)
    return Message(
        number=sending.number,
        thread=0,
        first=True,
        kind=Kind.DIGEST,
        level=sending.level,
        run=place.run,
        headline=f"{counted(len(cases), 'message')} held back by the rate limit, in one; {still} still open",
        sections=(Section(title="What happened meanwhile", lines=_cut_all(lines)),),
        command=(f"stepguard status {place.option}".strip(), "how the run is now"),
        link=place.link,
        wall=wall,
        opened_wall=min(case.opened_wall for case in cases),
    )
