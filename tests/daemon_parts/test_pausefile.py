"""`touch PAUSE` pauses, by its owner's name; taking it away resumes."""

from dataclasses import dataclass, field
from pathlib import Path

from stepguardd.core.decide import decide
from stepguardd.core.events import Event, OperatorAsked
from stepguardd.core.state import Mode, Settings, State, initial
from stepguardd.sources.pausefile import PauseFile


@dataclass(slots=True)
class Run:
    state: State = field(default_factory=lambda: initial(Settings(), Mode.ACT, ()))
    now: float = 1.0
    asked: list[OperatorAsked] = field(default_factory=list)

    def feed(self, event: Event) -> None:
        assert isinstance(event, OperatorAsked)
        self.asked.append(event)
        self.now += 1.0
        self.state, _ = decide(self.state, event, self.now)


def test_the_file_pauses_with_its_first_line_and_its_end_resumes(tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "PAUSE"
    watched = PauseFile(tmp_path, lambda: run.state, run.feed)
    watched.look()
    path.write_text("a look at the curve\nmore")
    watched.look()
    watched.look()
    assert run.state.gate.order.value == "HOLD"
    assert [(one.verb, one.why) for one in run.asked] == [("pause", "a look at the curve")]
    assert "uid" in run.asked[0].who
    path.unlink()
    watched.look()
    assert run.state.gate.order.value == "GO"


def test_a_resume_by_other_means_takes_the_file_away(tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "PAUSE"
    watched = PauseFile(tmp_path, lambda: run.state, run.feed)
    path.touch()
    watched.look()
    run.feed(OperatorAsked(verb="resume", who="ada", why=""))
    watched.look()
    assert not path.exists()
    assert run.state.gate.order.value == "GO"
    path.touch()
    watched.look()
    assert run.state.gate.order.value == "HOLD"


def test_the_next_daemon_keeps_to_a_pause_whose_file_is_there(tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "PAUSE"
    path.touch()
    PauseFile(tmp_path, lambda: run.state, run.feed).look()
    another = PauseFile(tmp_path, lambda: run.state, run.feed)
    another.look()
    path.unlink()
    another.look()
    assert run.state.gate.order.value == "GO"
