"""The keeper vets each checkpoint once, keeps the proven ones, and says what it could not do."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

from daemon_parts.little_trainer import save
from stepguardd.config import CheckpointSettings
from stepguardd.core.decide import decide
from stepguardd.core.events import CheckpointSaved, Event, StepCommitted
from stepguardd.core.ledger import proven
from stepguardd.core.state import Mode, Settings, initial
from stepguardd.effects.keeper import Keeper
from stepguardd.effects.rollback import prepare


class Run:
    """A state that events change, and a keeper that looks at it."""

    def __init__(self, root: Path, **settings: object) -> None:
        self.root = root
        self.settings = CheckpointSettings(dir=root, proven_after_steps=2, **settings)  # type: ignore[arg-type]
        self.state = initial(Settings(proven_after_steps=2), Mode.ACT, ())
        self.now, self.said = 1.0, []
        self.keeper = Keeper(self.settings, lambda: self.state, self.feed, asyncio.Lock())

    def feed(self, event: Event) -> None:
        self.now += 1.0
        self.state, commands = decide(self.state, event, self.now)
        self.said += commands

    def saved(self, step: int) -> None:
        path = save(self.root, step)
        self.feed(CheckpointSaved(attempt=0, step=step, path=str(path)))

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.feed(StepCommitted(attempt=0, step=step, reward=0.7))

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            asyncio.run(self.keeper.look())


def test_each_is_vetted_proven_and_kept_and_an_older_copy_let_go(tmp_path: Path) -> None:
    run = Run(tmp_path / "c", keep_proven=1)
    run.saved(10)
    run.look()
    assert [row.verdict.value for row in run.state.checkpoints] == ["good"]
    run.steps(11, 12)
    run.look()
    pins = tmp_path / "c/stepguard-pinned"
    assert [path.name for path in pins.iterdir()] == ["step-10"]
    run.saved(20)
    run.steps(21, 22)
    run.look(2)
    run.look()
    assert [path.name for path in pins.iterdir()] == ["step-20"]
    assert [proven(row, 2) for row in run.state.checkpoints] == [True, True]


def test_what_rotation_took_is_gone_and_its_copy_may_still_be_gone_back_to(tmp_path: Path) -> None:
    run = Run(tmp_path / "c")
    run.saved(10)
    run.look()
    run.steps(11, 12)
    run.look()
    shutil.rmtree(tmp_path / "c/checkpoint-10")
    run.saved(20)
    run.look()
    row = run.state.checkpoints[0]
    assert (row.gone, row.pinned_path is not None) == (True, True)
    outcome = asyncio.run(prepare(run.settings, 15, name="x", rows=run.state.checkpoints))
    assert (outcome.target_step, outcome.target_path) == (10, str(tmp_path / "c/checkpoint-10"))
    assert (tmp_path / "c/checkpoint-10/model.safetensors").exists()


def test_a_bad_one_is_told_of_and_never_chosen_and_the_refusal_is_explained(tmp_path: Path) -> None:
    run = Run(tmp_path / "c")
    run.saved(10)
    run.steps(11, 12)
    run.saved(20)
    weights = tmp_path / "c/checkpoint-20/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")  # a NaN
    run.steps(21, 22)
    run.look(2)
    assert any("step 20 is bad" in getattr(one, "text", "") for one in run.said)
    outcome = asyncio.run(prepare(run.settings, 30, name="x", rows=run.state.checkpoints))
    assert outcome.target_step == 10
    assert "step 20 is bad" in outcome.detail


def test_a_copy_that_cannot_be_made_is_told_once_and_costs_the_training_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "c")
    run.saved(10)
    (tmp_path / "c/stepguard-pinned").write_text("in the way")
    run.look()
    run.steps(11, 12)
    run.look(3)
    calls = [one for one in run.said if getattr(one, "reason", "") == "pin_refused"]
    assert len(calls) == 1
    assert (tmp_path / "c/checkpoint-10").exists()
    assert run.state.gate.order.value == "GO"


def test_a_trainer_that_saves_faster_than_is_read_has_its_proven_ones_kept(tmp_path: Path) -> None:
    """There is always one to vet; a look at the pins that came after all of them never came."""
    run = Run(tmp_path / "c")
    run.saved(10)
    run.look()
    run.steps(11, 12)
    run.saved(20)
    run.look()
    assert [row.pinned_path is not None for row in run.state.checkpoints] == [True, False]
    assert run.state.checkpoints[1].vetted


def test_in_mode_shadow_nothing_is_copied(tmp_path: Path) -> None:
    run = Run(tmp_path / "c")
    run.state = replace(initial(Settings(proven_after_steps=2), Mode.SHADOW, ()))
    run.saved(10)
    run.look()
    run.steps(11, 12)
    run.look()
    assert not (tmp_path / "c/stepguard-pinned").exists()


def test_a_relaunch_before_anything_was_saved_begins_at_the_beginning(tmp_path: Path) -> None:
    settings = CheckpointSettings(dir=tmp_path / "none")
    outcome = asyncio.run(prepare(settings, None, name="x", rows=()))
    assert (outcome.ok, outcome.target_step) == (True, None)
    assert not asyncio.run(prepare(settings, 10, name="x", rows=())).ok


def test_what_the_ledger_never_heard_of_counts_where_nothing_is_proven(tmp_path: Path) -> None:
    """Saved before anybody watched. One that was watched and is not proven does not count for a rollback."""
    save(tmp_path / "c", 10)
    run = Run(tmp_path / "c")
    run.saved(20)
    run.look()
    rows = run.state.checkpoints
    assert asyncio.run(prepare(run.settings, 30, name="x", rows=rows)).target_step == 10


def test_a_relaunch_takes_an_unproven_one_rather_than_none(tmp_path: Path) -> None:
    run = Run(tmp_path / "c")
    run.saved(20)
    run.look()
    assert asyncio.run(prepare(run.settings, None, name="x", rows=run.state.checkpoints)).target_step == 20
