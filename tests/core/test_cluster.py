"""One order reaches every machine before any rank goes on, whatever the network does."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from hypothesis import event, given, settings
from hypothesis import strategies as st
from strange_events import events, gaps

from stepguardd.core import cluster
from stepguardd.core.commands import Command, Notify, PublishGate, StartServer, StopServer
from stepguardd.core.decide import decide
from stepguardd.core.events import (
    Answer,
    BatchReported,
    DaemonStarted,
    EffectEnded,
    Event,
    NodeAcknowledged,
    NodeJoined,
    NodeLost,
    OperatorAsked,
    Proc,
    ProcessExited,
    ServerProbed,
    Tick,
    TreeSeen,
)
from stepguardd.core.state import (
    Gate,
    GateOrder,
    Mode,
    Node,
    NodeState,
    Server,
    ServerState,
    Settings,
    State,
    initial,
)
from stepguardd.testing import Promises

NAMES = ("n1", "n2", "n3")


class Cluster:
    """The core and the pages of three machines, with a network between them that the test drives."""

    def __init__(self, mode: Mode = Mode.HOLD, names: tuple[str, ...] = NAMES) -> None:
        self.now = 100.0
        nodes = tuple(Node(name=name) for name in names)
        self.state = replace(initial(Settings(), mode, ()), nodes=nodes)
        self.promises = Promises()
        self.told: list[Command] = []
        self.pages = {name: Gate(order=GateOrder.HOLD) for name in names}
        self.connected: set[str] = set()
        self.down: dict[str, deque[Gate]] = {name: deque() for name in names}
        self.up: dict[str, deque[int]] = {name: deque() for name in names}
        self.shown = dict.fromkeys(names, 0)
        self.went = 0
        self.feed(DaemonStarted(gate_order="GO", gate_generation=0))

    def feed(self, told: Event) -> None:
        self.now += 0.1
        before = self.state
        self.state, commands = decide(before, told, self.now)
        self.promises.after(before, told, self.state, commands, self.now)
        self.told += commands
        for command in commands:
            if isinstance(command, PublishGate):
                for name in self.connected:
                    self.down[name].append(command.gate)

    def connect(self, name: str) -> None:
        """A new connection: what was under way on the old one is gone, and the page's word comes first."""
        self.cut(name)
        page = self.pages[name]
        self.feed(NodeJoined(node=name, gate_order=page.order.value, gate_generation=page.generation))
        self.connected.add(name)
        self.down[name].append(self.state.gate)

    def cut(self, name: str) -> None:
        self.connected.discard(name)
        self.down[name].clear()
        self.up[name].clear()

    def deliver(self, name: str) -> None:
        """One order arrives at one machine, whose page shows it and whose agent says so."""
        if self.down[name]:
            gate = self.down[name].popleft()
            if gate.generation >= self.pages[name].generation:
                self.pages[name] = gate
                self.shown[name] = gate.generation
                self.up[name].append(gate.generation)
        self.look()

    def acknowledge(self, name: str) -> None:
        if self.up[name]:
            self.feed(NodeAcknowledged(node=name, generation=self.up[name].popleft()))

    def settle(self) -> None:
        """Everything under way arrives."""
        while any(self.down.values()) or any(self.up.values()):
            for name in self.pages:
                self.deliver(name)
                self.acknowledge(name)

    def lose(self, name: str) -> None:
        self.cut(name)
        self.feed(NodeLost(node=name, why="silent for 4 s"))

    def look(self) -> None:
        """The promise: no page says GO of a generation unless every other machine showed the one before."""
        for name, page in self.pages.items():
            if page.order is GateOrder.GO:
                self.went += 1
                behind = {other: seen for other, seen in self.shown.items() if seen < page.generation - 1}
                assert not behind, f"{name} goes on under {page.generation}, and {behind} never heard of it"

    def all_joined(self) -> Cluster:
        for name in self.pages:
            self.connect(name)
        self.settle()
        return self


def orders(cluster: Cluster) -> set[str]:
    return {page.order.value for page in cluster.pages.values()}


