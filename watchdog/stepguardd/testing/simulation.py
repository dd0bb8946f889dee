"""
Days of a run in minutes: healthy steps, faults drawn from a seed, and what the decisions made of them.

`simulate` plays one seed; the same seed and hours give the same day, and `Day.trace` is a hash that says so.
The truth is kept apart from the core: whether a step was taken on garbage is known here by what the servers
did, never by what the core believes of it. Nothing here starts a process, opens a socket or reads a clock.

Not simulated, and so not shown by any of it: what sources read wrong, drivers that hang, disks that lie,
trainers of many ranks.
"""

import hashlib
from dataclasses import dataclass, field, replace
from random import Random

from ..core.breaker import Phase
from ..core.state import Settings
from .promises import BrokenPromise
from .strikes import LASTS, OF_THE_RUN, Rewards, SimFault, Undo, possible, strike
from .world import FakeServer, FakeTrainer, World

ROLLOUTS = 64
FAILED_FRACTION = 0.1
"""Above this share of failed rollouts the guard refuses by itself, as shipped."""
REQUEST_TIMEOUT_S = 600.0
LOOK_S = 0.5
"""Between two looks at everything: what is not told by an event is seen this late at the most."""
QUIET_S = 120.0
"""A hold this long after the last fault was over, with nothing left of it, is a false one."""
PATIENCE_S = 2 * 3600.0
"""Without GO so long after the last fault was over, the run is stuck."""
TOGETHER = 0.25
"""How often a second fault comes while the first one is not over."""


@dataclass(slots=True, kw_only=True)
class Struck:
    """
    A fault, and what came of it. Times are seconds of the run's clock; None is "never".

    Args:
        fault: which.
        server: where; "" for the run as a whole.
        at: when it began.
        over: when its cause was gone: from here on the run may go on.
        alone: no other fault was there before it was over.
        held_s: from its beginning to the first order that was not GO, or to the server being fenced off.
        going_s: from `over`, or from the hold where that is later, until all was well again.
        called: a person was needed.
        garbage_steps: optimizer steps taken on garbage until all was well again.

    """

    fault: SimFault
    server: str
    at: float
    over: float
    alone: bool = True
    held_s: float | None = None
    going_s: float | None = None
    called: bool = False
    garbage_steps: int = 0


