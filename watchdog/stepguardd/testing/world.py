"""
A run in miniature: servers, a trainer and a clock, all of them fakes, around the real `decide`.

It promises the same run for the same calls. Effects take the time that the fakes say; probes, samples and the
trainer's page come at the daemon's own intervals; every decision is looked at by `Promises`.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..core.commands import (
    AbortRequests,
    Command,
    CompareWeights,
    ContinueGeneration,
    ContinueServer,
    Effect,
    MarkPrompts,
    Notify,
    PauseGeneration,
    PrepareRollback,
    PublishGate,
    PushWeights,
    RunCanary,
    StartServer,
    StartTrainer,
    StopServer,
    StopTrainer,
)
from ..core.decide import decide
from ..core.events import (
    Answer,
    BatchReported,
    DaemonStarted,
    EffectEnded,
    Event,
    GenerationAsked,
    GreedyToken,
    OperatorAsked,
    OrderAcknowledged,
    Proc,
    ProcessExited,
    RewardLogged,
    SchedulerAsked,
    ServerProbed,
    StepCommitted,
    Tick,
    TrainerExited,
    TrainerLeft,
    TrainerSeen,
    TrainerTree,
    TreeSampled,
    TreeSeen,
    WeightsLook,
)
from ..core.state import Gate, GateOrder, Mode, Server, ServerState, Settings, State, initial
from .promises import Promises

TICK_S = 0.25
SAMPLE_S = 0.5
PROBE_S = 1.0
PAGE_S = 1.0
TREE_S = 5.0
PROBE_TIMEOUT_S = 3.0
HEALTH_TAKES_S = 1.0
HEALTH_GIVES_UP_S = 20.0

C = TypeVar("C", bound=Command)


@dataclass(slots=True, kw_only=True)
class FakeServer:
    """
    A server as the daemon can see it. Change its fields to break it.

    Args:
        name: as in the config.
        managed: whether Stepguard may start and end it.
        version: the weights that it says it serves; None where it does not say.
        base_version: what it serves after a start.
        stop_s, start_s, load_s, canary_s, push_s: how long each takes.
        can_start, can_stop, can_generate, can_load, can_pause: whether each succeeds.
        paused: `/ready` says 503, and no token comes. `pause_mode` says what becomes of open requests.
        listens: whether its port answers.
        weights: those that it has, where they are not what `version` says.
        wrong_loads: how many of the next loads bring another model, under the right name.
        sums: whether it offers checksums.
        frozen: its scheduler's loop stands: it has requests, and no token comes.
        busy: its processes use CPU.
        cont_helps: whether SIGCONT wakes it.
        load: how many requests a trainer in its rollouts keeps open in it; with 0, `running` is set by hand.
        rate: tokens a second while it generates.
        chunk_s: its tokens move only so often, and its loop turns as seldom: a prefill in chunks.
        mute: it takes connections and never answers, or so slowly that no answer ends in time.
        storm: it answers 503 to everything; `refuses`: to `/generate` alone.
        waited_for: whether requests wait in it while it is frozen.
        other: another program holds its port: "garbled" talks nonsense, "twin" is a server like it.
        lacks: endpoints that it does not have.
        visible: whether its processes can be seen from here.

    """

    name: str
    managed: bool = True
    version: str | None = "base"
    base_version: str | None = "base"
    stop_s: float = 0.5
    start_s: float = 0.25
    load_s: float = 2.0
    canary_s: float = 0.25
    push_s: float = 0.5
    can_start: bool = True
    can_stop: bool = True
    can_generate: bool = True
    can_load: bool = True
    can_pause: bool = True
    paused: bool = False
    listens: bool = True
    weights: str | None = None
    wrong_loads: int = 0
    sums: bool = True
    frozen: bool = False
    busy: bool = True
    cont_helps: bool = True
    load: int = 0
    rate: int = 1000
    chunk_s: float = 0.0
    pause_mode: str = "in_place"
    mute: bool = False
    storm: bool = False
    refuses: bool = False
    waited_for: bool = True
    other: str | None = None
    lacks: frozenset[str] = frozenset()
    visible: bool = True
    unhealthy: bool = False
    stamp: float = 0.0
    running: int = 0
    tokens: int = 0
    cpu_s: float = 0.0
    stopped: bool = False
    procs: tuple[Proc, ...] = ()
    starts: list[str] = field(default_factory=list)
    serving_from: float = 0.0

    def spawn(self, now: float, intent: str = "by hand") -> None:
        """Start its processes; it answers after `load_s`."""
        number = len(self.starts) + 1
        self.starts.append(intent)
        root = 1000 * number + 10 * (len(self.name) + sum(map(ord, self.name)))
        self.procs = (
            Proc(pid=root, start_ticks=number, role="server"),
            Proc(pid=root + 1, start_ticks=number, role="scheduler"),
        )
        self.version, self.stopped, self.frozen, self.paused = self.base_version, False, False, False
        self.mute = self.storm = self.refuses = self.unhealthy = False
        self.listens = True
        self.weights = None
        self.tokens, self.running, self.serving_from = 0, 0, now + self.load_s

    def up(self, now: float) -> bool:
        """Whether its port answers."""
        return self.listens and bool(self.procs) and now >= self.serving_from

    def look(self, now: float) -> WeightsLook:
        """What its weights show of themselves."""
        if not self.generates(now):
            return WeightsLook(server=self.name)
        true = self.weights or self.version or ""
        return WeightsLook(
            server=self.name,
            version=self.version,
            checksum=f"sum of {true}" if self.sums else None,
            layout="one",
            greedy=(GreedyToken(token=7, log_prob=_share(true)),),
        )

    def generates(self, now: float) -> bool:
        """Whether a request gets tokens."""
        answers = self.up(now) and not (self.mute or self.storm or self.refuses)
        return answers and self.can_generate and self.turns(now) and not self.paused

    def turns(self, now: float) -> bool:
        """Whether its scheduler's loop turns."""
        return self.up(now) and not (self.stopped or self.frozen)

    def work(self, now: float, tick_s: float = TICK_S, *, rollouts: bool) -> None:
        """A tick of its own time: requests come, tokens go, snapshots are made."""
        if self.load:
            ended = self.paused and self.pause_mode == "abort"
            self.running = self.load if rollouts and not ended else 0
        moves = self.chunk_s == 0.0 or now % self.chunk_s < tick_s
        if self.load and self.running and self.generates(now) and moves:
            self.tokens += int(self.rate * max(tick_s, self.chunk_s))
        if self.turns(now) and not self.paused and moves:
            self.stamp = now

    def probed(self, now: float) -> ServerProbed:
        """The cheap endpoints, as a probe finds them."""
        answer = self._answer(now)
        if answer is not Answer.OK:
            return ServerProbed(server=self.name, ready=answer, model_info=answer, metrics=answer)
        if self.other == "garbled":
            none = Answer.NOT_OFFERED
            return ServerProbed(server=self.name, ready=none, model_info=Answer.BROKEN, metrics=none)
        no = self.paused or self.unhealthy
        metrics = self._offered("metrics", Answer.OK)
        told = metrics is Answer.OK
        return ServerProbed(
            server=self.name,
            ready=self._offered("ready", Answer.UNAVAILABLE if no else Answer.OK),
            model_info=Answer.OK,
            metrics=metrics,
            weight_version=self.version,
            running=(8 if self.frozen and self.waited_for and not self.load else self.running)
            if told
            else None,
            tokens=self.tokens if told else None,
        )

    def opinion(self, now: float) -> SchedulerAsked:
        """What `/server_info` and `/v1/loads` say; the first waits for the scheduler, in vain if need be."""
        answer = self._answer(now)
        if answer is not Answer.OK:
            waited_s = PROBE_TIMEOUT_S if answer is Answer.TIMEOUT else 0.0
            return SchedulerAsked(server=self.name, info=answer, loads=answer, waited_s=waited_s)
        turning = self.turns(now) and (self.chunk_s == 0.0 or now - self.stamp <= TICK_S)
        info = self._offered("server_info", Answer.OK if turning else Answer.TIMEOUT)
        loads = self._offered("loads", Answer.OK)
        return SchedulerAsked(
            server=self.name,
            info=info,
            loads=loads,
            loads_stamp=self.stamp if loads is Answer.OK else None,
            waited_s=PROBE_TIMEOUT_S if info is Answer.TIMEOUT else 0.0,
        )

    def token(self, began: float, now: float) -> GenerationAsked | None:
        """What `/health_generate`, asked at `began`, has answered by now: not in its first second."""
        waited_s = now - began
        answer = self._offered("health", self._answer(now))
        if answer in {Answer.OK, Answer.TIMEOUT}:
            if waited_s < HEALTH_GIVES_UP_S and (waited_s < HEALTH_TAKES_S or not self.generates(now)):
                return None
            answer = Answer.OK if self.generates(now) else Answer.UNAVAILABLE
            self.unhealthy = answer is not Answer.OK
        return GenerationAsked(server=self.name, answer=answer, waited_s=waited_s)

    def _answer(self, now: float) -> Answer:
        """How any request that needs no scheduler ends."""
        if self.other is not None:
            return Answer.OK
        if not self.up(now):
            return Answer.REFUSED
        if self.mute:
            return Answer.TIMEOUT
        return Answer.UNAVAILABLE if self.storm else Answer.OK

    def _offered(self, endpoint: str, answer: Answer) -> Answer:
        return Answer.NOT_OFFERED if endpoint in self.lacks else answer


