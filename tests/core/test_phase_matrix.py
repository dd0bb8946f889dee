"""
Every phase that a server goes through, with what it must come to: no false kill, and no hold that comes late.

The contract of the fake behind it with real servers is in tests/daemon_parts/server_evidence.py.
"""

import pytest

from core.phase_matrix import BEGIN, END, MATRIX, PAGE, Phase, played, table


@pytest.mark.parametrize("phase", MATRIX, ids=lambda phase: phase.name)
def test_each_phase_gets_its_verdict_in_time(phase: Phase) -> None:
    found = played(phase)
    assert found.verdict == phase.verdict, found.told
    assert found.planned is phase.planned, found.told
    if phase.verdict is not None:
        assert found.held_s is not None
        assert 0.0 <= found.held_s <= phase.within_s
    match phase.kill:
        case "never":
            assert found.killed_s is None, found.told
        case "at once":
            assert found.killed_s == 0.0, found.told
        case "after 60 s":
            assert found.killed_s is not None, found.told
            assert found.killed_s >= 60.0
    assert found.goes_on is phase.goes_on, found.told
    assert found.current or not found.goes_on, "it goes on with other weights than the trainer's"


def test_the_docs_have_the_matrix_as_played() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown == table(), "run: python tests/core/phase_matrix.py"
