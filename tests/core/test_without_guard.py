"""A trainer that knows nothing of Stepguard: known of it are its log, its processes and its exit code."""

from stepguardd.core.breaker import Phase
from stepguardd.core.commands import PrepareRollback, StartTrainer, StopTrainer
from stepguardd.core.decide import decide
from stepguardd.core.events import EffectEnded, Event, Proc, RewardLogged, Tick, TrainerExited, TrainerTree
from stepguardd.core.reasons import Reason
from stepguardd.core.state import Mode, Settings, State, initial

SETTINGS = Settings(trainer_managed=True, backoff_first_s=0.0, backoff_jitter=0.0)


class Night:
    """Events one after the other; every effect that starts or ends the trainer succeeds at once."""

    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.state: State = initial(settings, Mode.ACT, ())
        self.now = 1000.0
        self.did: list[object] = []
        self.pid = 10
        self.feed(TrainerTree(procs=()))
        self.feed(Tick())

    def feed(self, event: Event) -> None:
        self.now += 1.0
        self.state, commands = decide(self.state, event, self.now)
        self.did += commands
        for command in commands:
            match command:
                case StopTrainer():
                    self.feed(EffectEnded(intent=command.intent, ok=True))
                case PrepareRollback():
                    self.feed(EffectEnded(intent=command.intent, ok=True, detail="step 20", target_step=20))
                case StartTrainer():
                    self.pid += 1
                    procs = (Proc(pid=self.pid, start_ticks=1, role="trainer"),)
                    self.feed(EffectEnded(intent=command.intent, ok=True, procs=procs))

    def steps(self, first: int, last: int, reward: float | None = None) -> None:
        for step in range(first, last + 1):
            value = 0.7 + 0.01 * (step * 7 % 5) if reward is None else reward
            self.feed(RewardLogged(step=step, reward=value))

    def dies(self) -> None:
        self.feed(TrainerExited(pid=self.pid, code=-9))
        self.feed(Tick())

    def all(self, kind: type) -> list[object]:
        return [command for command in self.did if isinstance(command, kind)]


def test_its_death_is_a_relaunch_and_logged_steps_end_the_probation() -> None:
    night = Night()
    night.steps(1, 30)
    night.dies()
    assert len(night.all(StartTrainer)) == 2
    assert night.state.phase is Phase.HALF_OPEN
    night.steps(21, 30)
    assert (night.state.phase, night.state.incident) == (Phase.CLOSED, None)


def test_deaths_with_steps_between_them_are_no_launches_without_a_step() -> None:
    night = Night()
    for _ in range(4):
        night.steps(21, 30)
        night.dies()
    assert len(night.all(StartTrainer)) == 5
    assert night.state.lockout is None


def test_three_launches_without_a_logged_step_lock_out() -> None:
    night = Night()
    night.steps(1, 30)
    for _ in range(4):
        night.dies()
    assert night.state.lockout is not None
    assert night.state.lockout.reason is Reason.RELAUNCH_BUDGET_SPENT


def test_garbage_that_it_trained_on_is_taken_back_as_the_config_says() -> None:
    night = Night(Settings(trainer_managed=True, backoff_first_s=0.0, on_policy_collapse="rollback"))
    night.steps(1, 60)
    night.steps(61, 63, reward=0.0)
    (prepared,) = night.all(PrepareRollback)
    assert isinstance(prepared, PrepareRollback)
    assert prepared.before_step == 61
    night.steps(21, 40)
    assert (night.state.phase, night.state.trip) == (Phase.CLOSED, None)


def test_a_collapse_that_no_server_explains_ends_no_trainer_unless_the_config_says_so() -> None:
    night = Night()
    night.steps(1, 60)
    night.steps(61, 80, reward=0.0)
    assert (night.all(PrepareRollback), night.all(StopTrainer)) == ([], [])
    assert night.state.trip is not None


def test_a_good_end_is_no_death() -> None:
    night = Night()
    night.steps(1, 30)
    night.feed(TrainerExited(pid=night.pid, code=0))
    assert night.state.trainer.left == "finished"
    assert len(night.all(StartTrainer)) == 1
