"""Simulated days: nothing comes out that never may, and the simulator itself can tell."""

from dataclasses import replace

import pytest

from stepguardd.core import holding
from stepguardd.core.state import Settings
from stepguardd.testing import simulation
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


def test_a_core_that_holds_the_healthy_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = holding.why_down

    def trigger_happy(state: object) -> object:
        found = real(state)  # type: ignore[arg-type]
        late = state.trainer.step is not None and state.trainer.step > 20  # type: ignore[attr-defined]
        return holding.Reason.SERVER_DIED if found is None and late else found

    monkeypatch.setattr(holding, "why_down", trigger_happy)
    day = simulate(1, 1.0, faults=())
    assert any("a healthy run was held" in what for what in day.wrong)


def test_a_core_that_lets_garbage_through_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation.World, "batch", lambda *_, **__: True)
    day = simulate(2, 0.6, faults=(SimFault.KILL,), healthy_s=60.0)
    assert any("was taken on garbage" in what for what in day.wrong)


def test_a_core_that_never_lets_go_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It restarts nothing, and a person's word changes nothing."""
    monkeypatch.setattr(simulation, "PERSON_COMES_S", 1e9)
    patient = replace(Settings(), restart_budget=0, locked_out_hold_s=1e9)
    day = simulate(2, 0.5, settings=patient, faults=(SimFault.KILL,), healthy_s=60.0)
    assert any("stuck after" in what for what in day.wrong)


def test_every_fault_has_its_story() -> None:
    assert set(STORIES) == set(SimFault)
