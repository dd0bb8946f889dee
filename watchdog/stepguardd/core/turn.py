"""
One call of `decide` in the making: the state so far and the commands so far.

It lives for one call and is seen by nobody outside, so `decide` stays a function of its arguments.
"""

from collections import Counter
from dataclasses import replace

from .alerts.facts import about
from .commands import Command, Notify
from .events import Event
from .reasons import Reason
from .state import ACTIONS_KEPT, Incident, Mode, Server, State

_BY_A_PERSON = frozenset({Reason.OPERATOR_RESTART, Reason.OPERATOR_RELAUNCH, Reason.OPERATOR_ROLLBACK})


class Turn:
    """The next state and its commands, while they are being worked out."""

    __slots__ = ("_counts", "_notes", "closed", "commands", "event", "now", "state")

    def __init__(self, state: State, event: Event, now: float) -> None:
        self.state = state
        self.event = event
        self.now = now
        self.commands: list[Command] = []
        self.closed = False
        self._notes: list[tuple[str, Reason, str]] = []
        self._counts: Counter[str] = Counter()

    def server(self, name: str) -> Server | None:
        """The server of that name; None for one that the config no longer has."""
        return next((server for server in self.state.servers if server.name == name), None)

    def put(self, server: Server) -> None:
        """Keep a server's next value."""
        if server is self.server(server.name):
            return
        servers = tuple(server if old.name == server.name else old for old in self.state.servers)
        self.state = replace(self.state, servers=servers)

    def intent(self, what: str) -> str:
        """A name for one effect, unique over the life of the run."""
        number = self.state.intents + 1
        self.state = replace(self.state, intents=number)
        return f"{number}-{what}"

    def may_act(self, reason: Reason) -> bool:
        """Whether repairs are allowed: in mode `act`, or when a person asked for this one."""
        return self.state.mode is Mode.ACT or reason in _BY_A_PERSON

    def note(self, what: str, reason: Reason, text: str) -> None:
        """Tell people, and keep it in the incident that is open at the end of this call."""
        self._notes.append((what, reason, text))

    def count(self, figure: str) -> None:
        """Add one to a figure of that incident, as `restarts` or `refused_batches`."""
        self._counts[figure] += 1

    def finish(self) -> tuple[State, tuple[Command, ...]]:
        """
        The outcome: notes and figures laid at the incident's door.

        Only now is it known whether this call opened one, or closed the one that was open.
        """
        if self._notes or self._counts:
            incident = self.state.last_incident if self.closed else self.state.incident
            number = None if incident is None else incident.number
            # Told from its beginning, though its first remedy was decided before it had a name.
            notes = sorted(self._notes, key=lambda note: note[0] != "opened")
            if incident is not None:
                incident = self._told(incident, tuple(text for _, _, text in notes))
                self._keep(incident)
            facts = about(self.state, incident, self.now) if notes else None
            for what, reason, text in notes:
                self.commands.append(
                    Notify(incident=number, what=what, reason=reason.value, text=text, about=facts)
                )
        return self.state, tuple(self.commands)

    def _told(self, incident: Incident, texts: tuple[str, ...]) -> Incident:
        counts = self._counts
        return replace(
            incident,
            restarts=incident.restarts + counts["restarts"],
            resyncs=incident.resyncs + counts["resyncs"],
            rollbacks=incident.rollbacks + counts["rollbacks"],
            relaunches=incident.relaunches + counts["relaunches"],
            refused_batches=incident.refused_batches + counts["refused_batches"],
            actions=(*incident.actions, *texts)[-ACTIONS_KEPT:],
        )

    def _keep(self, incident: Incident) -> None:
        if self.closed:
            self.state = replace(self.state, last_incident=incident)
        else:
            self.state = replace(self.state, incident=incident)
