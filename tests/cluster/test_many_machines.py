"""Three machines under one head: lost, frozen, cut off, and the head itself killed; each for real."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.machines import NODES, Cable, Machines

pytestmark = pytest.mark.e2e


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with contextlib.closing(Machines(tmp_path / "r")) as run:
        yield run


def test_nobody_steps_before_all_are_there_and_a_killed_agent_holds_all_until_it_is_back(
    machines: Machines,
) -> None:
    machines.head_up()
    for name in ("n1", "n2"):
        machines.agent(name)
        machines.until(lambda name=name: machines.page(name) is not None, f"{name} has a page")
        machines.steppers[name].start()
    machines.until(lambda: machines.node("n1") == machines.node("n2") == "present", "two are there")
    assert machines.gate()[::2] == ("HOLD", "nodes_joining")
    assert machines.held("n1", "n2") == {"n1": 0, "n2": 0}
    machines.agent("n3")
    machines.until(lambda: machines.page("n3") is not None, "n3 has a page")
    machines.steppers["n3"].start()
    machines.go_on(*NODES)
    assert machines.status()["trainer"]["committed_step"] is not None, "the trainer's reports reach the head"

    machines.signal("n2", signal.SIGKILL)
    machines.until(lambda: machines.node("n2") == "lost", "the head misses n2")
    assert machines.agents["n2"].wait(timeout=10) == -signal.SIGKILL
    machines.until(lambda: machines.gate()[::2] == ("HOLD", "node_lost"), "the run is held")
    held = machines.held("n1", "n3")
    assert machines.status()["incident"] is not None
    machines.agent("n2")
    machines.go_on(*NODES)
    assert machines.steppers["n1"].committed > held["n1"]


def test_a_frozen_agent_is_a_lost_machine_and_does_not_obey_old_words_when_it_thaws(
    machines: Machines,
) -> None:
    machines.all_up()
    machines.signal("n3", signal.SIGSTOP)
    machines.until(lambda: machines.is_stopped("n3"), "n3 is frozen")
    machines.until(lambda: machines.node("n3") == "lost", "the head misses n3")
    machines.held("n1", "n2")
    machines.ask("pause", why="a look")
    went_on = machines.page("n3")
    assert went_on is not None
    assert went_on.order.name == "GO", "its page is as it was when it froze"
    machines.signal("n3", signal.SIGCONT)
    machines.until(lambda: machines.node("n3") == "present", "n3 is back")
    machines.held(*NODES)
    half = machines.page("n3")
    assert half is not None
    assert half.reason == "operator_pause"
    machines.ask("resume")
    machines.go_on(*NODES)


def test_a_killed_head_holds_nobody_and_its_successor_takes_the_agents_up_as_they_are(
    machines: Machines,
) -> None:
    machines.all_up()
    order, generation, _ = machines.gate()
    assert order == "GO"
    machines.daemons[-1].kill()
    assert machines.daemons[-1].wait(timeout=10) == -signal.SIGKILL
    machines.head_up()
    machines.until(lambda: all(machines.node(name) == "present" for name in NODES), "all are known")
    machines.go_on(*NODES)
    assert machines.gate()[:2] == ("GO", generation), "nobody was held for it"
    assert machines.status()["incident"] is None

    machines.ask("pause", why="a look")
    held = machines.held(*NODES)
    machines.daemons[-1].kill()
    machines.daemons[-1].wait(timeout=10)
    machines.head_up()
    assert machines.resting(*NODES) == held, "a hold outlives the head"
    machines.ask("resume")
    machines.go_on(*NODES)


def test_a_machine_that_is_cut_off_holds_by_itself_and_the_others_by_order(tmp_path: Path) -> None:
    with contextlib.closing(Machines(tmp_path / "r", on_daemon_lost="hold")) as machines:
        cable = Cable(machines.port)
        cable.start()
        with contextlib.closing(cable):
            machines.all_up(through=cable)
            assert cable.carried > 0, "n3 speaks through the cable"
            cable.cut.set()
            machines.until(lambda: machines.node("n3") == "lost", "the head misses n3")
            machines.held("n1", "n2")
            machines.resting("n3")
            assert machines.page_order("n3") == "GO", "no word reached it: its lease ran out"
            cable.cut.clear()
            machines.go_on(*NODES)


def test_an_agent_without_the_token_and_one_with_a_strange_name_are_turned_away(machines: Machines) -> None:
    machines.head_up()
    token = machines.state_dir / "cluster.token"
    good = token.read_text()
    assert token.stat().st_mode & 0o077 == 0
    token.write_text("x" * 43 + "\n")
    machines.agent("n1")
    machines.until(lambda: "does not hold this run's token" in machines.log.read_text(), "n1 is refused")
    token.write_text(good)
    machines.agent("n9")
    machines.until(lambda: "cluster.nodes has no such node" in machines.log.read_text(), "n9 is refused")
    assert machines.node("n1") == "joining"
