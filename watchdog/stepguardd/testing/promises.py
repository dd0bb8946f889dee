"""What must hold after every decision, whatever happened; looked at by other means than the core's own."""

from ..core.breaker import Phase
from ..core.commands import (
    Command,
    ContinueServer,
    MarkPrompts,
    Notify,
    PauseGeneration,
    PrepareRollback,
    PublishGate,
    PushWeights,
    RunCanary,
    StartServer,
    StopServer,
)
from ..core.events import Event, OperatorAsked, RolloutsLost
from ..core.state import (
    ACTIONS_KEPT,
    CHECKPOINTS_KEPT,
    REWARDS_KEPT,
    SEEN_KEPT,
    GateOrder,
    Halted,
    Mode,
    NodeState,
    Server,
    ServerState,
    Stage,
    State,
)

_UNUSABLE = frozenset({ServerState.SUSPECT, ServerState.DEAD, ServerState.RESTARTING, ServerState.STALE})
_NO_INCIDENT = frozenset({"reconciling", "server_starting", "nodes_joining", "nodes_agree"})
_REPAIRS = StopServer | ContinueServer | PrepareRollback


class BrokenPromise(AssertionError):  # noqa: N818 - named after what happened
    """A decision that must never be made was made."""


class Promises:
    """
    Looks at decisions in their order, and remembers what it needs to.

    One of these belongs to one run: the restarts in a window, the names of intents and the generations are
    counted over its life.
    """

    def __init__(self) -> None:
        self._intents: set[str] = set()
        self._stops: dict[str, list[float]] = {}
        self._asked_by_person = False

    def after(
        self, before: State, event: Event, state: State, commands: tuple[Command, ...], now: float
    ) -> None:
        """
        Look at one decision.

        Args:
            before: the state that was decided on.
            event: what happened.
            state: the state that came out.
            commands: what is to be done.
            now: when, on the monotonic clock.

        Raises:
            BrokenPromise: naming the promise, the event and the figures.

        """
        try:
            if isinstance(event, OperatorAsked):
                self._person(event)
            if isinstance(event, RolloutsLost):
                self._search(before, state)
            _gate(before, state, commands)
            _breaker(state)
            _held(state)
            _servers(state)
            _bounded(state)
            _asked(state, commands)
            _halted(state, commands)
            self._acts(state, event, commands, now)
        except BrokenPromise as broken:
            raise BrokenPromise(f"{broken}; at {now:g} after {event}") from None

    def _person(self, event: OperatorAsked) -> None:
        """A person may ask for what the mode forbids, and refills the budget by it."""
        self._asked_by_person = self._asked_by_person or event.verb in {"restart-server", "rollback"}
        if event.verb in {"restart-server", "resume"}:
            self._stops.clear()

    def _search(self, before: State, state: State) -> None:
        """A crash that cleared half of the suspected prompts gives its restart back."""
        old, new = before.suspects, state.suspects
        crashed_at = old.at
        for was, now in zip(before.servers, state.servers, strict=True):
            if now.budget.spent_at == was.budget.spent_at or crashed_at is None:
                continue
            cleared = len(old.prompts) - len(new.prompts)
            _require(2 * cleared >= len(old.prompts) > 1, f"{cleared} cleared of {len(old.prompts)} suspects")
            stops = self._stops.get(was.name, [])
            self._stops[was.name] = [at for at in stops if at < crashed_at]

    def _acts(self, state: State, event: Event, commands: tuple[Command, ...], now: float) -> None:
        for command in commands:
            if isinstance(command, PublishGate | MarkPrompts | Notify):
                continue
            _require(command.intent not in self._intents, f"intent {command.intent} was given out twice")
            self._intents.add(command.intent)
            if state.mode is not Mode.ACT and not self._asked_by_person:
                repairs = _REPAIRS | PushWeights if state.mode is Mode.SHADOW else _REPAIRS
                _require(
                    not isinstance(command, repairs), f"{type(command).__name__} in mode {state.mode.value}"
                )
            if isinstance(command, StopServer | StartServer):
                waiting = [server.repair.intent for server in state.servers if server.repair is not None]
                _require(command.intent in waiting, f"nobody waits for {command.intent}")
            if isinstance(command, StopServer) and not isinstance(event, OperatorAsked):
                self._restarts(state, command.server, now)

    def _restarts(self, state: State, name: str, now: float) -> None:
        settings = state.settings
        stops = [at for at in self._stops.get(name, []) if now - at < settings.restart_window_s]
        stops.append(now)
        self._stops[name] = stops
        _require(
            len(stops) <= settings.restart_budget,
            f"{len(stops)} restarts of {name} within {settings.restart_window_s:g} s",
        )


def _require(claim: bool, message: str) -> None:
    if not claim:
        raise BrokenPromise(message)


def _gate(before: State, state: State, commands: tuple[Command, ...]) -> None:
    old, new = before.gate, state.gate
    published = [command for command in commands if isinstance(command, PublishGate)]
    _require(len(published) <= 1, f"the gate is written {len(published)} times")
    _require(not published or commands[0] is published[0], "something comes before the gate")
    _require(not published or published[0].gate == new, "another gate is written than is meant")
    _require(bool(published) or new == old, "the gate changed and is not written")
    _require(new.generation >= old.generation, "a generation went back")
    _require(new.judged_batch >= old.judged_batch, "a judged batch went back")
    _require(
        new.order is old.order or new.generation > old.generation,
        f"{new.order.value} without a new generation",
    )


