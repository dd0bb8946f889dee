"""
The other machines of a run, and how one order reaches all of them before any rank goes on.

A stricter order is published at once, everywhere. GO is not: first a hold of a new generation goes out, which
says that nothing holds the run any more, and only when the page of every machine shows it does GO follow,
under the next generation. So the page of a machine says GO under a generation only after every other machine
has shown the one before it. A machine that is lost meanwhile holds the others until it is back.
"""

from dataclasses import replace

from .commands import PublishGate
from .events import BatchReported, NodeAcknowledged, NodeJoined, NodeLost
from .reasons import Reason
from .state import Gate, GateOrder, Mode, Node, NodeState, Server, State
from .turn import Turn

_FOR_THE_TRAINER = frozenset({GateOrder.RESYNC, GateOrder.ROLLBACK, GateOrder.SAVE})


def joined(turn: Turn, event: NodeJoined) -> None:
    """A machine's agent is there: for the first time, again, or under a new daemon."""
    node = _node(turn, event.node)
    if node is None:
        return
    gate = turn.state.gate
    if node.state is NodeState.LOST:
        turn.note("action", Reason.NODE_LOST, f"node {node.name} is back")
    acked = min(event.gate_generation, gate.generation)
    _put(turn, replace(node, state=NodeState.PRESENT, since=turn.now, acked_generation=acked, why=""))
    if event.gate_generation > gate.generation:
        # Our last rows were lost. A generation never goes back, and this one was agreed on by nobody.
        overtake(turn, event.gate_generation)


def overtake(turn: Turn, generation: int) -> None:
    """A page shows a generation that we know nothing of: agree anew, under one beyond it."""
    state = turn.state
    order = state.gate.order
    if state.nodes and state.mode is not Mode.SHADOW and order is GateOrder.GO:
        order = GateOrder.HOLD
    gate = replace(state.gate, order=order, generation=generation + 1)
    turn.state = replace(state, gate=gate, clearing=None)
    turn.commands.append(PublishGate(gate=gate))


def acknowledged(turn: Turn, event: NodeAcknowledged) -> None:
    """A machine's page shows this generation; one that we never published counts for nothing."""
    node = _node(turn, event.node)
    if node is None or node.state is not NodeState.PRESENT:
        return
    if node.acked_generation < event.generation <= turn.state.gate.generation:
        _put(turn, replace(node, acked_generation=event.generation))


def lost(turn: Turn, event: NodeLost) -> None:
    """A machine is silent."""
    node = _node(turn, event.node)
    if node is None or node.state is NodeState.LOST:
        return
    _put(
        turn,
        replace(node, state=NodeState.LOST, since=turn.now, acked_generation=-1, why=event.why),
    )
    turn.note("action", Reason.NODE_LOST, f"node {node.name} is lost: {event.why}")


def why_lost(state: State) -> Reason | None:
    """Whether the run is short of a machine that it had."""
    return Reason.NODE_LOST if any(node.state is NodeState.LOST for node in state.nodes) else None


def why_joining(state: State) -> Reason | None:
    """Whether the run still waits for a machine to come."""
    joining = any(node.state is NodeState.JOINING for node in state.nodes)
    return Reason.NODES_JOINING if joining else None


def away(state: State, server: Server) -> bool:
    """Whether nobody can lay hands on this server now: its machine is lost, or has not come yet."""
    return server.node is not None and any(
        node.name == server.node and node.state is not NodeState.PRESENT for node in state.nodes
    )


def in_reach_since(state: State, server: Server) -> float:
    """Since when its machine's agent is there; long ago for a server that needs none."""
    return max((node.since for node in state.nodes if node.name == server.node), default=float("-inf"))


def agreed(state: State) -> bool:
    """Whether every machine shows the hold after which GO may follow."""
    return state.clearing is not None and all(
        node.state is NodeState.PRESENT and node.acked_generation >= state.clearing for node in state.nodes
    )


def shown(gate: Gate, *, to_trainer: bool) -> Gate:
    """
    What the page of one machine says.

    There is one trainer, whose guard carries out orders and hears the verdicts on its batches. A guard on
    another machine goes on, waits or stops with it.
    """
    if to_trainer:
        return gate
    order = GateOrder.HOLD if gate.order in _FOR_THE_TRAINER else gate.order
    return Gate(order=order, generation=gate.generation, reason=gate.reason)


def peer_refusal(state: State, event: BatchReported) -> str | None:
    """
    Why a batch of another guard than the trainer's is refused: by that guard itself, or for an outage.

    Its reward is not judged: the baseline is the trainer's.
    """
    if state.mode is Mode.SHADOW:
        return None
    if event.refused is not None:
        return event.refused
    began, ended = event.began, state.outage_ended
    overlapped = ended is not None and began is not None and began < ended
    return Reason.OUTAGE.value if state.outage_began is not None or overlapped else None


def _node(turn: Turn, name: str) -> Node | None:
    return next((node for node in turn.state.nodes if node.name == name), None)


def _put(turn: Turn, node: Node) -> None:
    nodes = tuple(node if old.name == node.name else old for old in turn.state.nodes)
    turn.state = replace(turn.state, nodes=nodes)
