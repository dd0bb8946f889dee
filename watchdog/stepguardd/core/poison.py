"""
Which prompt kills the server, where the same ones are in flight each time that it dies.

One crash makes everyone in flight a suspect, a second one keeps who was there again. From then on the guard
sends suspects after all others and few at a time: a crash leaves the wave that it met, and an answer acquits.
Whom a third crash or a later one meets alone is quarantined.

A crash that memory explains accuses nobody: then fewer requests at a time help, and no prompt is to blame.
And a crash that suspects explain is not taken for a want of memory, nor its batch for a trouble of its own.
"""

from dataclasses import replace

from . import rungs
from .commands import MarkPrompts
from .events import RolloutsLost
from .reasons import Reason
from .state import APART_AFTER, Mode, State, Suspects
from .turn import Turn

SURE_AFTER = 3
KEPT = 1024
_NAMED = 5
_MEMORY_BEFORE_S = 5.0


def crashed(turn: Turn) -> None:
    """A server died by itself: whoever was in flight is still to be told."""
    known = turn.state.suspects
    fresh = Suspects(at=turn.now, earlier=known.prompts, earlier_crashes=known.crashes)
    turn.state = replace(turn.state, suspects=fresh)


def lost(turn: Turn, event: RolloutsLost) -> None:
    """The guard tells which rollouts failed, and which suspects were answered."""
    state = turn.state
    if event.attempt < state.trainer.attempt or state.mode is Mode.SHADOW:
        return
    before = state.suspects
    known = _acquitted(before, event.answered)
    met = known.at is not None and event.began <= known.at and not _short_of_memory(state, known.at)
    if met:
        known = replace(known, lost=tuple(dict.fromkeys((*known.lost, *event.lost)))[:KEPT])
    if known == before:
        return
    turn.state = replace(state, suspects=known)
    if met and known.shared and 2 * len(known.shared) <= len(known.earlier):
        _give_back(turn, known)
    if met and known.crashes >= SURE_AFTER and len(known.prompts) == 1:
        _quarantine(turn, known)
    elif known.apart != before.apart:
        _send_apart(turn, known, told=met)


def retell(turn: Turn) -> None:
    """A daemon that comes back marks again what it knows."""
    if turn.state.suspects.apart and turn.state.mode is Mode.ACT:
        turn.commands.append(MarkPrompts(suspects=turn.state.suspects.apart))


def _acquitted(known: Suspects, answered: tuple[str, ...]) -> Suspects:
    if not set(answered) & {*known.lost, *known.earlier}:
        return known
    lost = tuple(key for key in known.lost if key not in answered)
    earlier = tuple(key for key in known.earlier if key not in answered)
    return replace(known, lost=lost, earlier=earlier, earlier_crashes=known.earlier_crashes if earlier else 0)


def _short_of_memory(state: State, crashed_at: float) -> bool:
    return any(seen.crashed and at > crashed_at - _MEMORY_BEFORE_S for at, seen in state.surroundings.ooms)


def _send_apart(turn: Turn, known: Suspects, *, told: bool) -> None:
    suspects = known.apart
    if suspects and told:
        rest = len(suspects) - _NAMED
        named = ", ".join(suspects[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
        text = f"in flight at {known.crashes} crashes of the server: the prompts {named}"
        if turn.state.mode is not Mode.ACT:
            turn.note("would", Reason.PROMPT_SUSPECTED, f"{text}; would send them apart in mode act")
            return
        turn.note("action", Reason.PROMPT_SUSPECTED, f"{text}; from now on they are sent apart")
    if turn.state.mode is Mode.ACT:
        turn.commands.append(MarkPrompts(suspects=suspects))


def _quarantine(turn: Turn, known: Suspects) -> None:
    """Withhold it, and begin anew: the next crash has another cause."""
    prompt = known.prompts[0]
    text = f"the prompt {prompt} kills the server: alone in flight at its crash, the {known.crashes}. with it"
    if turn.state.mode is not Mode.ACT:
        turn.note("would", Reason.PROMPT_QUARANTINED, f"{text}; would quarantine it in mode act")
        return
    turn.state = replace(turn.state, suspects=Suspects())
    rungs.explained(turn)
    turn.note(
        "call",
        Reason.PROMPT_QUARANTINED,
        f"{text}; it is quarantined: take its line out of the file quarantine in run_dir to send it again",
    )
    turn.commands.append(MarkPrompts(quarantine=prompt))


def _give_back(turn: Turn, known: Suspects) -> None:
    """
    A crash that cleared half of the suspects or more brought the search further: its restart is given back.

    A server that dies whoever is in flight clears nobody, and its budget ends as ever.
    """
    if known.earlier_crashes < APART_AFTER:
        return
    for server in turn.state.servers:
        kept = tuple(at for at in server.budget.spent_at if known.at is None or at < known.at)
        turn.put(replace(server, budget=replace(server.budget, spent_at=kept)))