def _breaker(state: State) -> None:
    phase, order = state.phase, state.gate.order
    if state.mode is Mode.SHADOW:
        _require(
            phase in {Phase.SHADOW, Phase.FORCED_OPEN, Phase.LOCKED_OUT}, f"{phase.value} in mode shadow"
        )
    else:
        _require(phase is not Phase.SHADOW, f"phase shadow in mode {state.mode.value}")
    if phase is Phase.SHADOW:
        _require(order is GateOrder.GO, f"{order.value} in shadow")
    elif state.lockout is not None:
        _require(phase is Phase.LOCKED_OUT, f"a lockout in phase {phase.value}")
    elif state.pause is not None:
        _require(phase is Phase.FORCED_OPEN, f"a pause in phase {phase.value}")
    if phase in {Phase.OPEN, Phase.FORCED_OPEN, Phase.LOCKED_OUT}:
        _require(order is not GateOrder.GO, f"GO in phase {phase.value}")
    if phase is Phase.HALF_OPEN:
        # No relapse: one server of several is re-synced, a first start, a first look after the daemon's own.
        no_relapse = order in {GateOrder.GO, GateOrder.RESYNC} or state.gate.reason in _NO_INCIDENT
        _require(no_relapse, f"{order.value} on probation")


def _held(state: State) -> None:
    """GO is given only where nothing is left that asks for a hold."""
    if state.gate.order is not GateOrder.GO or state.phase is Phase.SHADOW:
        return
    held = (state.trip, state.pause, state.lockout, state.rollback)
    _require(not any(held), f"GO with {[type(one).__name__ for one in held if one is not None]}")
    _require(not state.reconciling, "GO before every server was looked at")
    apart = [node.name for node in state.nodes if node.state is not NodeState.PRESENT]
    _require(not apart, f"GO without {apart}")
    if state.servers:
        down = sum(1 for server in state.servers if not _usable(server))
        share = 1.0 - down / len(state.servers)
        _require(share >= state.settings.quorum, f"GO with {down} of {len(state.servers)} servers unproven")


def _usable(server: Server) -> bool:
    in_repair = server.repair is not None and server.state is not ServerState.PLANNED
    return server.state not in _UNUSABLE and not in_repair


def _servers(state: State) -> None:
    for server in state.servers:
        repair = server.repair
        name = f"server {server.name}"
        if repair is None:
            fits = server.state is not ServerState.RESTARTING
            _require(fits, f"{name} is restarting and nobody restarts it")
            continue
        _require(server.state is not ServerState.SERVING, f"{name} serves during its repair")
        stopping = repair.stage in {Stage.STOP, Stage.START}
        _require(not stopping or repair.intent is not None, f"{name} waits for an effect that has no intent")
        both = repair.intent is not None and repair.resync_generation is not None
        _require(not both, f"{name} waits for an effect and for the trainer at once")


def _asked(state: State, commands: tuple[Command, ...]) -> None:
    """Nothing that generates is sent to a server that is silent on purpose, or whose GPU is the trainer's."""
    trainer = state.trainer
    theirs = trainer.pid is not None and trainer.works_at != "ROLLOUT"
    for server in state.servers:
        if server.health_due:
            serves = server.state is ServerState.SERVING and server.repair is None
            _require(serves, f"server {server.name} is asked for a token and is {server.state.value}")
            _require(not theirs, f"server {server.name} is asked for a token in {trainer.works_at}")
    for command in commands:
        if isinstance(command, RunCanary) and state.settings.colocated and trainer.alive is not False:
            repair = next(one.repair for one in state.servers if one.name == command.server)
            anew = repair is not None and repair.restarts
            _require(anew or not theirs, f"a canary for {command.server} in {trainer.works_at}")


def _halted(state: State, commands: tuple[Command, ...]) -> None:
    """A server is paused for a trainer without the guard alone; neither asked nor loaded while it is."""
    ours = {halt.server for halt in state.halts if halt.stage is not Halted.LIFTED}
    for command in commands:
        if isinstance(command, PauseGeneration):
            free = state.trainer.pid is None and state.gate.order is not GateOrder.GO
            _require(free, f"{command.server} is paused and the trainer has a guard, or nothing holds it")
        if isinstance(command, PushWeights):
            _require(command.server not in ours, f"weights for {command.server}, which is paused")


def _bounded(state: State) -> None:
    _require(len(state.rewards) <= REWARDS_KEPT, "rewards pile up")
    _require(len(state.checkpoints) <= CHECKPOINTS_KEPT, "checkpoints pile up")
    around = state.surroundings
    for kept in (around.ooms, around.gpus, around.logs):
        _require(len(kept) <= SEEN_KEPT, "what was seen around the run piles up")
    for incident in (state.incident, state.last_incident):
        _require(incident is None or len(incident.actions) <= ACTIONS_KEPT, "actions pile up")
    for server in state.servers:
        spent = len(server.budget.spent_at)
        _require(spent <= max(1, state.settings.restart_budget), f"{spent} restarts remembered")
