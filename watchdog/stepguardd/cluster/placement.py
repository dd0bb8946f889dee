"""
`stepguard cluster`: one agent on every machine that the config names, placed by Ray.

Each machine has one detached actor, the keeper of its agent, bound to that machine and to no other. What is
there already stays as it is, so placing again does what is missing and nothing else.
"""

import importlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .. import clock
from ..oneline import one_line
from .keeper import AgentKeeper

NAMESPACE: Final = "stepguard"
ANSWER_S: Final = 15.0
LOOK_S: Final = 0.2
FREED_S: Final = 10.0
"""How long a killed keeper's name may stay taken."""


class PlacementError(Exception):
    """Ray cannot be used; the message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as Ray knows it."""

    ray_id: str
    name: str
    hostname: str
    address: str

    def is_called(self, name: str) -> bool:
        """Whether `cluster.nodes` may mean this machine by that name."""
        return name in {self.name, self.hostname, self.hostname.partition(".")[0], self.address}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be kept on a machine."""

    node: str
    head: str
    run_dir: str
    python: str | None
    config: str

    def is_kept(self, told: Mapping[str, Any], machine: Machine) -> bool:
        """Whether a keeper that tells this is already as wanted."""
        return all(
            told.get(key) == value
            for key, value in {
                "head": self.head,
                "run_dir": self.run_dir,
                "python": self.python,
                "config": self.config,
                "machine": machine.ray_id,
            }.items()
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """One machine's agent, as its keeper tells of it. `why` is what is wrong, or ""."""

    node: str
    address: str | None
    run_dir: str | None = None
    pid: int | None = None
    joined: bool = False
    starts: int = 0
    why: str = ""

    @property
    def well(self) -> bool:
        """Whether the agent lives, and the head has taken its machine in."""
        return self.pid is not None and self.joined


def meant(nodes: Iterable[str], machines: Sequence[Machine]) -> dict[str, Machine | str]:
    """For each name of `cluster.nodes` the machine that it means, or why none is."""
    found: dict[str, Machine | str] = {}
    for node in nodes:
        # Ray's own name for a machine goes first: hostnames may be alike, in containers above all.
        ours = [machine for machine in machines if machine.name == node]
        ours = ours or [machine for machine in machines if machine.is_called(node)]
        if len(ours) == 1:
            found[node] = ours[0]
        elif ours:
            found[node] = f"Ray has {len(ours)} machines of that name; start each with ray start --node-name"
        else:
            known = ", ".join(sorted({machine.name for machine in machines})) or "none"
            found[node] = f"Ray has no such machine alive; it has {known}"
    return found


