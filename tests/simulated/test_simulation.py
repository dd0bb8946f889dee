"""Simulated days: nothing comes out that never may, and the simulator itself can tell."""

from dataclasses import replace
from typing import Any

import pytest

from stepguardd.core.state import Settings
from stepguardd.testing import World
from stepguardd.testing.simulation import simulate
from stepguardd.testing.strikes import STORIES, SimFault


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [2, 5, 11])
def test_hours_with_faults_end_well(seed: int) -> None:
    day = simulate(seed, 1.2, healthy_s=200.0)
    assert day.wrong == []
    assert day.steps > 20
    assert len(day.struck) > 3
    assert all(one.going_s is not None for one in day.struck)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", [one for one in SimFault if one is not SimFault.ZEROS])
def test_every_fault_strikes_is_guarded_against_and_is_over(fault: SimFault) -> None:
    day = simulate(3, 0.4, faults=(fault,), healthy_s=60.0)
    struck = day.struck
    assert day.wrong == []
    assert {one.fault for one in struck} == {fault}
    assert not any(one.garbage_steps for one in struck)
    harmless = {SimFault.PAUSE, SimFault.DAEMON, SimFault.TRAINER}
    assert fault in harmless or any(one.held_s is not None for one in struck)


def test_a_healthy_run_is_never_held() -> None:
    day = simulate(1, 2.0, faults=())
    assert (day.wrong, day.struck, day.refused) == ([], [], 0)
    assert day.steps > 100


def test_the_same_seed_gives_the_same_day_and_another_one_another() -> None:
    first, again, other = simulate(8, 0.3), simulate(8, 0.3), simulate(9, 0.3)
    assert first == again
    assert first.trace != other.trace


class Jumpy(World):
    """It holds for no reason, from minute 20 on."""

    @property
    def order(self) -> str:
        return "HOLD" if 2200.0 < self.now < 2300.0 else super().order


class Blind(World):
    """Every batch is good enough for it."""

    def batch(self, reward: float | None = None, **about: Any) -> bool:
        super().batch(reward, **about)
        return True


def test_a_hold_of_a_healthy_run_is_found_out() -> None:
    day = simulate(1, 1.0, faults=(), world=Jumpy)
    assert any("a healthy run was held" in what for what in day.wrong)


def test_garbage_that_is_let_through_is_found_out() -> None:
    day = simulate(2, 0.6, faults=(SimFault.KILL,), healthy_s=60.0, world=Blind)
    assert any("was taken on garbage" in what for what in day.wrong)


def test_a_run_that_never_goes_on_is_found_out() -> None:
    """Nothing is restarted, and nobody comes."""
    none = replace(Settings(), restart_budget=0, locked_out_hold_s=1e9)
    kill = (SimFault.KILL,)
    day = simulate(2, 0.5, settings=none, faults=kill, healthy_s=60.0, person_comes_s=1e9)
    assert any("stuck after" in what for what in day.wrong)


def test_every_fault_has_its_story() -> None:
    assert set(STORIES) == set(SimFault)
