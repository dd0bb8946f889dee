"""
Days of a run in minutes: healthy steps, faults drawn from a seed, and what the decisions made of them.

`simulate` plays one seed; the same seed and hours give the same day, and `Day.trace` is a hash that says so.
The truth is kept apart from the core: whether a step was taken on garbage is known here by what the servers
did, never by what the core believes of it. Nothing here starts a process, opens a socket or reads a clock.

Not simulated, and so not shown by any of it: what sources read wrong, drivers that hang, disks that lie,
trainers of many ranks. `docs/simulation.md` says what is drawn and from where.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from random import Random

from ..core.breaker import Phase
from ..core.state import Settings
from .promises import BrokenPromise
from .world import FakeServer, FakeTrainer, World

ROLLOUTS = 64
FAILED_FRACTION = 0.1
"""Above this share of failed rollouts the guard refuses by itself, as shipped."""
REQUEST_TIMEOUT_S = 600.0
QUIET_S = 120.0
"""A hold this long after the last fault was over, with nothing left of it, is a false one."""
PATIENCE_S = 2 * 3600.0
"""Without GO or a call to a person so long after a fault is over, the run is stuck."""
PERSON_COMES_S = 600.0


class SimFault(StrEnum):
    """What is done to the run."""

    KILL = "kill"
    PARENT = "parent"
    STOP = "stop"
    FREEZE = "freeze"
    SPIN = "spin"
    DEAF = "deaf"
    MUTE = "mute"
    PAUSE = "pause"
    STALE = "stale"
    NO_START = "no-start"
    NO_LOAD = "no-load"
    ZEROS = "zeros"
    TRAINER = "trainer"
    DAEMON = "daemon"
    PERSON = "person"


STORIES = {
    SimFault.KILL: "a server's scheduler is killed",
    SimFault.PARENT: "a server's first process is killed, the scheduler lives on",
    SimFault.STOP: "a server's processes are stopped, and SIGCONT may not help",
    SimFault.FREEZE: "requests run, no token comes, no CPU is used",
    SimFault.SPIN: "requests run, no token comes, the CPU is busy",
    SimFault.DEAF: "a server's port does not answer for a while",
    SimFault.MUTE: "everything answers but generations, until a restart",
    SimFault.PAUSE: "somebody pauses a server for a while",
    SimFault.STALE: "a server serves the base weights",
    SimFault.NO_START: "the scheduler is killed, and starts fail for a while",
    SimFault.NO_LOAD: "the scheduler is killed, and weights do not load for a while",
    SimFault.ZEROS: "the reward function returns 0 for everything, for a while",
    SimFault.TRAINER: "the trainer is killed",
    SimFault.DAEMON: "Stepguard itself is killed, and started again",
    SimFault.PERSON: "a person pauses the run, and resumes it later",
}

# How long each lasts before it ends by itself, in seconds: the least and the most.
_LASTS: dict[SimFault, tuple[float, float]] = {
    SimFault.DEAF: (2.0, 300.0),
    SimFault.PAUSE: (5.0, 500.0),
    SimFault.STOP: (5.0, 600.0),
    SimFault.NO_START: (10.0, 900.0),
    SimFault.NO_LOAD: (10.0, 900.0),
    SimFault.ZEROS: (60.0, 600.0),
    SimFault.PERSON: (30.0, 900.0),
}


@dataclass(slots=True, kw_only=True)
class Struck:
    """
    A fault, and what came of it. Times are seconds of the run's clock; None is "never".

    Args:
        fault: which.
        server: where.
        at: when it began.
        over: when its cause was gone: the run may go on from here.
        held_s: from its beginning to the first order that was not GO, or to the server being fenced off.
        going_s: from `over`, or from the hold where that is later, until the run went on.
        called: a person was needed.
        garbage_steps: optimizer steps taken on garbage until the run went on.

    """

    fault: SimFault
    server: str
    at: float
    over: float
    held_s: float | None = None
    going_s: float | None = None
    called: bool = False
    garbage_steps: int = 0


@dataclass(slots=True, kw_only=True)
class Day:
    """
    One simulated day.

    `wrong` names whatever must never happen and did: a broken promise, a false hold, a step on garbage that
    could have been known, a run that stays stuck.
    """

    seed: int
    hours: float
    servers: int
    steps: int = 0
    refused: int = 0
    struck: list[Struck] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    trace: str = ""


def simulate(
    seed: int,
    hours: float,
    *,
    settings: Settings | None = None,
    faults: tuple[SimFault, ...] = tuple(SimFault),
    healthy_s: float = 1200.0,
) -> Day:
    """
    One run of so many hours.

    Args:
        seed: draws the run (servers, times, which faults it knows) and everything that befalls it.
        hours: how long, on the run's clock.
        settings: the core's figures; what the seed says of weights and of a managed trainer goes over them.
        faults: which may happen; () for a healthy run.
        healthy_s: the mean time between one fault's end and the next.

    """
    return _Run(seed, hours, settings or Settings(), faults, healthy_s).day()


class _Run:
    def __init__(
        self, seed: int, hours: float, settings: Settings, faults: tuple[SimFault, ...], healthy_s: float
    ) -> None:
        dice = self._dice = Random(seed)
        count = dice.choice([1, 1, 2, 3, 4, 8])
        push = dice.random() < 0.5
        managed = dice.random() < 0.5
        load_s = dice.uniform(5.0, 240.0)
        self._faults = tuple(f for f in faults if len(faults) <= 3 or dice.random() < 0.7) or faults
        self._healthy_s = healthy_s
        self._rollout_s = dice.uniform(3.0, 90.0)
        self._train_s = dice.uniform(1.0, 30.0)
        self._sync_pauses = dice.random() < 0.5
        self._noise = dice.uniform(0.01, 0.05)
        fakes = [FakeServer(name=f"s{n}", load_s=load_s * dice.uniform(0.8, 1.2)) for n in range(count)]
        trainer = FakeTrainer(managed=managed, handles_resync=not push or dice.random() < 0.5)
        settings = replace(settings, push_weights=push, trainer_managed=managed)
        self.world = World(*fakes, settings=settings, trainer=trainer)
        self._end = self.world.now + hours * 3600.0
        self._day = Day(seed=seed, hours=hours, servers=count)
        self._now: Struck | None = None
        self._next = self.world.now + dice.expovariate(1.0 / healthy_s)
        self._quiet_from = self.world.now
        self._zeros = False
        self._stood_since: float | None = None
        self._person_at: float | None = None
        self._undo: Callable[[], None] | None = None
        self._saved = [(0, "/checkpoints/0")]

    def day(self) -> Day:
        try:
            while self.world.now < self._end or self._now is not None:
                self._one_step()
        except BrokenPromise as broken:
            self._day.wrong.append(f"promise: {broken}")
        said = "\n".join(f"{at!r} {command!r}" for at, command in self.world.said)
        self._day.trace = hashlib.sha256(said.encode()).hexdigest()[:16]
        return self._day

    # ---- the trainer --------------------------------------------------------------------------------

    def _one_step(self) -> None:
        """Roll out, ask, train, step, publish: as a trainer with a guard does it."""
        world, trainer = self.world, self.world.trainer
        if trainer.dead or trainer.stopped or world.order != "GO":
            self._pass(1.0)
            return
        attempt = trainer.attempt
        failed, stale = self._rolled_out()
        if trainer.dead or trainer.attempt != attempt:
            return
        zeros = self._zeros
        reward = 0.0 if zeros else self._reward() * (1.0 - failed / ROLLOUTS)
        refused = "stale_weights" if stale else None
        if refused is None and failed > FAILED_FRACTION * ROLLOUTS:
            refused = "failed_fraction"
        if not world.batch(reward, failed=failed, refused=refused, began=self._began):
            self._day.refused += 1
            self._pass(1.0)
            return
        self._in_phase("TRAIN", self._train_s)
        while world.order != "GO" and not (trainer.dead or trainer.stopped):
            self._pass(1.0)
        if trainer.dead or trainer.stopped or trainer.attempt != attempt:
            return
        known = stale or failed > FAILED_FRACTION * ROLLOUTS
        self._committed(reward, garbage=known or zeros, known=known)

    def _rolled_out(self) -> tuple[int, bool]:
        """The rollouts of a step: how many failed, and whether any came of old weights."""
        world = self.world
        self._began = world.now
        # A router leaves out what does not answer; with nothing left, everything fails.
        used = [fake for fake in world.servers.values() if fake.up(world.now)]
        began_as = {fake.name: fake.procs for fake in used}
        world.trainer.phase = "ROLLOUT"
        for fake in used:
            fake.running = ROLLOUTS // len(used)
        lost: set[str] = set()
        until = world.now + self._rollout_s * self._dice.uniform(0.8, 1.3)
        give_up = world.now + REQUEST_TIMEOUT_S
        waiting = False
        while (world.now < until or waiting) and world.now < give_up and not world.trainer.dead:
            self._pass(0.5)
            waiting = False
            for fake in used:
                if fake.name in lost:
                    continue
                if fake.procs != began_as[fake.name]:
                    lost.add(fake.name)
                elif fake.generates(world.now):
                    fake.tokens += 200
                elif fake.up(world.now):
                    waiting = True  # a paused, stopped or hung server keeps its requests
                else:
                    lost.add(fake.name)
        if waiting:
            lost |= {fake.name for fake in used if not fake.generates(world.now)}
        for fake in used:
            fake.running = 0
        failed = ROLLOUTS * len(lost) // len(used) if used else ROLLOUTS
        alive = [fake for fake in used if fake.name not in lost]
        return failed, any(fake.version not in {None, world.trainer.version} for fake in alive)

    def _reward(self) -> float:
        level = 0.7 - 0.5 / (1.0 + self.world.trainer.step / 60.0)
        return min(1.0, max(0.0, self._dice.gauss(level, self._noise)))

    def _committed(self, reward: float, *, garbage: bool, known: bool) -> None:
        world, trainer = self.world, self.world.trainer
        self._day.steps += 1
        if garbage:
            if self._now is not None:
                self._now.garbage_steps += 1
            if known and world.state.phase is not Phase.SHADOW:
                self._wrong(f"step {trainer.step + 1} was taken on garbage")
        world.commit(reward, sync=False)
        self._in_phase("SYNC", self._dice.uniform(0.5, 5.0), pausing=self._sync_pauses)
        world.publish()
        if trainer.step % 20 == 0 and (trainer.step, f"/checkpoints/{trainer.step}") not in self._saved:
            self._saved.append((trainer.step, f"/checkpoints/{trainer.step}"))
            world.target = self._saved[-2] if len(self._saved) > 1 else self._saved[-1]

    def _in_phase(self, phase: str, seconds: float, *, pausing: bool = False) -> None:
        paused = [fake for fake in self.world.servers.values() if pausing and not fake.paused]
        for fake in paused:
            fake.paused = True
        self.world.trainer.phase = phase
        self._pass(seconds)
        self.world.trainer.phase = "ROLLOUT"
        for fake in paused:
            fake.paused = False

    # ---- time, faults, and what is seen of them -----------------------------------------------------

    def _pass(self, seconds: float) -> None:
        """Let time pass in small pieces, with an eye on everything."""
        world = self.world
        end = world.now + seconds
        while world.now < end:
            world.run(min(0.5, end - world.now))
            self._watch()
            if self._now is None and world.now >= self._next and world.now < self._end:
                self._strike()

    def _watch(self) -> None:
        world, struck = self.world, self._now
        if struck is None:
            if world.order != "GO" and world.now > self._quiet_from:
                self._wrong(f"a healthy run was held: {world.gate.reason}")
                self._quiet_from = world.now + PATIENCE_S
                world.ask("resume")
            return
        if self._undo is not None and world.now >= struck.over:
            self._undo()
            self._undo = None
        if struck.held_s is None and self._guarded(struck):
            struck.held_s = world.now - struck.at
        if self._undo is None and self._well():
            struck.going_s = world.now - max(struck.over, struck.at + (struck.held_s or 0.0))
            self._over()
            return
        self._perhaps_call_a_person(struck)

    def _guarded(self, struck: Struck) -> bool:
        """The run is held, or the server is fenced off."""
        server = self.world.server(struck.server)
        return self.world.order != "GO" or server.state.value not in {"serving", "planned"}

    def _well(self) -> bool:
        """Everything works again, and the core knows: the run goes on."""
        world = self.world
        if world.order != "GO" or world.trainer.dead:
            return False
        served = all(s.state.value in {"serving", "planned"} for s in world.state.servers)
        return served and all(
            fake.generates(world.now) and fake.version in {None, world.trainer.version}
            for fake in world.servers.values()
        )

    def _over(self) -> None:
        struck = self._now
        if struck is not None:
            self._day.struck.append(struck)
        self._now, self._person_at = None, None
        for fake in self.world.servers.values():
            fake.busy = True
        self._quiet_from = self.world.now + QUIET_S
        self._next = self.world.now + QUIET_S + self._dice.expovariate(1.0 / self._healthy_s)

    def _perhaps_call_a_person(self, struck: Struck) -> None:
        """Whoever is called comes after ten minutes, and mends what the core handed over."""
        world, state = self.world, self.world.state
        called = state.lockout is not None or (state.trip is not None and state.trip.kind != "unknown")
        called = called or world.trainer.stopped
        called = called or (world.trainer.dead and not world.trainer.managed)
        if self._undo is None and called and not struck.called:
            struck.called, self._person_at = True, world.now + PERSON_COMES_S
        if self._person_at is not None and world.now >= self._person_at:
            self._person_at = world.now + PERSON_COMES_S
            self._mend()
        if world.now - struck.over > PATIENCE_S:
            states = [server.state.value for server in state.servers]
            self._wrong(f"stuck after {struck.fault.value}: {world.order} {world.gate.reason} {states}")
            self._over()
            self._mend()

    def _mend(self) -> None:
        """A person's hand: what is dead is started, what is broken is restarted, the run is let go."""
        world, trainer = self.world, self.world.trainer
        if trainer.dead or trainer.stopped:
            world.restart_trainer()
        for server in world.state.servers:
            if server.state.value not in {"serving", "planned"}:
                world.ask("restart-server", server=server.name)
        world.ask("resume")

    def _wrong(self, what: str) -> None:
        self._day.wrong.append(f"{what}; seed {self._day.seed} at {self.world.now:.2f} s")

    def _strike(self) -> None:
        if not self._faults:
            self._next = self._end
            return
        world, dice = self.world, self._dice
        fault = dice.choice(self._faults)
        fake = world.servers[dice.choice(sorted(world.servers))]
        least, most = _LASTS.get(fault, (0.0, 0.0))
        struck = Struck(
            fault=fault, server=fake.name, at=world.now, over=world.now + dice.uniform(least, most)
        )
        self._now = struck
        self._undo = lambda: None
        match fault:
            case SimFault.KILL:
                world.kill(fake.name)
            case SimFault.PARENT:
                world.kill(fake.name, role="server")
            case SimFault.STOP:
                fake.stopped, fake.cont_helps = True, dice.random() < 0.5
                self._undo = lambda: self._set(fake, stopped=False, cont_helps=True)
            case SimFault.FREEZE:
                fake.frozen, fake.busy = True, False
            case SimFault.SPIN:
                fake.frozen = True
            case SimFault.DEAF:
                fake.listens = False
                self._undo = lambda: self._set(fake, listens=True)
            case SimFault.MUTE:
                fake.frozen = True
            case SimFault.PAUSE:
                fake.paused = True
                self._undo = lambda: self._set(fake, paused=False)
            case SimFault.STALE:
                fake.version = "base"
            case SimFault.NO_START:
                fake.can_start = False
                self._undo = lambda: self._set(fake, can_start=True)
                world.kill(fake.name)
            case SimFault.NO_LOAD:
                fake.can_load, world.trainer.can_resync = False, False
                self._undo = lambda: self._loads(fake)
                world.kill(fake.name)
            case SimFault.ZEROS:
                self._zeros = True
                self._undo = self._no_zeros
            case SimFault.TRAINER:
                world.kill_trainer()
            case SimFault.DAEMON:
                world.restart_daemon()
            case SimFault.PERSON:
                world.ask("pause")
                self._undo = self._resumed
        self._quiet_from = world.now

    @staticmethod
    def _set(fake: FakeServer, **values: bool) -> None:
        for name, value in values.items():
            setattr(fake, name, value)

    def _loads(self, fake: FakeServer) -> None:
        fake.can_load, self.world.trainer.can_resync = True, True

    def _no_zeros(self) -> None:
        self._zeros = False

    def _resumed(self) -> None:
        self.world.ask("resume")
