"""Three machines of one Ray cluster, with agents that Ray placed: frozen, killed, replaced; each for real."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.machines import NODES, Machines
from stepguard.gate import Order
from stepguardd import proc
from stepguardd.cli import main

pytest.importorskip("ray")

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("ray")]

# Ray notices a killed machine in some seconds and a frozen one in a minute: what is seen sooner, we saw.
RAYS_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 6,
}


def command_lines() -> Iterator[tuple[int, list[str]]]:
    """What runs on this machine, by pid."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(folder.name), (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")


def is_stopped(pid: int) -> bool:
    found = proc.stat(pid)
    return found is not None and found.stopped


class OnRay(Machines):
    """Machines whose agents `stepguard cluster up` places; n1 is the cluster's head."""

    def __init__(self, root: Path) -> None:
        from ray.cluster_utils import Cluster

        super().__init__(root)
        self.daemon()  # it comes up beside the cluster
        self.stopped: list[int] = []
        self.placed = False
        self.ray = Cluster(
            initialize_head=True,
            head_node_args=self._node("n1", include_dashboard=False, _system_config=RAYS_CHECKS),
        )
        self.nodes = {"n1": self.ray.head_node}
        for name in ("n2", "n3"):
            self.ray_node(name)
        self.ray.wait_for_nodes()

    def _node(self, name: str, **more: object) -> dict[str, object]:
        return {"node_name": name, "num_cpus": 1, "object_store_memory": 80 << 20, **more}

    def ray_node(self, name: str) -> None:
        self.nodes[name] = self.ray.add_node(wait=False, **self._node(name))

    def raylet(self, name: str) -> int:
        (process,) = self.nodes[name].all_processes["raylet"]
        return int(process.process.pid)

    def cluster(self, verb: str, *words: str) -> tuple[int, dict[str, Any]]:
        """`stepguard cluster VERB`: its exit code and its answer."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            main(["cluster", verb, "--config", str(self.config), "--ray", self.ray.address, "--json", *words])
        code = ended.value.code
        assert isinstance(code, int)
        return code, json.loads(out.getvalue())

    def up(self) -> dict[str, dict[str, Any]]:
        self.placed = True
        code, answer = self.cluster("up", "--run-dir", f"{self.root}/{{node}}")
        assert code == 0, (answer, self.story())
        return {one["node"]: one for one in answer["agents"]}

    def agent_pid(self, name: str) -> int | None:
        """The living agent of a machine, by what runs on this one."""
        for pid, words in command_lines():
            if "agent" in words and str(self.folder(name)) in words:
                return pid
        return None

    def story(self) -> str:
        logs = {name: self.folder(name) / "agent.log" for name in NODES}
        told = {name: log.read_text()[-1500:] for name, log in logs.items() if log.exists()}
        return f"{super().story()}\n{told}"

    def freeze(self, *pids: int) -> None:
        for pid in pids:
            self.stopped.append(pid)
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        while self.stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.stopped.pop(), signal.SIGCONT)

    def kill_agent(self, name: str) -> None:
        """Its keeper would start it again; so the keeper goes first, and for good."""
        self.end_agents()

    def end_agents(self) -> None:
        if self.placed:
            self.placed = False
            self.cluster("down")

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.ray.shutdown()


class Pages(threading.Thread):
    """Looks at all pages, again and again: where one says GO, every other has shown the hold before it."""

    def __init__(self, machines: Machines) -> None:
        super().__init__(name="pages", daemon=True)
        self._machines = machines
        self.over = threading.Event()
        self.went_on: dict[str, int] = {}
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self.over.is_set():
            for name in NODES:
                half = self._machines.page(name)
                if half is None or half.order is not Order.GO:
                    continue
                self.went_on[name] = half.generation
                for other in NODES:
                    behind = self._machines.page(other)
                    if behind is None or behind.generation < half.generation - 1:
                        self.wrong.append(f"{name} goes on under {half.generation}, {other} shows {behind}")

    def __enter__(self) -> Pages:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join(timeout=20)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    """One run for all tests here. Each finds every machine going on, and leaves it so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        with contextlib.closing(OnRay(tmp_path_factory.mktemp("on-ray") / "r")) as run:
            run.until(run.status, "the head is up")
            run.up()
            for stepper in run.steppers.values():
                stepper.start()
            run.go_on(*NODES)
            yield run