class Placement:
    """
    The keepers of one run on a Ray cluster. Close it after use.

    Args:
        run: the run's name; keepers of other runs are left alone.
        address: Ray's; "auto" for the cluster that this machine belongs to.

    Raises:
        PlacementError: no Ray here, or no cluster there.

    """

    def __init__(self, run: str, address: str) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")  # an extra, and slow to import
        except ImportError:
            raise PlacementError("ray is not installed here; pip install 'stepguard[daemon,ray]'") from None
        self._prefix = f"agent:{run}:"
        try:
            self._ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise PlacementError(f"no Ray cluster at {address}: {one_line(str(error), 300)}") from error

    def close(self) -> None:
        """Leave the cluster; the keepers stay."""
        self._ray.shutdown()

    @property
    def here(self) -> str:
        """The address at which the others of the cluster reach this machine."""
        return str(self._ray.util.get_node_ip_address())

    def machines(self) -> list[Machine]:
        """The machines that are alive."""
        return [
            Machine(
                ray_id=node["NodeID"],
                name=node.get("NodeName") or node["NodeManagerAddress"],
                hostname=node["NodeManagerHostname"],
                address=node["NodeManagerAddress"],
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]

    def place(
        self, wanted: Sequence[Wanted], token: str, *, timeout_s: float, tell: Callable[[Kept], None]
    ) -> list[Kept]:
        """
        Have an agent on each machine, and wait until the head has taken it in.

        Keepers of machines that are not wanted any more are ended.

        Args:
            wanted: what is to be kept, by node.
            token: what the head and all agents hold. It travels as the argument of a call, which Ray keeps
                neither in its tables nor in its logs, and lies on the machine with mode 600.
            timeout_s: for an agent that does not come.
            tell: hears of each one that is well, or cannot be.

        Returns:
            One for each node, in their order.

        """
        for node in self._placed() - {one.node for one in wanted}:
            self.end(node)
        found = meant([one.node for one in wanted], self.machines())
        outcomes: dict[str, Kept] = {}
        waiting: dict[str, tuple[Machine, Any]] = {}

        def over(kept: Kept) -> None:
            outcomes[kept.node] = kept
            waiting.pop(kept.node, None)
            tell(kept)

        begun: list[tuple[str, Machine, Any, Any]] = []
        for one in wanted:
            machine = found[one.node]
            if isinstance(machine, str):
                over(Kept(node=one.node, address=None, why=machine))
                continue
            keeper = self._keeper(one, machine)
            begun.append((one.node, machine, keeper, keeper.begin.remote(token)))
        deadline = clock.monotonic() + timeout_s
        for node, machine, keeper, begins in begun:
            refusal, unheard = self._answer(begins, max(1.0, deadline - clock.monotonic()))
            if refusal or unheard:
                over(Kept(node=node, address=machine.address, why=refusal or unheard))
            else:
                waiting[node] = (machine, keeper)
        while waiting:
            for node, (machine, keeper) in list(waiting.items()):
                kept = self._told(node, machine.address, keeper)
                if kept.well or clock.monotonic() > deadline:
                    over(kept)
            time.sleep(LOOK_S)
        return [outcomes[one.node] for one in wanted]

    def look(self, nodes: Iterable[str]) -> list[Kept]:
        """What is kept for these nodes."""
        found = meant(nodes, self.machines())
        kept = []
        for node, machine in found.items():
            address = None if isinstance(machine, str) else machine.address
            keeper = self._found(node)
            if keeper is None:
                why = machine if isinstance(machine, str) else "no agent was placed: stepguard cluster up"
                kept.append(Kept(node=node, address=address, why=why))
            elif isinstance(machine, str):
                kept.append(Kept(node=node, address=None, why=machine))
            else:
                kept.append(self._told(node, address, keeper))
        return kept

    def end_all(self) -> dict[str, str]:
        """End every agent of the run; for each node, what went wrong, or ""."""
        return {node: self.end(node) for node in sorted(self._placed())}

    def end(self, node: str) -> str:
        """End a node's agent and its keeper; what went wrong, or ""."""
        keeper = self._found(node)
        if keeper is None:
            return ""
        _, unheard = self._answer(keeper.end.remote(), ANSWER_S)
        self._ray.kill(keeper, no_restart=True)
        return unheard

    def _placed(self) -> set[str]:
        """The nodes with a keeper."""
        named = self._ray.util.list_named_actors(all_namespaces=True)
        return {
            one["name"].removeprefix(self._prefix)
            for one in named
            if one["namespace"] == NAMESPACE and one["name"].startswith(self._prefix)
        }

    def _found(self, node: str) -> Any | None:
        try:
            return self._ray.get_actor(self._prefix + node, namespace=NAMESPACE)
        except ValueError:
            return None

    def _keeper(self, one: Wanted, machine: Machine) -> Any:
        """The keeper of a node: the one that is there, or a new one in its place."""
        keeper = self._found(one.node)
        if keeper is not None:
            told, unheard = self._answer(keeper.told.remote(), ANSWER_S)
            if not unheard and one.is_kept(told, machine):
                return keeper
            if not unheard:
                self._answer(keeper.end.remote(), ANSWER_S)
            self._ray.kill(keeper, no_restart=True)
        scheduling = importlib.import_module("ray.util.scheduling_strategies")
        options = {
            "name": self._prefix + one.node,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "num_cpus": 0,
            "max_restarts": -1,
            "scheduling_strategy": scheduling.NodeAffinitySchedulingStrategy(machine.ray_id, soft=False),
        }
        made = self._ray.remote(AgentKeeper).options(**options)
        deadline = clock.monotonic() + FREED_S
        while True:
            try:
                return made.remote(one.python, one.head, one.node, one.run_dir, machine.ray_id, one.config)
            except ValueError:  # the name of the one before is not free yet
                if clock.monotonic() > deadline:
                    raise PlacementError(
                        f"{one.node}: the agent's keeper of before does not go; try again"
                    ) from None
                time.sleep(LOOK_S)

    def _told(self, node: str, address: str | None, keeper: Any) -> Kept:
        told, unheard = self._answer(keeper.told.remote(), ANSWER_S)
        if unheard:
            return Kept(node=node, address=address, why=unheard)
        why = told["why"]
        if told["pid"] is not None and not told["joined"]:
            why = f"no head answers it at {told['head']}: is the daemon running there (stepguard run)?"
        return Kept(
            node=node,
            address=address,
            run_dir=told["run_dir"],
            pid=told["pid"],
            joined=told["joined"],
            starts=told["starts"],
            why=why,
        )

    def _answer(self, asked: Any, timeout_s: float) -> tuple[Any, str]:
        """A keeper's answer, or why there is none."""
        try:
            return self._ray.get(asked, timeout=timeout_s), ""
        except TimeoutError:
            return None, f"its machine does not answer Ray within {timeout_s:.0f} s"
        except self._ray.exceptions.RayError as error:
            return None, f"Ray: {one_line(str(error).strip().splitlines()[-1], 300)}"