def test_nobody_goes_on_before_every_machine_has_come() -> None:
    run = Cluster()
    run.connect("n1")
    run.connect("n2")
    run.settle()
    assert run.state.gate.order is GateOrder.HOLD
    assert run.state.gate.reason == "nodes_joining"
    assert run.state.incident is None, "a first start is no incident"
    run.connect("n3")
    run.settle()
    assert run.state.gate.order is GateOrder.GO
    assert orders(run) == {"GO"}


def test_a_hold_goes_out_at_once_and_a_go_when_the_last_machine_has_shown_the_hold_before_it() -> None:
    run = Cluster().all_joined()
    run.feed(OperatorAsked(verb="pause", who="ada", why="a look"))
    assert run.state.gate.order is GateOrder.HOLD
    run.settle()
    run.feed(OperatorAsked(verb="resume", who="ada", why=""))
    assert run.state.gate.reason == "nodes_agree"
    clearing = run.state.gate.generation
    for name in ("n1", "n2"):
        run.deliver(name)
        run.acknowledge(name)
    assert run.state.gate.order is GateOrder.HOLD, "the third machine has not said so"
    run.deliver("n3")
    run.acknowledge("n3")
    assert run.state.gate.order is GateOrder.GO
    assert run.state.gate.generation == clearing + 1


def test_a_lost_machine_holds_the_others_as_an_incident_until_it_is_back() -> None:
    run = Cluster().all_joined()
    run.lose("n2")
    run.settle()
    assert run.state.gate.order is GateOrder.HOLD
    assert run.state.gate.reason == "node_lost"
    assert run.state.incident is not None
    assert run.state.incident.reason == "node_lost"
    notes = [command.text for command in run.told if isinstance(command, Notify)]
    assert "node n2 is lost: silent for 4 s" in notes
    run.connect("n2")
    run.settle()
    assert run.state.gate.order is GateOrder.GO
    assert orders(run) == {"GO"}


def test_an_agent_that_comes_again_before_it_is_lost_holds_nobody() -> None:
    run = Cluster().all_joined()
    generation = run.state.gate.generation
    run.connect("n2")
    run.settle()
    assert run.state.gate.order is GateOrder.GO
    assert run.state.gate.generation == generation


def test_a_daemon_that_lost_its_last_rows_agrees_anew_beyond_what_the_pages_show() -> None:
    run = Cluster().all_joined()
    for name in NAMES:
        run.pages[name] = replace(run.pages[name], generation=40)
        run.shown[name] = 40
    run.connect("n3")
    assert run.state.gate.order is GateOrder.HOLD
    run.settle()
    assert run.state.gate.order is GateOrder.GO
    assert run.state.gate.generation > 40
    assert orders(run) == {"GO"}


def test_an_acknowledgement_of_what_was_never_published_counts_for_nothing() -> None:
    run = Cluster()
    for name in NAMES:
        run.connect(name)
    run.feed(NodeAcknowledged(node="n1", generation=10_000))
    node = next(node for node in run.state.nodes if node.name == "n1")
    assert node.acked_generation < 10_000


def test_in_shadow_a_lost_machine_is_told_and_holds_nobody() -> None:
    run = Cluster(Mode.SHADOW).all_joined()
    run.lose("n1")
    run.settle()
    assert run.state.gate.order is GateOrder.GO
    assert run.state.incident is not None


def test_only_the_trainers_page_has_orders_and_verdicts() -> None:
    gate = Gate(
        order=GateOrder.ROLLBACK,
        generation=7,
        reason="poison",
        target_step=3,
        target_path="/c/3",
        judged_batch=9,
        judged_step=9,
        judged_ok=False,
    )
    assert cluster.shown(gate, to_trainer=True) == gate
    peer = cluster.shown(gate, to_trainer=False)
    assert peer == Gate(order=GateOrder.HOLD, generation=7, reason="poison")
    stop = cluster.shown(replace(gate, order=GateOrder.STOP), to_trainer=False)
    assert stop.order is GateOrder.STOP