def _share(weights: str) -> float:
    """A log-probability that other weights hardly have."""
    return -float(sum(index * ord(char) for index, char in enumerate(weights, 1)) % 97)


@dataclass(slots=True, kw_only=True)
class FakeTrainer:
    """
    A trainer with a guard. It obeys what the gate says, at once unless `listens` is False.

    Args:
        version: the weights that it holds and has announced.
        handles_resync, handles_rollback, handles_save: which handlers it registered.
        listens: False in a long step, in which no guard call looks at the gate.
        can_resync: whether its handler succeeds.
        managed: whether Stepguard starts it.
        can_start, can_stop: whether each succeeds.
        guarded: False for one of which only the log is known.
        waits_for: the server whose answers it waits for, and will until it has them.
        stuck: its heartbeat goes on, and nothing else of it moves.

    """

    pid: int = 77
    attempt: int = 0
    step: int = 0
    batch: int = 0
    phase: str = "ROLLOUT"
    version: str | None = "v0"
    beats: int = 0
    acked: int = 0
    handles_resync: bool = True
    handles_rollback: bool = True
    handles_save: bool = True
    listens: bool = True
    can_resync: bool = True
    can_save: bool = True
    managed: bool = False
    can_start: bool = True
    can_stop: bool = True
    guarded: bool = True
    waits_for: str | None = None
    stuck: bool = False
    progress: int = 0
    stopped: bool = False
    dead: bool = False
    starts: list[StartTrainer] = field(default_factory=list)

    @property
    def procs(self) -> tuple[Proc, ...]:
        """Its only process, while it lives."""
        return () if self.dead else (Proc(pid=self.pid, start_ticks=self.pid, role="trainer"),)


