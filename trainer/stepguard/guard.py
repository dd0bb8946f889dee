"""
The guard: what a training loop calls around each batch and each optimizer step.

Promise: only StopRequested and RollbackRequested leave a guard call, besides the caller's own cancellation
and errors of use (TypeError, ValueError). Page, socket, disk and daemon may be missing or broken: the guard
goes on as its settings say, and says so once, under the logger "stepguard".

Not promised: rescue of a call that never comes back. The guard acts between the caller's calls, never
inside them.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

from stepguard import isolation
from stepguard.admission import Admission, Refusal, Tally, Verdict, judge, refusal, shaped, total
from stepguard.calls import CallFailed, CallFailure, CallOk, Fate, actor_end, bounded_call
from stepguard.cgroups import OwnKills
from stepguard.fuse import AT_ONCE_S, Blown, CallFuse
from stepguard.gate import SEQUENCE_WORD, STEP_PHASE_WORD, Phase
from stepguard.link import Link, OnceLog
from stepguard.obedience import Obedience, Waits
from stepguard.orders import Go, RollbackRequested, StopRequested
from stepguard.presence import Presence, whole_number
from stepguard.prompts import KEYS_MAX, QUARANTINE_FILE, key_of, turns
from stepguard.prompts import read as read_marked
from stepguard.ranks import Broadcast, Collect, Ranks
from stepguard.reports import Batch, number, numbers
from stepguard.settings import GuardSettings
from stepguard.streak import RequestStreak
from stepguard.verdict import Jury

T = TypeVar("T")

RUN_DIR_VARIABLE: Final = "STEPGUARD_RUN_DIR"
_PASSING: Final = (StopRequested, RollbackRequested)
_ANNOUNCED_MAX: Final = 64
_TRAIN: Final = Phase.TRAIN  # looking it up on the enum costs as much as the clock


class Guard:
    """
    The guard of one training process.

    Args:
        run_dir: where the daemon's page and socket are; None: no gate and no reports, all calls still work.
        settings: in place of `<run_dir>/guard.json`.
        rank: this process among the trainer's ranks; rank 0 alone reads the page and reports.
        world: how many ranks.
        broadcast: called on all ranks alike; takes rank 0's value (None elsewhere) and returns it on every
        rank,
            over a CPU group. With it `admit` and `before_step` are collective, and orders are obeyed there
            alone.
        collect: called on all ranks alike; takes each rank's value and returns all of them, rank by rank.
        Without
            it rank 0's share of a batch speaks for the whole.
        clock_ns: CLOCK_MONOTONIC.
        sleep: waits in synchronous calls.
        async_sleep: waits in `gather`; asyncio's by default.
        heartbeat_s: how often a thread beats; None: no thread, call `beat`.
        boot_id: 16 bytes, for tests; the kernel's by default.

    """

    def __init__(
        self,
        run_dir: Path | str | None = None,
        *,
        settings: GuardSettings | None = None,
        rank: int = 0,
        world: int = 1,
        broadcast: Broadcast | None = None,
        collect: Collect | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
        async_sleep: Callable[[float], Awaitable[None]] | None = None,
        heartbeat_s: float | None = 1.0,
        boot_id: bytes | None = None,
    ) -> None:
        place = Path(run_dir) if run_dir is not None and rank == 0 else None
        self._logger = logging.getLogger("stepguard")
        self._log = OnceLog(self._logger)
        self._failures = isolation.FailureLog(self._logger)
        self._fuse = CallFuse()
        self._streak = RequestStreak(self._tell_streak)
        self._mass_told_s: float | None = None
        self._clock_ns = clock_ns
        self._sleep = sleep
        self._async_sleep = async_sleep
        self._ranks = Ranks(rank=rank, world=world, broadcast=broadcast, collect=collect)
        self._run_dir = place
        self._link = Link(place, log=self._log, boot_id=boot_id)
        self._presence = Presence(self._link)
        self._announced: list[str] = []
        self._announcements = 0
        self._batch = 0
        self._refused: str | None = None
        self._gathers = 0
        self._began_s: float | None = None
        self._admitted_s: float | None = None
        self._obedience = Obedience(
            place,
            link=self._link,
            presence=self._presence,
            ranks=self._ranks,
            settings=settings,
            clock_ns=clock_ns,
            logger=self._logger,
            log=self._log,
            on_rollback=self._void,
        )
        self._kills: OwnKills | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        if place is not None:
            atexit.register(self._at_exit)
        if place is not None and heartbeat_s is not None:
            self._thread = threading.Thread(
                target=self._beat_on, args=(heartbeat_s,), name="stepguard-heartbeat", daemon=True
            )
            self._thread.start()
        if world > 1 and broadcast is None and run_dir is not None:
            self._log.once(
                "no broadcast",
                "%d ranks and no broadcast: rank 0 obeys alone, the others wait in their next collective;"
                " pass Guard(broadcast=...)",
                world,
            )

    @classmethod
    def from_env(cls, *, broadcast: Broadcast | None = None, collect: Collect | None = None) -> Guard:
        """The guard that STEPGUARD_RUN_DIR asks for, of this rank by RANK and WORLD_SIZE."""
        return cls(
            os.environ.get(RUN_DIR_VARIABLE) or None,
            rank=whole_number(os.environ.get("RANK"), 0),
            world=whole_number(os.environ.get("WORLD_SIZE"), 1),
            broadcast=broadcast,
            collect=collect,
        )

    def on_resync(self, handler: Callable[[], object]) -> None:
        """Call `handler()` on every rank when a server came back and needs the weights; a plain function."""
        self._obedience.handle("resync", _plain("on_resync", handler))

    def on_rollback(self, handler: Callable[[str | None, int | None], object]) -> None:
        """Call `handler(path, step)` on every rank to load that checkpoint in place; a plain function."""
        self._obedience.handle("rollback", _plain("on_rollback", handler))

    def on_save(self, handler: Callable[[], object]) -> None:
        """Call `handler()` on every rank to save a checkpoint before a stop; a plain function."""
        self._obedience.handle("save", _plain("on_save", handler))

    async def gather(
        self, items: Iterable[Any], *, fanout: int | None = None, prompts: Sequence[Any] | None = None
    ) -> list[Any]:
        """
        Await all rollouts, each on its own; while HOLD, wait before the first starts.

        Args:
            items: awaitables, or lists of them to any depth.
            fanout: how many members a failed one counts as, where it cannot be told from the others (see
                `isolation.gather`).
            prompts: what each top-level item asks for, the same at every try: an index of the data set, or
                the text. With them a prompt that kills the server is found and withheld; see
                `stepguard.prompts`. Coroutines alone can be withheld: a task runs already.

        Returns:
            Shaped as the items: each one's result, or `Aborted(exception)`.

        Raises:
            StopRequested: ordered; nothing was started.
            RollbackRequested: ordered; nothing was started.
            TypeError: an item cannot be awaited; nothing was started.
            ValueError: as many prompts as items are needed.

        """
        items = list(items)
        try:
            if prompts is not None and len(prompts) != len(items):
                raise ValueError(f"gather: {len(prompts)} prompts for {len(items)} items")
            await self._drive_async(self._obedience.orders())
        except BaseException:
            isolation.abandon(items)
            raise
        self._gathers += 1
        began_s = self._clock_ns() / 1e9
        self._presence.enter(Phase.ROLLOUT)
        try:
            send = functools.partial(
                isolation.gather,
                items,
                fanout=fanout,
                passing=_PASSING,
                log=self._failures,
                on_done=self.trajectory_ended,
            )
            return await (send() if prompts is None else self._in_turns(send, prompts))
        finally:
            self._gathers -= 1
            self._began_s = began_s if self._began_s is None else min(began_s, self._began_s)
            if self._gathers == 0:
                self._presence.enter(Phase.REWARD)

    async def _in_turns(self, send: Callable[..., Awaitable[list[Any]]], prompts: Sequence[Any]) -> list[Any]:
        """Send a batch as the files say: the quarantined not at all, suspects after the others in waves."""
        keys = [key_of(prompt) for prompt in prompts]
        order = turns(keys, read_marked(self._run_dir))
        if order.withheld:
            names = ", ".join(dict.fromkeys(keys[at] for at in order.withheld))
            self._log.once(f"withheld {names}", "withheld, as the file %s says: %s", QUARANTINE_FILE, names)
        began_s = self._clock_ns() / 1e9

        async def ended(wave: int, failed: Sequence[int]) -> bool:
            nonlocal began_s
            answered = set(order.waves[wave]) - set(failed) if wave else ()
            if failed:  # by then the daemon has seen what became of the server
                await self._wait(self._obedience.settings.verdict_timeout_s)
            if failed or answered:
                self._link.send(
                    {
                        "v": 1,
                        "kind": "rollouts_lost",
                        "attempt": self._presence.attempt,
                        "began": number(began_s),
                        "lost": list(dict.fromkeys(keys[at] for at in failed))[:KEYS_MAX],
                        "answered": sorted({keys[at] for at in answered} - {keys[at] for at in failed}),
                    }
                )
            began_s = self._clock_ns() / 1e9
            return not failed or isinstance(self._obedience.next_act(), Go)

        return await send(turns=order, on_wave=ended)

    @contextlib.contextmanager
    def rollouts(self, step: int) -> Iterator[None]:
        """
        Around the rollouts of a batch that `gather` does not await; while HOLD, waits before they start.

        Collective where ranks decide together: every rank rolls out.

        Args:
            step: the step that the batch is for.

        Raises:
            StopRequested: ordered; the body did not run.
            RollbackRequested: ordered; the body did not run.

        """
        self._presence.at(step)
        self._drive(self._obedience.orders(collective=True))
        began_s = self._clock_ns() / 1e9
        self._presence.progressed()
        self._presence.enter(Phase.ROLLOUT)
        try:
            yield
        finally:
            self._began_s = began_s if self._began_s is None else min(began_s, self._began_s)
            self._presence.progressed()
            self._presence.enter(Phase.REWARD)

    def admit(
        self,
        step: int,
        outcomes: Sequence[Any],
        *,
        group_ids: Any = None,
        rewards: Any = None,
        weight_versions: Any = None,
        divisible_by: int = 1,
    ) -> Admission:
        """
        Ask whether this batch may be trained on; blocks while the daemon judges it, and while HOLD.

        Args:
            step: the step it is for.
            outcomes: what `gather` returned, or anything of that shape.
            group_ids: one a member, or one a top-level item; without it lists at the top level are groups.
            rewards: the same; numbers or None, a tensor is fine. What failed is masked, never 0.
            weight_versions: the same; the versions that the rollouts were generated with, None where unknown.
            divisible_by: the mask keeps a multiple of this many members (ranks).

        Raises:
            StopRequested: ordered, or held for longer than `orphan_hold_s` with nobody to lift it.
            RollbackRequested: ordered; the batch is void.
            ValueError: a sequence fits neither the members nor the top-level items.

        """

        def judged() -> tuple[Verdict, Tally, Refusal | None]:
            verdict = judge(
                outcomes,
                group_ids=group_ids,
                rewards=rewards,
                weight_versions=weight_versions,
                announced=self._announced,
                max_staleness=self._obedience.settings.max_staleness,
                divisible_by=divisible_by,
            )
            tally = total(self._ranks.gathered(verdict.tally))
            return verdict, tally, refusal(tally, self._obedience.settings.max_failed_fraction)

        self._presence.at(step)
        self._presence.progressed()
        self._drive(self._obedience.orders(collective=True))
        announcements = self._announcements
        verdict, tally, refused = judged()
        self._count(tally)
        answer = self._drive(self._jury(tally, refused).verdict())
        self._note_refusal(refused)
        self._drive(self._obedience.orders(collective=True))
        if refused is None and self._announcements != announcements:
            verdict, tally, refused = judged()
        reason = self._ranks.share(answer.refused if refused is None else refused.value)
        self._refused = reason
        # Without `gather` nobody says when rollouts begin: those of the next batch, not before this moment.
        self._admitted_s = self._clock_ns() / 1e9
        if reason is not None:
            self._obedience.go_sequence = -1
            self._logger.warning("the batch of step %s is refused: %s", step, reason)
        return Admission(
            ok=reason is None,
            reason=reason,
            items=list(outcomes),
            mask=shaped(verdict.mask, outcomes),
            rewards=None if verdict.rewards is None else list(verdict.rewards),
            group_ids=None if verdict.group_ids is None else list(verdict.group_ids),
        )

    def before_step(self, step: int) -> None:
        """
        The gate before an optimizer step: returns on GO, blocks while HOLD.

        Raises:
            StopRequested: ordered, or held for longer than `orphan_hold_s` with nobody to lift it.
            RollbackRequested: ordered; the batch in hand is void.

        """
        gate = self._obedience
        if gate.words[SEQUENCE_WORD] != gate.go_sequence or self._clock_ns() >= gate.go_until_ns:
            self._before_step_slowly(step)
        presence = self._presence
        presence.step = step
        presence.phase = _TRAIN
        presence.progress += 1  # on the page with the next beat or call: a store here would cost a tenth more
        try:
            self._link.out_words[STEP_PHASE_WORD] = (
                step + 1
            ) << 8 | 3  # Phase.TRAIN, in one word as `step_phase_word` does
        except (TypeError, ValueError, OverflowError):
            presence.at(step)
            presence.enter(Phase.TRAIN)

    def after_step(
        self,
        step: int,
        *,
        reward: Any = None,
        metrics: Mapping[str, Any] | None = None,
        weight_version: str | int | None = None,
    ) -> None:
        """
        Report a committed step; then obey, as every guard call does.

        Args:
            step: the step.
            reward: its mean reward, a number or a tensor with one element; NaN is said, None is unknown.
            metrics: numbers worth watching, such as the gradient norm; other entries are left out.
            weight_version: the version that servers now generate with, announced as by `weights`.

        Raises:
            StopRequested: ordered.
            RollbackRequested: ordered.

        """
        self._presence.at(step)
        if weight_version is not None:
            self._announce(str(weight_version))
        value = _real(reward)
        if value is not None:
            self._presence.last_reward = value
        self._presence.phase = Phase.UNKNOWN
        self._presence.progressed()
        self._presence.show()
        self._link.send(
            {
                "v": 1,
                "kind": "step",
                "attempt": self._presence.attempt,
                "step": self._presence.step or 0,
                "reward": None if value is None else number(value),
                "metrics": numbers(metrics or {}),
                "weight_version": None if weight_version is None else str(weight_version),
            }
        )
        self._drive(self._obedience.orders())

    def saved(self, step: int, path: Path | str, *, norms: Mapping[str, Any] | None = None) -> None:
        """Report a checkpoint; `norms` are parameter norms, the trainer's own proof that it is finite."""
        self._presence.progressed()
        self._link.send(
            {
                "v": 1,
                "kind": "saved",
                "attempt": self._presence.attempt,
                "step": max(0, whole_number(step, 0)),
                "path": str(path),
                "norms": None if norms is None else numbers(norms),
            }
        )

    def weights(self, version: str | int) -> None:
        """Announce the version that servers generate with from now on; on every rank."""
        self._announce(str(version))
        self._presence.show()

    async def call(
        self, awaitable: Awaitable[T], *, timeout_s: float, what: str = "", or_kill: Any = None
    ) -> CallOk[T] | CallFailed:
        """
        Await anything for a bounded time.

        Args:
            awaitable: a coroutine, a future, a Ray object reference.
            timeout_s: how long.
            what: a name for the report of a failure.
            or_kill: the handle of the Ray actor that was called, or a plain function that ends whatever was.
                Where the call hangs on for a second after its time, once cancelled, it is killed. Where too
                many such calls hang at once, nothing is killed and the run is held: see `fuse`.

        Returns:
            The value, or how it failed and what became of the actor; an actor's end takes seconds at most.

        Raises:
            TypeError: `or_kill` is neither; nothing was awaited.

        """
        if or_kill is None:
            answer = await bounded_call(awaitable, timeout_s=timeout_s, passing=_PASSING)
        else:
            answer = await self._call_or_kill(awaitable, timeout_s, what, or_kill)
        self._presence.progressed()
        if isinstance(answer, CallFailed):
            name = what or type(awaitable).__name__
            self._failures.note(answer.exception, f"the call {name!r}")
            error = answer.kind.value if answer.fate is None else f"{answer.kind.value}, {answer.fate.value}"
            self._link.send(
                {
                    "v": 1,
                    "kind": "call_failed",
                    "attempt": self._presence.attempt,
                    "what": name,
                    "error": error,
                }
            )
        return answer

    async def _call_or_kill(
        self, awaitable: Awaitable[T], timeout_s: float, what: str, doomed: Any
    ) -> CallOk[T] | CallFailed:
        try:
            end = actor_end(doomed)
        except TypeError:
            isolation.abandon([awaitable])
            raise
        actor = hash(doomed) if isinstance(doomed, Hashable) else id(doomed)
        number = self._fuse.begun(self._clock_ns() / 1e9, actor)
        hung = False
        try:
            answer = await bounded_call(awaitable, timeout_s=timeout_s, passing=_PASSING)
            gone = isinstance(answer, CallFailed) and end.gone(answer.exception)
            hung = gone or (isinstance(answer, CallFailed) and answer.kind is CallFailure.TIMEOUT)
        finally:
            self._fuse.ended(number, self._clock_ns() / 1e9, hung=hung)
        if not hung or not isinstance(answer, CallFailed):
            return answer
        # A while, in which the others of a mass run out of time as well.
        ended = await end.ends_when_cancelled(awaitable)
        blown = self._fuse.blown(self._obedience.settings.max_failed_fraction, self._clock_ns() / 1e9)
        if blown is not None:
            self._too_many_hung(blown, what or type(awaitable).__name__)
        if gone:
            fate = Fate.GONE
        elif ended:
            fate = Fate.ENDED
        else:
            fate = Fate.SPARED if blown is not None else await end.kill()
        return dataclasses.replace(answer, fate=fate)

    def _too_many_hung(self, blown: Blown, what: str) -> None:
        """Tell the daemon, which holds the run; without one the guard does, unless it is to hold nothing."""
        now_s = self._clock_ns() / 1e9
        if self._mass_told_s is not None and now_s < self._mass_told_s + AT_ONCE_S:
            return
        self._mass_told_s = now_s
        self._logger.error(
            "%d of %d calls hung at once (the last: %s): no actor is killed, the run is to be held",
            blown.failed,
            blown.calls,
            what,
        )
        told = self._link.send(
            {
                "v": 1,
                "kind": "calls_hung",
                "attempt": self._presence.attempt,
                "what": what,
                "failed": blown.failed,
                "calls": blown.calls,
            }
        )
        if not (told and self._obedience.daemon_lives()) and self._obedience.settings.max_failed_fraction < 1:
            self._obedience.hold_by_itself("calls_hung")

    def phase(self, phase: Phase) -> contextlib.AbstractContextManager[None]:
        """Say what the loop does from now on; as a context manager, until it is left."""
        before = self._presence.phase
        self._presence.progressed()
        self._presence.enter(phase)
        return self._until_left(before)

    def trajectory_ended(self, error: BaseException | None) -> None:
        """One trajectory that `gather` does not await ended, with this error or with none."""
        self._presence.progressed()
        self._streak.ended(error)

    @property
    def attempt(self) -> int:
        """Counts rollbacks and relaunches."""
        return self._presence.attempt

    @property
    def settings(self) -> GuardSettings:
        """What the guard goes by."""
        return self._obedience.settings

    @property
    def reports_dropped(self) -> int:
        """Reports that did not go."""
        return self._link.dropped

    def beat(self) -> None:
        """One heartbeat, and a look for a page that a restarted daemon put in place; the thread calls it."""
        self._presence.beat()
        self._obedience.refresh()
        self._obedience.say_hello()
        self._tell_kills()

    def skips(self, step: int) -> bool:
        """
        Whether the batch of this step is to be left out: the run died in it twice.

        A loop that asks takes the next batch of its data instead, the same way every time it comes here.
        """
        return whole_number(step, -1) in self._obedience.settings.skip_steps

    def close(self, error: BaseException | None = None) -> None:
        """
        Say goodbye and let go of the page; the guard's calls go on as without a daemon.

        Without a goodbye the end of the process is a death, and a trainer that the daemon starts is started
        again. The interpreter's own end says it too.

        Args:
            error: what ended the training, where it did not come to its end.

        """
        atexit.unregister(self._at_exit)
        self._say_bye(error)
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=2.0)
        self._presence.enter(Phase.UNKNOWN)
        self._obedience.close()

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def _at_exit(self) -> None:
        """The interpreter ends: after an error that nobody caught, or because its work is done."""
        if os.getpid() == self._pid:  # a fork has the guard of its parent, and no say in it
            self.close(getattr(sys, "last_exc", None) or getattr(sys, "last_value", None))

    def _say_bye(self, error: BaseException | None) -> None:
        why: Literal["finished", "stopped", "failed"]
        if isinstance(error, (StopRequested, KeyboardInterrupt)) or (
            error is None and self._obedience.stopped
        ):
            why = "stopped"
        else:
            why = "finished" if error is None else "failed"
        self._link.send(
            {
                "v": 1,
                "kind": "bye",
                "attempt": self._presence.attempt,
                "pid": os.getpid(),
                "why": why,
                "detail": "" if error is None else f"{type(error).__name__}: {error}"[:500],
            }
        )

    def _tell_kills(self) -> None:
        """What the kernel killed beside this process: a dead worker of a loader, a rank, a helper."""
        if self._kills is None:
            self._kills = OwnKills()
        new = self._kills.look()
        if new is None or not self._link.has_page:
            return
        assert self._kills.cgroup is not None
        sent = self._link.send(
            {
                "v": 1,
                "kind": "memory",
                "attempt": self._presence.attempt,
                "cgroup": self._kills.cgroup.name,
                "identity": self._kills.identity or 0,
                "total": self._kills.total or 0,
                "new": new,
            }
        )
        if sent:
            self._kills.told()

    def _before_step_slowly(self, step: int) -> None:
        self._presence.at(step)
        self._drive(self._obedience.orders(collective=True))
        if self._refused is not None:
            self._log.once(
                f"refused {step}",
                "step %s is taken on a batch that was refused (%s): roll out again when not admission.ok",
                step,
                self._refused,
                level=logging.ERROR,
            )

    def _jury(self, tally: Tally, refused: Refusal | None) -> Jury:
        seen = self._obedience.seen
        self._batch = max(self._batch, 0 if seen is None else seen.judged_batch) + 1
        report: Batch = {
            "v": 1,
            "kind": "batch",
            "attempt": self._presence.attempt,
            "step": self._presence.step or 0,
            "batch": self._batch,
            "ok": tally.ok,
            "failed": tally.failed,
            "dropped_groups": tally.dropped_groups,
            "reward": tally.rewards.stats(),
            "weight_versions": dict(tally.weight_versions),
            "stale": tally.stale,
            "refused": None if refused is None else refused.value,
            "began": self._admitted_s if self._began_s is None else self._began_s,
        }
        self._began_s = None
        return Jury(
            report=report,
            link=self._link,
            presence=self._presence,
            ranks=self._ranks,
            obedience=self._obedience,
            clock_ns=self._clock_ns,
            sleep=self._sleep,
            log=self._log,
        )

    def _tell_streak(self, in_a_row: int, error: str) -> None:
        self._link.send(
            {
                "v": 1,
                "kind": "requests_failed",
                "attempt": self._presence.attempt,
                "in_a_row": in_a_row,
                "error": error,
            }
        )

    def _count(self, tally: Tally) -> None:
        self._presence.rollouts_ok += tally.ok
        self._presence.rollouts_failed += tally.failed
        if tally.rewards.count:
            self._presence.last_reward = tally.rewards.mean
        self._presence.show()

    def _note_refusal(self, refused: Refusal | None) -> None:
        """Too many refused batches in a row, and the guard holds; after a daemon's hold it counts anew."""
        gate = self._obedience
        gate.refusals = 0 if refused is None else gate.refusals + 1
        if gate.refusals >= gate.settings.max_refused_batches:
            self._logger.warning("%d batches in a row were refused: holding", gate.refusals)
            gate.refusals = 0
            gate.hold_by_itself("refused_batches")

    def _announce(self, version: str) -> None:
        if self._announced and self._announced[-1] == version:
            return
        older = [known for known in self._announced if known != version]
        self._announced = [*older[1 - _ANNOUNCED_MAX :], version]
        self._announcements += 1
        self._presence.weight_version = version

    def _void(self) -> None:
        """The weights go back in time: what was announced no longer says which rollouts are current."""
        self._announced = []
        self._announcements += 1
        self._presence.weight_version = None  # else the daemon would take servers with it for current
        self._refused = None

    @contextlib.contextmanager
    def _until_left(self, before: Phase) -> Iterator[None]:
        try:
            yield
        finally:
            self._presence.enter(before)

    def _drive(self, waits: Waits[T]) -> T:
        """Sleep as a generator of waits says, and return its value."""
        try:
            while True:
                self._sleep(next(waits))
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            waits.close()

    async def _drive_async(self, waits: Waits[None]) -> None:
        with contextlib.closing(waits):
            for pause_s in waits:
                await self._wait(pause_s)

    async def _wait(self, pause_s: float) -> None:
        if self._async_sleep is None:
            import asyncio  # noqa: PLC0415 - importing stepguard must stay cheap

            await asyncio.sleep(pause_s)
        else:
            await self._async_sleep(pause_s)

    def _beat_on(self, heartbeat_s: float) -> None:
        while not self._stopped.wait(heartbeat_s):
            try:
                self.beat()
            except Exception as error:  # noqa: BLE001 - the border of a thread that must outlive any trouble
                self._log.once("beat", "a heartbeat failed: %s: %s", type(error).__name__, error)


def _plain(name: str, handler: Callable[..., object]) -> Callable[..., object]:
    """The handler; a coroutine function is refused, because orders also arrive in synchronous calls."""
    if isolation.makes_coroutines(handler):
        raise TypeError(f"{name} takes a plain function: orders also arrive in synchronous calls")
    return handler


def _real(value: Any) -> float | None:
    """A float out of a number or a tensor with one element; None out of anything else."""
    try:
        return None if value is None or isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
