"""A trainer that gets nowhere is told of; a slow, evaluating, held or dead one is not taken for it."""

import random
from dataclasses import replace

import pytest

from stepguardd.core import stall
from stepguardd.core.commands import Command, Notify, PublishGate, StopTrainer
from stepguardd.core.decide import decide
from stepguardd.core.events import OperatorAsked, Proc, Tick, TrainerExited, TrainerSeen, TrainerTree
from stepguardd.core.reasons import Reason
from stepguardd.core.state import Mode, Settings, State, initial

FIGURES = Settings(trainer_managed=True, stall_factor=6.0, stall_floor_s=1800.0, stall_ceiling_s=7200.0)
MANAGED_PROCS = (Proc(pid=77, start_ticks=1, role="trainer"),)


class Run:
    """A trainer's page over hours, on a clock of its own."""

    def __init__(self, *, managed: bool = True, mode: str = "act", look_s: float = 1.0) -> None:
        self.now, self.look_s = 1000.0, look_s
        self.step, self.progress, self.beats, self.phase = 0, 0, 0, "UNKNOWN"
        self.said: list[Command] = []
        self.state: State = initial(replace(FIGURES, trainer_managed=managed), Mode(mode), ())
        if managed:
            self.feed(TrainerTree(procs=MANAGED_PROCS))

    def feed(self, event: TrainerSeen | Tick | TrainerTree | TrainerExited | OperatorAsked) -> None:
        self.state, commands = decide(self.state, event, self.now)
        self.said += commands

    def look(self) -> None:
        self.feed(
            TrainerSeen(
                pid=77,
                attempt=0,
                step=self.step,
                phase=self.phase,
                beats=self.beats,
                progress=self.progress,
                acked_generation=0,
                weight_version=f"v{self.step}",
                handles_resync=True,
                handles_rollback=True,
                handles_save=True,
            )
        )
        self.feed(Tick())

    def spend(self, phase: str, seconds: float, *, beats: bool = True) -> None:
        """So long in a phase, without any progress within it."""
        self.phase = phase
        self.progress += 1
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + self.look_s)
            self.beats += beats
            self.look()

    def steps(self, count: int, rollout_s: float = 60.0, train_s: float = 30.0) -> None:
        for _ in range(count):
            self.spend("ROLLOUT", rollout_s)
            self.spend("TRAIN", train_s)
            self.step += 1

    def notes(self, *whats: str) -> list[Notify]:
        return [one for one in self.said if isinstance(one, Notify) and one.what in whats]

    @property
    def stops(self) -> int:
        return sum(isinstance(one, StopTrainer) for one in self.said)


@pytest.mark.parametrize(
    ("typical_s", "limit"),
    [(60.0, 1800.0), (400.0, 2400.0), (1000.0, 6000.0), (3000.0, 7200.0)],
    ids=["floor", "six medians", "long", "ceiling"],
)
def test_the_limit_is_six_times_the_median_between_floor_and_ceiling(typical_s: float, limit: float) -> None:
    run = Run(look_s=10.0)
    run.steps(8, rollout_s=typical_s)
    run.spend("ROLLOUT", limit - 20)
    assert not run.said
    run.spend("ROLLOUT", 0)
    run.spend("ROLLOUT", limit + 20)
    assert run.stops == 1
    assert run.notes("action")[0].reason == Reason.TRAINER_STALLED.value


@pytest.mark.parametrize(
    ("beats", "words"), [(True, "its heartbeat goes on"), (False, "it is frozen: no heartbeat for")]
)
def test_a_stuck_and_a_frozen_trainer_are_started_again_and_told_apart(beats: bool, words: str) -> None:
    run = Run(look_s=5.0)
    run.steps(6)
    run.spend("TRAIN", 1900, beats=beats)
    assert run.stops == 1
    assert words in run.notes("action")[0].text
    early = run.notes("warning")
    assert [one.reason for one in early] == ([] if beats else [Reason.TRAINER_FROZEN.value])


@pytest.mark.parametrize("phase", ["EVAL", "TRAIN", "UNKNOWN", "CHECKPOINT"])
def test_an_evaluation_of_twenty_minutes_is_no_stall_whatever_it_is_called(phase: str) -> None:
    run = Run(look_s=5.0)
    for _ in range(3):
        run.steps(6)
        run.spend(phase, 1200)
    run.steps(2)
    assert not run.said


def test_a_dead_trainer_is_dead_and_not_stalled() -> None:
    run = Run(look_s=5.0)
    run.steps(6)
    run.feed(TrainerExited(pid=77, code=-9))
    assert run.notes("action")[0].reason == Reason.TRAINER_EXITED.value
    run.spend("TRAIN", 20_000, beats=False)
    assert not [one for one in run.notes("action", "call", "warning") if "progress" in one.text]


def test_a_trainer_that_finished_is_left_in_peace() -> None:
    run = Run(look_s=5.0)
    run.steps(6)
    run.feed(TrainerExited(pid=77, code=0))
    run.spend("TRAIN", 20_000, beats=False)
    assert not run.notes("action", "call", "warning")


def test_the_first_iterations_may_take_up_to_the_ceiling_and_teach_nothing() -> None:
    run = Run(look_s=10.0)
    run.steps(2, rollout_s=3000, train_s=5000)
    assert not run.said
    run.steps(5)
    assert stall.limit_s(run.state.stall, run.state.settings) == 1800.0


def test_a_held_run_is_no_stall_and_its_time_is_not_learned() -> None:
    run = Run(look_s=10.0)
    run.steps(6)
    run.feed(OperatorAsked(verb="pause", who="a test", why="lunch"))
    run.spend("ROLLOUT", 30_000)
    assert run.stops == 0
    run.feed(OperatorAsked(verb="resume", who="a test", why="back"))
    run.steps(1)
    assert max(time for one in run.state.stall.phases for time in one.last) < 120
    run.spend("ROLLOUT", 1900)
    assert run.stops == 1


@pytest.mark.parametrize(("managed", "mode"), [(False, "act"), (True, "hold"), (True, "shadow")])
def test_where_it_may_not_be_restarted_people_are_told_once(managed: bool, mode: str) -> None:
    run = Run(managed=managed, mode=mode, look_s=5.0)
    run.steps(6)
    run.spend("TRAIN", 8000)
    assert [one.reason for one in run.notes("call")] == [Reason.TRAINER_STALLED.value]
    assert run.stops == 0
    run.step += 1
    run.steps(1)
    run.spend("ROLLOUT", 2000)
    assert len(run.notes("call")) == 2


def test_a_healthy_noisy_day_holds_nothing() -> None:
    """24 hours: lengths that vary tenfold, evaluations, slow checkpoints, a heartbeat that stutters."""
    rng = random.Random(7)
    run = Run(look_s=5.0)
    while run.now < 1000.0 + 86_400.0:
        run.spend("ROLLOUT", min(900.0, 90.0 * rng.lognormvariate(0.0, 0.8)))
        run.spend("REWARD", rng.uniform(1.0, 40.0))
        run.spend("TRAIN", 60.0 * rng.uniform(0.5, 3.0), beats=rng.random() > 0.02)
        run.spend("SYNC", rng.uniform(2.0, 60.0))
        run.step += 1
        if run.step % 20 == 0:
            run.spend(rng.choice(["EVAL", "UNKNOWN"]), rng.uniform(600.0, 1500.0))
        if run.step % 25 == 0:
            run.spend("CHECKPOINT", rng.uniform(10.0, 400.0))
    assert run.step > 200
    assert not [one for one in run.said if isinstance(one, PublishGate | StopTrainer)]
    assert not run.notes("call", "action", "opened")