class World:
    """
    The run.

    Args:
        servers: names, or fakes.
        mode: shadow, hold or act.
        settings: the core's figures.
        trainer: None for a run whose trainer does not report.
        running: whether the servers were running, with the trainer's weights, before the daemon came.
        target: what a search for a checkpoint finds; None for nothing.
        tick_s: between two ticks of the daemon; the longer, the faster a long run is played.

    """

    def __init__(
        self,
        *servers: str | FakeServer,
        mode: str = "act",
        settings: Settings | None = None,
        trainer: FakeTrainer | None = None,
        running: bool = True,
        target: tuple[int, str] | None = (1, "/checkpoints/1"),
        tick_s: float = TICK_S,
    ) -> None:
        fakes = [one if isinstance(one, FakeServer) else FakeServer(name=one) for one in servers or ("s",)]
        self.servers = {fake.name: fake for fake in fakes}
        self.trainer = FakeTrainer() if trainer is None else trainer
        self.target, self._tick_s = target, tick_s
        self.now = 1000.0
        self.state: State = initial(
            settings or Settings(push_weights=True),
            Mode(mode),
            tuple(Server(name=fake.name, managed=fake.managed, since=self.now) for fake in fakes),
        )
        self.said: list[tuple[float, Command]] = []
        self.asked: list[tuple[float, str, str]] = []
        """When which server was asked by which of the probes that reach its scheduler."""
        self.moves: list[tuple[float, str, ServerState]] = []
        """When which server came into which state."""
        self._asking: set[tuple[str, str]] = set()
        self.promises = Promises()
        self._due: deque[tuple[float, Callable[[], None]]] = deque()
        self._next: dict[str, float] = {}
        if running:
            for fake in fakes:
                fake.spawn(self.now - 60.0 - fake.load_s)
                fake.version = self.trainer.version if fake.version is not None else None
        self.feed(DaemonStarted(gate_order="GO", gate_generation=0))
        self._look()
        if running:
            self.run(3.0)

    # ---- reading ------------------------------------------------------------------------------------

    @property
    def gate(self) -> Gate:
        """What the page says."""
        return self.state.gate

    @property
    def order(self) -> str:
        """The order on the page."""
        return self.state.gate.order.value

    @property
    def fake(self) -> FakeServer:
        """The only server, or the first."""
        return next(iter(self.servers.values()))

    def server(self, name: str | None = None) -> Server:
        """A server as the core knows it."""
        return next(one for one in self.state.servers if name in {None, one.name})

    def all(self, kind: type[C]) -> list[C]:
        """Every command of a kind so far, in order."""
        return [command for _, command in self.said if isinstance(command, kind)]

    def told(self, what: str) -> list[str]:
        """The texts of the notices of a kind so far."""
        return [notice.text for notice in self.all(Notify) if notice.what == what]

    def orders(self) -> list[str]:
        """The orders that were on the page, each change once."""
        found = [write.gate.order.value for write in self.all(PublishGate)]
        return [order for index, order in enumerate(found) if index == 0 or order != found[index - 1]]

    # ---- making things happen -----------------------------------------------------------------------

    def feed(self, event: Event) -> tuple[Command, ...]:
        """One event, decided now; its effects are begun."""
        before = self.state
        state, commands = decide(before, event, self.now)
        self.promises.after(before, event, state, commands, self.now)
        self.state = state
        for old, new in zip(before.servers, state.servers, strict=True):
            if new.state is not old.state:
                self.moves.append((self.now, new.name, new.state))
        for command in commands:
            self.said.append((self.now, command))
            if not isinstance(command, PublishGate | MarkPrompts | Notify):
                self._begin(command)
        return commands

    def run(self, seconds: float, *, until: Callable[[], bool] | None = None) -> bool:
        """
        Let time pass in ticks.

        Args:
            seconds: how long at most.
            until: end as soon as this holds.

        Returns:
            Whether `until` held; True without one.

        """
        end = self.now + seconds
        while until is None or not until():
            if self.now >= end:
                return until is None
            self._tick()
        return True

    def kill(self, name: str | None = None, *, role: str = "scheduler") -> tuple[Command, ...]:
        """SIGKILL one process of a server, as the kernel would tell of it."""
        fake = self.fake if name is None else self.servers[name]
        dead = next(known for known in fake.procs if known.role == role)
        fake.procs = tuple(known for known in fake.procs if known is not dead)
        return self.feed(ProcessExited(server=fake.name, proc=dead))

    def kill_trainer(self, code: int | None = -9, *, goodbye: str | None = None) -> tuple[Command, ...]:
        """The trainer ends, with a word of its guard's before it, or by SIGKILL without one."""
        if goodbye is not None:
            self.feed(TrainerLeft(attempt=self.trainer.attempt, why=goodbye))
        self.trainer.dead = True
        return self.feed(TrainerExited(pid=self.trainer.pid, code=code))

    def ask(self, verb: str, **args: object) -> tuple[Command, ...]:
        """A person's wish."""
        return self.feed(replace(OperatorAsked(verb=verb, who="ada", why="a test"), **args))  # type: ignore[arg-type]

    def batch(
        self,
        reward: float | None = None,
        *,
        failed: int = 0,
        refused: str | None = None,
        began: float | None = None,
        step: int | None = None,
        attempt: int | None = None,
    ) -> bool:
        """
        The trainer asks for a verdict on a batch of 64.

        Args:
            reward: the mean; by default a healthy one.
            failed: how many of the 64 failed.
            refused: the guard's own verdict.
            began: when its rollouts began; now by default.
            step: the step that it is for; the trainer's next by default.
            attempt: the attempt that it is of; the trainer's by default.

        Returns:
            The verdict on the page.

        """
        trainer = self.trainer
        trainer.batch += 1
        number = trainer.step + 1 if step is None else step
        mean = 0.7 + 0.01 * ((number * 7) % 5) if reward is None else reward
        spread = 0.0 < mean < 1.0  # of rewards that are each 0 or 1
        self.feed(
            BatchReported(
                attempt=trainer.attempt if attempt is None else attempt,
                step=number,
                batch=trainer.batch,
                ok=64 - failed,
                failed=failed,
                reward=mean,
                reward_std=(mean * (1.0 - mean)) ** 0.5 if spread else 0.0,
                reward_min=0.0 if spread else mean,
                reward_max=1.0 if spread else mean,
                refused=refused,
                began=self.now if began is None else began,
            )
        )
        return self.gate.judged_ok and self.gate.judged_batch == trainer.batch

    def step(self, reward: float | None = None) -> bool:
        """One whole step: rollouts, the verdict, the optimizer step, new weights on every server that can."""
        if self.order != "GO" or not self.batch(reward):
            return False
        self.commit(reward)
        self.run(1.0)
        return True

    def log(self, reward: float | None = None) -> bool:
        """
        A whole step of a trainer without the guard, and its row in the log.

        Returns:
            Whether it could: no server generates for one whose requests wait.

        """
        if not any(fake.generates(self.now) for fake in self.servers.values()):
            return False
        trainer = self.trainer
        trainer.step += 1
        mean = 0.7 + 0.01 * ((trainer.step * 7) % 5) if reward is None else reward
        if trainer.version is not None:
            trainer.version = f"v{trainer.step}"
        self.publish()
        self.feed(RewardLogged(step=trainer.step, reward=mean))
        self.run(1.0)
        return True

    def commit(self, reward: float | None = None, *, sync: bool = True) -> None:
        """The optimizer step itself; the new weights go to every server at once, or not yet."""
        trainer = self.trainer
        trainer.step += 1
        trainer.version = f"v{trainer.step}"
        if sync:
            self.publish()
        self.feed(
            StepCommitted(
                attempt=trainer.attempt, step=trainer.step, reward=reward, weight_version=trainer.version
            )
        )
        self.see_trainer()

    def publish(self) -> None:
        """The trainer's weights go to every server that takes them."""
        for fake in self.servers.values():
            if fake.up(self.now) and fake.can_load and fake.version is not None:
                fake.version = self.trainer.version
                fake.tokens += 1000

    def restart_trainer(self) -> None:
        """A person starts the trainer again, from what it had."""
        trainer = self.trainer
        trainer.dead = trainer.stopped = False
        trainer.pid, trainer.attempt = trainer.pid + 1, trainer.attempt + 1
        trainer.version = f"v{trainer.step}-{trainer.attempt}"
        self.publish()
        self.see_trainer()

    def steps(self, count: int) -> None:
        """So many healthy steps, every one of which must be let through."""
        for _ in range(count):
            if not self.step():
                raise AssertionError(f"a healthy step was not let through: {self.gate}")

    def see_trainer(self) -> None:
        """Read the trainer's page; that of a dead one says what it last said."""
        trainer = self.trainer
        if not trainer.guarded:
            return
        if not trainer.dead:
            trainer.beats += 1
            trainer.progress += not trainer.stuck
        self.feed(
            TrainerSeen(
                pid=trainer.pid,
                attempt=trainer.attempt,
                step=trainer.step,
                phase="HELD" if self._standing() else trainer.phase,
                beats=trainer.beats,
                progress=trainer.progress,
                acked_generation=trainer.acked,
                weight_version=trainer.version,
                handles_resync=trainer.handles_resync,
                handles_rollback=trainer.handles_rollback,
                handles_save=trainer.handles_save,
            )
        )

    def see_probe(self) -> None:
        """One round of probes, now."""
        self._probe()

    def restart_daemon(self, *, lost: State | None = None) -> None:
        """
        The daemon dies, and another takes up the page and the journal.

        Args:
            lost: the state of the journal, where its last rows did not reach the disk.

        """
        self._due.clear()
        page = self.gate
        self.state = self.state if lost is None else lost
        waiting = [server.repair.intent for server in self.state.servers if server.repair is not None]
        waiting += [one.intent for one in (self.state.rollback, self.state.relaunch) if one is not None]
        waiting += [halt.intent for halt in self.state.halts]
        begun = [
            c
            for _, c in self.said
            if not isinstance(c, PublishGate | MarkPrompts | Notify) and c.intent in waiting
        ]
        self.feed(
            DaemonStarted(
                gate_order=page.order.value,
                gate_generation=page.generation,
                judged_batch=page.judged_batch,
                target_step=page.target_step,
                target_path=page.target_path,
            )
        )
        self._look()
        for effect in begun:
            self._begin(effect)

    # ---- the fakes at work --------------------------------------------------------------------------

    def _tick(self) -> None:
        self.now += self._tick_s
        for fake in self.servers.values():
            fake.work(self.now, self._tick_s, rollouts=self.trainer.phase == "ROLLOUT")
        self._obey()
        while self._due and self._due[0][0] <= self.now:
            self._due.popleft()[1]()
        for name, interval_s, work in (
            ("samples", SAMPLE_S, self._sample),
            ("probes", TICK_S, self._probe),
            ("opinions", PROBE_S, self._ask),
            ("page", PAGE_S, self.see_trainer),
            ("trees", TREE_S, self._look),
        ):
            if self.now >= self._next.get(name, 0.0):
                self._next[name] = self.now + interval_s
                work()
        self.feed(Tick())

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        self._due.append((self.now + seconds, work))
        self._due = deque(sorted(self._due, key=lambda due: due[0]))

    def _end(self, intent: str, ok: bool, detail: str = "", procs: Iterable[Proc] = ()) -> None:
        self.feed(EffectEnded(intent=intent, ok=ok, detail=detail, procs=tuple(procs)))

    def _begin(self, effect: Effect) -> None:
        match effect:
            case StopServer():
                self._later(self.servers[effect.server].stop_s, lambda: self._stop(effect))
            case StartServer():
                self._later(self.servers[effect.server].start_s, lambda: self._start(effect))
            case ContinueServer():
                self._later(0.0, lambda: self._continue(effect))
            case RunCanary():
                self._later(self.servers[effect.server].canary_s, lambda: self._canary(effect))
            case PushWeights():
                self._later(self.servers[effect.server].push_s, lambda: self._push(effect))
            case CompareWeights():
                self._later(0.25, lambda: self._compare(effect))
            case AbortRequests():
                self._later(0.0, lambda: self._abort(effect))
            case PauseGeneration():
                self._later(0.0, lambda: self._pause(effect, True))
            case ContinueGeneration():
                self._later(0.0, lambda: self._pause(effect, False))
            case PrepareRollback():
                self._later(0.25, lambda: self._prepare(effect))
            case StopTrainer():
                self._later(0.25, lambda: self._stop_trainer(effect))
            case StartTrainer():
                self._later(0.25, lambda: self._start_trainer(effect))

    def _stop(self, effect: StopServer) -> None:
        fake = self.servers[effect.server]
        if fake.can_stop:
            fake.procs = ()
        self._end(effect.intent, fake.can_stop, "" if fake.can_stop else "it survives SIGKILL")

    def _start(self, effect: StartServer) -> None:
        fake = self.servers[effect.server]
        if not fake.can_start:
            self._end(effect.intent, False, "it exited at once")
            return
        if effect.intent not in fake.starts:
            fake.spawn(self.now, effect.intent)
        self._end(effect.intent, True, procs=fake.procs)

    def _continue(self, effect: ContinueServer) -> None:
        fake = self.servers[effect.server]
        if fake.cont_helps:
            fake.stopped = False
        self._end(effect.intent, True)

    def _canary(self, effect: RunCanary) -> None:
        fake = self.servers[effect.server]
        if fake.other is not None:
            self._end(effect.intent, False, "another process answers on its port")
            return
        ok = fake.generates(self.now)
        self._end(effect.intent, ok, "" if ok else "no answer")

    def _push(self, effect: PushWeights) -> None:
        fake = self.servers[effect.server]
        ok = fake.can_load and fake.up(self.now)
        if ok and fake.version is not None:
            wrong, fake.wrong_loads = fake.wrong_loads > 0, max(0, fake.wrong_loads - 1)
            fake.version, fake.weights = effect.version, "another model" if wrong else None
        self._end(effect.intent, ok, "" if ok else "it did not load")

    def _compare(self, effect: CompareWeights) -> None:
        names = [effect.server] if effect.other is None else [effect.server, effect.other]
        looks = tuple(self.servers[name].look(self.now) for name in names)
        self.feed(EffectEnded(intent=effect.intent, ok=True, looks=looks))

    def _pause(self, effect: PauseGeneration | ContinueGeneration, paused: bool) -> None:
        fake = self.servers[effect.server]
        ok = fake.up(self.now) and not (fake.mute or fake.storm) and fake.can_pause
        if ok:
            fake.paused = paused
        self._end(effect.intent, ok, "" if ok else "no answer")

    def _abort(self, effect: AbortRequests) -> None:
        """Who waited for an answer gets one, and comes to the gate."""
        if self.trainer.waits_for == effect.server:
            self.trainer.waits_for, self.trainer.listens = None, True
        self._end(effect.intent, True)

    def _prepare(self, effect: PrepareRollback) -> None:
        before = effect.before_step
        if self.target is None or (before is not None and self.target[0] >= before):
            self._end(effect.intent, False, "nothing vets good")
            return
        step, path = self.target
        self.feed(EffectEnded(intent=effect.intent, ok=True, target_step=step, target_path=path))

    def _stop_trainer(self, effect: StopTrainer) -> None:
        ok = self.trainer.can_stop
        self.trainer.dead = self.trainer.dead or ok
        self._end(effect.intent, ok, "" if ok else "it survives SIGKILL")

    def _start_trainer(self, effect: StartTrainer) -> None:
        trainer = self.trainer
        if not trainer.can_start:
            self._end(effect.intent, False, "it exited at once")
            return
        trainer.starts.append(effect)
        trainer.dead, trainer.phase, trainer.listens = False, "ROLLOUT", True
        trainer.pid, trainer.attempt = trainer.pid + 1, trainer.attempt + 1
        trainer.step = effect.target_step or 0
        trainer.version = f"v{trainer.step}-{trainer.attempt}"
        for fake in self.servers.values():
            if fake.up(self.now) and fake.version is not None:
                fake.version = trainer.version
        self._end(effect.intent, True, procs=trainer.procs)

    def _probe(self) -> None:
        """Each server at its own pace: a round without an answer takes until it is given up."""
        for fake in self.servers.values():
            if self.now < self._next.get(fake.name, 0.0):
                continue
            event = fake.probed(self.now)
            took_s = PROBE_TIMEOUT_S if Answer.TIMEOUT in {event.ready, event.model_info} else 0.0
            self._next[fake.name] = self.now + took_s + PROBE_S
            if took_s:
                self._later(took_s, functools.partial(self._told, event))
            else:
                self.feed(event)

    def _told(self, event: Event) -> None:
        self.feed(event)

    def _ask(self) -> None:
        """The second opinion and the request for a token, as the core wants them; one of each at a time."""
        for fake in self.servers.values():
            server = self.server(fake.name)
            if server.doubted and (fake.name, "scheduler") not in self._asking:
                self._begin_asking(fake.name, "scheduler")
                event = fake.opinion(self.now)
                self._later(event.waited_s, functools.partial(self._answered, "scheduler", event))
            if server.health_due and (fake.name, "token") not in self._asking:
                self._begin_asking(fake.name, "token")
                self._await_token(fake, self.now)

    def _begin_asking(self, name: str, what: str) -> None:
        self._asking.add((name, what))
        self.asked.append((self.now, name, what))

    def _answered(self, what: str, event: SchedulerAsked | GenerationAsked) -> None:
        self._asking.discard((event.server, what))
        self.feed(event)

    def _await_token(self, fake: FakeServer, began: float) -> None:
        event = fake.token(began, self.now)
        if event is None:
            self._later(TICK_S, functools.partial(self._await_token, fake, began))
        else:
            self._answered("token", event)

    def _sample(self) -> None:
        for fake in self.servers.values():
            if not fake.procs or not fake.visible:
                continue
            if fake.busy and not fake.stopped:
                fake.cpu_s += max(SAMPLE_S, self._tick_s)
            stopped = tuple(known.pid for known in fake.procs) if fake.stopped else ()
            self.feed(TreeSampled(server=fake.name, stopped=stopped, cpu_s=fake.cpu_s))

    def _look(self) -> None:
        for fake in self.servers.values():
            server = self.server(fake.name)
            stage = None if server.repair is None else server.repair.stage.value
            if stage not in {"stop", "start", "backoff"}:
                self.feed(TreeSeen(server=fake.name, procs=fake.procs if fake.visible else ()))
        if self.trainer.managed and self.state.relaunch is None:
            self.feed(TrainerTree(procs=self.trainer.procs))

    def _standing(self) -> bool:
        reads = self.trainer.listens and self.trainer.guarded
        return reads and not self.trainer.dead and self.gate.order is not GateOrder.GO

    def _obey(self) -> None:
        """A held trainer carries out each order once, and says so."""
        trainer, gate = self.trainer, self.gate
        if trainer.stopped or trainer.dead or not (trainer.listens and trainer.guarded):
            return
        if gate.generation <= trainer.acked:
            return
        trainer.acked = gate.generation
        ok = True
        match gate.order:
            case GateOrder.RESYNC:
                ok = trainer.can_resync
                for fake in self.servers.values():
                    if ok and fake.up(self.now) and fake.version is not None:
                        fake.version, fake.weights = trainer.version, None
            case GateOrder.ROLLBACK:
                trainer.attempt += 1
                trainer.step = gate.target_step or 0
                trainer.version = f"v{trainer.step}-{trainer.attempt}"
            case GateOrder.SAVE:
                ok = trainer.can_save
            case GateOrder.STOP:
                trainer.stopped = True
            case GateOrder.GO | GateOrder.HOLD:
                pass
        self.see_trainer()
        detail = "" if ok else "it said no"
        self.feed(OrderAcknowledged(generation=gate.generation, order=gate.order.value, ok=ok, detail=detail))