@dataclass(slots=True, kw_only=True)
class Day:
    """
    What came of one seed.

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
    person_comes_s: float = 600.0,
    world: type[World] = World,
) -> Day:
    """
    One run of so many hours.

    Args:
        seed: draws the run (servers, times, which faults it knows) and everything that befalls it.
        hours: how long, on the run's clock; a fault at its end is seen through.
        settings: the core's figures; what the seed says of weights and of a managed trainer goes over them.
        faults: which may happen; () for a healthy run. Of more than three a seed leaves some out.
        healthy_s: the mean time between the end of one trouble and the next.
        person_comes_s: how long after a call somebody is there.
        world: what the decisions act on.

    """
    run = _Run(seed, hours, settings or Settings(), faults, world)
    run.healthy_s, run.person_comes_s = healthy_s, person_comes_s
    return run.day()


class _Run:
    def __init__(
        self, seed: int, hours: float, settings: Settings, faults: tuple[SimFault, ...], world: type[World]
    ) -> None:
        self.healthy_s = self.person_comes_s = 600.0
        dice = self._dice = Random(seed)
        count = dice.choice([1, 1, 2, 3, 4, 8])
        push, managed = dice.random() < 0.5, dice.random() < 0.5
        load_s = dice.uniform(5.0, 240.0)
        drawn = tuple(fault for fault in faults if len(faults) <= 3 or dice.random() < 0.7)
        self._faults = drawn or faults
        self._rollout_s, self._train_s = dice.uniform(3.0, 90.0), dice.uniform(1.0, 30.0)
        self._sync_pauses = dice.random() < 0.5
        self._noise = dice.uniform(0.01, 0.05)
        fakes = [FakeServer(name=f"s{n}", load_s=load_s * dice.uniform(0.8, 1.2)) for n in range(count)]
        trainer = FakeTrainer(managed=managed, handles_resync=not push or dice.random() < 0.5)
        settings = replace(settings, push_weights=push, trainer_managed=managed)
        self.world = world(*fakes, settings=settings, trainer=trainer, tick_s=LOOK_S)
        self._day = Day(seed=seed, hours=hours, servers=count)
        self._end = self.world.now + hours * 3600.0
        self._rewards = Rewards()
        self._open: list[tuple[Struck, Undo | None]] = []
        self._next = self.world.now
        self._quiet_from = self.world.now
        self._person_at: float | None = None
        self._saved = [(0, "/checkpoints/0")]

    def day(self) -> Day:
        """Play it."""
        self._next += self._dice.expovariate(1.0 / self.healthy_s)
        try:
            while self.world.now < self._end or self._open:
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
        attempt, began = trainer.attempt, world.now
        failed, stale = self._rolled_out()
        if trainer.dead or trainer.attempt != attempt:
            return
        zeros, too_many = self._rewards.zeros, failed > FAILED_FRACTION * ROLLOUTS
        reward = 0.0 if zeros else self._reward() * (1.0 - failed / ROLLOUTS)
        refused = "stale_weights" if stale else "failed_fraction" if too_many else None
        if not world.batch(reward, failed=failed, refused=refused, began=began):
            self._day.refused += 1
            self._pass(1.0)
            return
        self._in_phase("TRAIN", self._train_s)
        while world.order != "GO" and not (trainer.dead or trainer.stopped):
            self._pass(1.0)
        if trainer.dead or trainer.stopped or trainer.attempt != attempt:
            return
        self._commit(reward, garbage=zeros or stale or too_many, known=stale or too_many)

    def _rolled_out(self) -> tuple[int, bool]:
        """The rollouts of a step: how many failed, and whether any came of old weights."""
        world = self.world
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
            self._pass(LOOK_S)
            waiting = False
            for fake in used:
                if fake.name in lost:
                    continue
                if fake.procs != began_as[fake.name] or not fake.up(world.now):
                    lost.add(fake.name)
                elif fake.generates(world.now):
                    fake.tokens += 200
                else:
                    waiting = True  # a paused, stopped or hung server keeps its requests
        if waiting:
            lost |= {fake.name for fake in used if not fake.generates(world.now)}
        for fake in used:
            fake.running = 0
        failed = ROLLOUTS * len(lost) // len(used) if used else ROLLOUTS
        alive = [fake for fake in used if fake.name not in lost]
        return failed, any(fake.version not in {None, world.trainer.version} for fake in alive)

    def _reward(self) -> float:
        """The share of rollouts that succeed: it climbs, and batches are of unlike difficulty."""
        level = self._dice.gauss(0.7 - 0.5 / (1.0 + self.world.trainer.step / 60.0), self._noise)
        return sum(self._dice.random() < level for _ in range(ROLLOUTS)) / ROLLOUTS

    def _commit(self, reward: float, *, garbage: bool, known: bool) -> None:
        """The optimizer step; `known`: the guard or the core could tell the garbage without a doubt."""
        world, trainer = self.world, self.world.trainer
        self._day.steps += 1
        if garbage:
            for struck, _ in self._open:
                struck.garbage_steps += 1
            if known and world.state.phase is not Phase.SHADOW:
                self._wrong(f"step {trainer.step + 1} was taken on garbage")
        world.commit(reward, sync=False)
        self._in_phase("SYNC", self._dice.uniform(0.5, 5.0), pausing=self._sync_pauses)
        world.publish()
        if trainer.step % 20 == 0 and trainer.step > self._saved[-1][0]:
            self._saved.append((trainer.step, f"/checkpoints/{trainer.step}"))
            world.target = self._saved[-2]

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
            world.run(min(LOOK_S, end - world.now))
            self._watch()
            if self._next <= world.now < self._end:
                self._strike()

    def _strike(self) -> None:
        world, dice = self.world, self._dice
        self._next = self._end
        if not self._faults:
            return
        fault, fake = dice.choice(self._faults), world.servers[dice.choice(sorted(world.servers))]
        if not possible(fault, world, fake):
            self._next = world.now + 1.0
            return
        least, most = LASTS.get(fault, (0.0, 0.0))
        over = world.now + dice.uniform(least, most)
        for other, _ in self._open:
            other.alone = False
        server = "" if fault in OF_THE_RUN else fake.name
        struck = Struck(fault=fault, server=server, at=world.now, over=over, alone=not self._open)
        self._open.append((struck, strike(fault, world, fake, self._rewards, dice)))
        if self._guarded(struck):
            struck.held_s = 0.0  # decided with the very event that told of it
        if len(self._open) == 1 and dice.random() < TOGETHER:
            self._next = world.now + dice.expovariate(1.0 / 60.0)

    def _watch(self) -> None:
        world = self.world
        if not self._open:
            if world.order != "GO" and world.now > self._quiet_from:
                self._wrong(f"a healthy run was held: {world.gate.reason}")
                self._quiet_from = world.now + PATIENCE_S
                world.ask("resume")
            return
        for place, (struck, undo) in enumerate(self._open):
            if struck.held_s is None and self._guarded(struck):
                struck.held_s = world.now - struck.at
            if undo is not None and world.now >= struck.over:
                undo()
                self._open[place] = (struck, None)
        if any(undo is not None for _, undo in self._open):
            return
        if self._well():
            self._settled()
        else:
            self._perhaps_call_a_person()

    def _guarded(self, struck: Struck) -> bool:
        """The run is held, or the server is fenced off."""
        if self.world.order != "GO" or not struck.server:
            return self.world.order != "GO"
        return self.world.server(struck.server).state.value not in {"serving", "planned"}

    def _well(self) -> bool:
        """Everything works again, and the core knows: the run goes on."""
        world = self.world
        if world.order != "GO" or world.trainer.dead:
            return False
        return all(
            server.state.value in {"serving", "planned"}
            and fake.generates(world.now)
            and fake.version in {None, world.trainer.version}
            for server, fake in zip(world.state.servers, world.servers.values(), strict=True)
        )

    def _settled(self) -> None:
        now = self.world.now
        for struck, _ in self._open:
            struck.going_s = now - max(struck.over, struck.at + (struck.held_s or 0.0))
            self._day.struck.append(struck)
        self._open.clear()
        self._person_at = None
        for fake in self.world.servers.values():
            fake.busy = True
        self._quiet_from = now + QUIET_S
        self._next = now + QUIET_S + self._dice.expovariate(1.0 / self.healthy_s)

    def _perhaps_call_a_person(self) -> None:
        """Whoever is called comes after ten minutes, and mends what the core handed over."""
        world, state = self.world, self.world.state
        helpless = world.trainer.stopped or (world.trainer.dead and not world.trainer.managed)
        left_out = [one for one in state.servers if one.state.value in {"dead", "stale"} and not one.repair]
        called = state.trip is not None and state.trip.kind == "called"
        if self._person_at is None and (state.lockout is not None or called or helpless or left_out):
            self._person_at = world.now + self.person_comes_s
        if self._person_at is not None and world.now >= self._person_at:
            for struck, _ in self._open:
                struck.called = True
            self._person_at = world.now + self.person_comes_s
            self._mend()
        last = max(struck.over for struck, _ in self._open)
        if world.now - last > PATIENCE_S:
            states = [server.state.value for server in state.servers]
            names = [struck.fault.value for struck, _ in self._open]
            self._wrong(f"stuck after {names}: {world.order} {world.gate.reason} {states}")
            self._settled()
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
