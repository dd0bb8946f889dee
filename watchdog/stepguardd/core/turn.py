"""
One call of `decide` in the making: the state so far and the commands so far.

It lives for one call and is seen by nobody outside, so `decide` stays a function of its arguments.
"""

from dataclasses import replace

from .commands import Command, Notify
from .reasons import Reason
from .state import ACTIONS_KEPT, Incident, Mode, Server, State


class Turn:
    """The next state and its commands, while they are being worked out."""

    __slots__ = ("commands", "now", "state")

    def __init__(self, state: State, now: float) -> None:
        self.state = state
        self.now = now
        self.commands: list[Command] = []

    def server(self, name: str) -> Server | None:
        """The server of that name; None for one that the config no longer has."""
        return next((server for server in self.state.servers if server.name == name), None)

    def put(self, server: Server) -> None:
        """Keep a server's next value."""
        servers = tuple(server if old.name == server.name else old for old in self.state.servers)
        self.state = replace(self.state, servers=servers)

    def intent(self, what: str) -> str:
        """A name for one effect, unique over the life of the run."""
        number = self.state.intents + 1
        self.state = replace(self.state, intents=number)
        return f"{number}-{what}"

    def may_act(self, reason: Reason) -> bool:
        """Whether repairs are allowed: in mode `act`, or when a person asked for this one."""
        return self.state.mode is Mode.ACT or reason is Reason.OPERATOR_RESTART

    def note(self, what: str, reason: Reason, text: str) -> None:
        """Tell people, and keep it in the open incident."""
        incident = self.state.incident
        if incident is not None:
            actions = (*incident.actions, text)[-ACTIONS_KEPT:]
            self.state = replace(self.state, incident=replace(incident, actions=actions))
        number = None if incident is None else incident.number
        self.commands.append(Notify(incident=number, what=what, reason=reason.value, text=text))

    def count(self, *, restarts: int = 0, resyncs: int = 0, rollbacks: int = 0, refused: int = 0) -> None:
        """Add to the open incident's figures."""
        incident: Incident | None = self.state.incident
        if incident is None:
            return
        self.state = replace(
            self.state,
            incident=replace(
                incident,
                restarts=incident.restarts + restarts,
                resyncs=incident.resyncs + resyncs,
                rollbacks=incident.rollbacks + rollbacks,
                refused_batches=incident.refused_batches + refused,
            ),
        )