def test_placing_again_changes_nothing_and_the_token_is_seen_nowhere(machines: OnRay) -> None:
    pids = {name: machines.agent_pid(name) for name in NODES}
    again = machines.up()
    assert {name: again[name]["pid"] for name in NODES} == pids
    assert [again[name]["starts"] for name in NODES] == [1, 1, 1]
    code, answer = machines.cluster("status")
    assert code == 0
    assert [one["head_says"] for one in answer["agents"]] == ["present"] * 3

    token = (machines.state_dir / "cluster.token").read_text().strip()
    for name in NODES:
        kept = machines.folder(name) / "cluster.token"
        assert kept.read_text().strip() == token
        assert kept.stat().st_mode & 0o777 == 0o600
    logs = [
        path for path in Path(machines.ray.head_node.get_session_dir_path()).rglob("*.*") if path.is_file()
    ]
    assert any(path.suffix == ".log" for path in logs)
    assert [path for path in logs if token.encode() in path.read_bytes()] == []
    assert [words for _, words in command_lines() if any(token in word for word in words)] == []


def test_an_agent_that_is_killed_and_one_whose_keeper_is_killed_come_again(machines: OnRay) -> None:
    first = machines.agent_pid("n2")
    assert first is not None
    keeper = proc.stat(first)
    assert keeper is not None
    os.kill(first, signal.SIGKILL)
    machines.until(lambda: machines.agent_pid("n2") not in {None, first}, "n2 has another agent")
    machines.go_on(*NODES)

    second = machines.agent_pid("n2")
    os.kill(keeper.ppid, signal.SIGKILL)
    machines.until(lambda: machines.agent_pid("n2") not in {None, first, second}, "and another keeper")
    machines.until(lambda: machines.node("n2") == "present", "n2 is there")
    machines.go_on(*NODES)


def test_a_frozen_node_holds_all_and_nobody_goes_on_before_it_shows_the_order_to(machines: OnRay) -> None:
    agent = machines.agent_pid("n3")
    assert agent is not None
    stat = proc.stat(agent)
    assert stat is not None
    frozen = (machines.raylet("n3"), stat.ppid, agent)
    machines.freeze(*frozen)
    machines.until(lambda: all(is_stopped(pid) for pid in frozen), "n3 is frozen")
    machines.until(lambda: machines.node("n3") == "lost", "the head misses n3")
    machines.held("n1", "n2")
    assert machines.gate()[2] == "node_lost"
    held = machines.gate()[1]
    with Pages(machines) as pages:
        machines.thaw()
        machines.go_on(*NODES)
        machines.until(
            lambda: all(pages.went_on.get(name, 0) > held for name in NODES), "each page is seen to go on"
        )
    assert pages.wrong == []


def test_a_killed_head_takes_the_agents_up_again(machines: OnRay) -> None:
    _, generation, _ = machines.gate()
    pids = {name: machines.agent_pid(name) for name in NODES}
    machines.daemons[-1].kill()
    assert machines.daemons[-1].wait(timeout=10) == -signal.SIGKILL
    machines.head_up()
    machines.until(lambda: all(machines.node(name) == "present" for name in NODES), "all are known")
    machines.go_on(*NODES)
    assert machines.gate()[:2] == ("GO", generation), "nobody was held for it"
    assert {name: machines.agent_pid(name) for name in NODES} == pids


def test_a_killed_node_is_lost_and_another_of_its_name_takes_its_place(machines: OnRay) -> None:
    """Ray's part of the machine is killed; what it ran there, the agent among it, goes with it."""
    raylet = machines.nodes["n3"].all_processes["raylet"][0].process
    machines.ray.remove_node(machines.nodes["n3"], allow_graceful=False)
    assert raylet.wait(timeout=20) == -signal.SIGKILL
    machines.until(lambda: machines.agent_pid("n3") is None, "the agent goes with its node")
    machines.until(lambda: machines.node("n3") == "lost", "the head misses n3")
    machines.held("n1", "n2")
    assert machines.gate()[2] == "node_lost"
    assert machines.agent_pid("n1") is not None
    assert machines.agent_pid("n2") is not None
    machines.ray_node("n3")
    machines.ray.wait_for_nodes()
    machines.up()
    machines.go_on(*NODES)
