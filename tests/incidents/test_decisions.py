"""A log of decisions decides itself again, byte for byte, and says where it does not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from daemon_parts.test_journal import Recording, written
from stepguardd.cli import main
from stepguardd.core.commands import Notify
from stepguardd.core.decide import decide
from stepguardd.core.events import DaemonStarted
from stepguardd.incidents.decisions import DecisionLogError, redecide, write_log
from stepguardd.incidents.folders import is_decision_log
from stepguardd.incidents.passage import incidents, read_passage


@pytest.fixture(scope="module")
def night() -> Recording:
    """Two deaths of a server, each repaired and survived, and zeros that a person lets go."""
    world = Recording()
    world.steps(12)
    for _ in range(2):
        world.kill()
        world.run(30)
        world.steps(6)
    world.batch(0.0)
    world.run(5)
    world.ask("resume")
    world.steps(6)
    return world


def logged(journal: Path, number: int, path: Path, bytes_max: int = 1 << 30) -> Path:
    passage = read_passage(journal, number)
    assert passage is not None
    with path.open("w") as file:
        assert write_log(passage, file, bytes_max=bytes_max) > 0
    return path


@pytest.fixture
def journal(night: Recording, tmp_path: Path) -> Path:
    written(tmp_path / "journal.db", night.rows)
    return tmp_path / "journal.db"


def test_every_incident_of_a_night_decides_itself_again(
    journal: Path, night: Recording, tmp_path: Path
) -> None:
    numbers = incidents(journal)
    assert numbers == list(range(1, night.state.incidents + 1))
    assert len(numbers) >= 2
    for number in numbers:
        path = logged(journal, number, tmp_path / f"{number}.jsonl")
        assert is_decision_log(path)
        result = redecide(path)
        assert (result.difference, result.incident) == (None, number)
        notices = [
            command
            for *_, commands, _ in night.rows
            for command in commands
            if isinstance(command, Notify) and command.incident == number
        ]
        text = path.read_text()
        assert notices
        assert all(json.dumps(notice.text, ensure_ascii=False) in text for notice in notices)


def test_the_passage_of_an_incident_ends_with_it(journal: Path, night: Recording) -> None:
    first, second = read_passage(journal, 1), read_passage(journal, 2)
    assert first is not None
    assert second is not None
    assert first.rows[-1].seq < second.opened.seq
    assert read_passage(journal, 99) is None


@pytest.mark.parametrize("what", ["command", "event", "dropped"])
def test_a_log_that_was_changed_is_found_out(
    journal: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = logged(journal, 1, tmp_path / "d.jsonl")
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"StopServer"' in line and i)
    if what == "command":
        lines[at] = lines[at].replace('"StopServer",{"intent":"', '"StopServer",{"intent":"9')
    elif what == "event":
        lines[at] = lines[at].replace('"ProcessExited",{"server":"s"', '"ProcessExited",{"server":"x"')
    else:
        del lines[at]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (ended.value.code, told["same"]) == (1, False)
    assert told["first_difference"]["recorded"] != told["first_difference"]["decided"]


def test_a_log_says_in_words_that_it_came_out_the_same(
    journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = logged(journal, 1, tmp_path / "d.jsonl")
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(path)])
    assert ended.value.code == 0
    assert "byte for byte as recorded" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda lines: [lines[0], lines[1][:40]], ":2: is cut short or broken"),
        (lambda lines: [lines[0].replace('"version":1', '"version":9')], "written in version 9"),
        (lambda lines: [lines[0].replace('"mode":"act"', '"mode":"fly"')], "none that this version"),
        (lambda lines: [lines[0], "[]"], ":2: is no JSON object"),
        (lambda lines: [lines[0], '{"seq": 1}'], ":2: 'event'"),
    ],
)
def test_a_log_that_cannot_be_read_names_the_line(journal: Path, tmp_path: Path, spoil, words: str) -> None:
    path = logged(journal, 1, tmp_path / "d.jsonl")
    path.write_text("\n".join(spoil(path.read_text().splitlines())) + "\n")
    with pytest.raises(DecisionLogError) as wrong:
        redecide(path)
    assert words in str(wrong.value)
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(path)])
    assert ended.value.code == 2


def test_a_log_that_is_cut_decides_as_far_as_it_goes(journal: Path, tmp_path: Path) -> None:
    whole = logged(journal, 1, tmp_path / "whole.jsonl")
    size = whole.stat().st_size
    cut = logged(journal, 1, tmp_path / "cut.jsonl", bytes_max=size // 2)
    assert cut.stat().st_size <= size // 2
    assert redecide(cut).same
    assert 0 < redecide(cut).decisions < redecide(whole).decisions


def test_a_daemon_that_came_up_with_another_config_is_decided_again_with_it(tmp_path: Path) -> None:
    """What was decided after it rests on figures that no event holds."""
    world = Recording()
    world.steps(8)
    world.kill()
    first = list(world.rows)
    changed = replace(world.state, settings=replace(world.state.settings, probation_steps=1))
    state, commands = decide(changed, DaemonStarted(gate_order="HOLD", gate_generation=1), world.now)
    world.state = state
    world.rows = [(world.now, DaemonStarted(gate_order="HOLD", gate_generation=1), commands, state)]
    world.run(30)
    world.steps(2)
    journal = tmp_path / "journal.db"
    written(journal, first)
    written(journal, world.rows)
    assert world.state.last_incident is not None, "one step of probation closes it"
    result = redecide(logged(journal, 1, tmp_path / "d.jsonl"))
    assert result.difference is None
    assert result.decisions > len(first)


def test_after_a_reboot_there_is_no_state_to_decide_from(tmp_path: Path) -> None:
    """The report was written before; from the journal alone it cannot be had any more, and that is said."""
    world = Recording()
    world.steps(8)
    world.kill()
    journal = tmp_path / "journal.db"
    written(journal, world.rows)
    assert read_passage(journal, 1) is not None
    written(journal, [], boot="another")
    assert incidents(journal) == [1]
    assert read_passage(journal, 1) is None