def test_a_peers_batch_is_refused_for_an_outage_and_for_its_own_reason() -> None:
    state = Cluster().state
    batch = BatchReported(attempt=0, step=1, batch=1, ok=4, failed=0, reward=0.5, began=50.0)
    assert cluster.peer_refusal(state, batch) is None
    assert cluster.peer_refusal(replace(state, outage_began=90.0), batch) == "outage"
    assert cluster.peer_refusal(replace(state, outage_ended=60.0), batch) == "outage"
    assert cluster.peer_refusal(replace(state, outage_ended=40.0), batch) is None
    assert cluster.peer_refusal(state, replace(batch, refused="failed_fraction")) == "failed_fraction"


moves = st.sampled_from(
    ["deliver"] * 6 + ["acknowledge"] * 6 + ["connect"] * 2 + ["cut", "lose", "pause", "resume", "daemon"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(moves, st.sampled_from(NAMES)), max_size=80))
def test_no_page_says_go_unless_every_machine_has_shown_the_hold_before_it(
    story: list[tuple[str, str]],
) -> None:
    run = Cluster().all_joined()
    for move, name in story:
        match move:
            case "deliver":
                run.deliver(name)
            case "acknowledge":
                run.acknowledge(name)
            case "connect":
                run.connect(name)
            case "cut":
                run.cut(name)
            case "lose":
                run.lose(name)
            case "pause" | "resume":
                run.feed(OperatorAsked(verb=move, who="ada", why=""))
            case "daemon":
                for each in NAMES:
                    run.cut(each)
                gate = run.state.gate
                run.feed(DaemonStarted(gate_order=gate.order.value, gate_generation=gate.generation))
        run.look()
    event(f"pages seen on GO: {min(run.went // 50 * 50, 200)}")
    # And once the network is well and nobody holds it, the run goes on.
    run.feed(OperatorAsked(verb="resume", who="ada", why=""))
    run.all_joined()
    assert orders(run) == {"GO"}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(Mode)), st.lists(st.tuples(gaps, events), max_size=60))
def test_no_story_with_machines_breaks_a_promise(mode: Mode, story: list[tuple[float, Event]]) -> None:
    run = Cluster(mode, names=("a", "b"))
    for gap, told in story:
        run.now += gap
        run.feed(told)


def test_a_node_that_the_config_does_not_have_is_nobody() -> None:
    run = Cluster().all_joined()
    before: State = run.state
    run.feed(NodeLost(node="stranger", why="silent"))
    assert run.state.nodes == before.nodes
    assert all(node.state is NodeState.PRESENT for node in run.state.nodes)


def test_a_server_that_is_lost_with_its_machine_is_restarted_when_the_machine_is_back() -> None:
    run = Cluster(Mode.ACT)
    server = Server(name="s", managed=True, node="n2", state=ServerState.SERVING, seen=True)
    one = Proc(pid=7, start_ticks=1, role="server")
    run.state = replace(run.state, servers=(replace(server, procs=(one,)),))
    run.all_joined()
    run.lose("n2")
    run.feed(ProcessExited(server="s", proc=one))
    for _ in range(5000):
        run.feed(Tick())
    assert run.state.servers[0].state is ServerState.DEAD
    assert [command for command in run.told if isinstance(command, StopServer | StartServer)] == []
    run.connect("n2")
    (stop,) = (command for command in run.told if isinstance(command, StopServer))
    for _ in range(100):
        run.feed(Tick())
    run.lose("n2")
    for _ in range(5000):
        run.feed(Tick())
    run.connect("n2")
    run.feed(Tick())
    assert run.state.lockout is None, "a machine that is away is no stop that fails"
    run.feed(EffectEnded(intent=stop.intent, ok=True))
    for _ in range(500):
        run.feed(Tick())
    assert any(isinstance(command, StartServer) for command in run.told)


def test_a_server_elsewhere_is_first_started_when_its_agent_says_that_it_does_not_run() -> None:
    run = Cluster(Mode.ACT)
    run.state = replace(run.state, servers=(Server(name="s", managed=True, node="n2"),))
    for _ in range(50):
        run.feed(ServerProbed(server="s", ready=Answer.REFUSED, model_info=Answer.REFUSED))
    assert [command for command in run.told if isinstance(command, StartServer)] == []
    run.all_joined()
    run.feed(TreeSeen(server="s", procs=()))
    assert any(isinstance(command, StartServer) for command in run.told)
