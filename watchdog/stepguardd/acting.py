"""
Effects are carried out here: durable intent → act → durable outcome.

Each act is an *ensure*, so one that a crash of the daemon has cut short may be begun again under the same
intent.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Final

from stepguard.gate import PATH_BYTES_MAX

from .config import Config
from .core.commands import (
    AbortRequests,
    CompareWeights,
    ContinueGeneration,
    ContinueServer,
    Effect,
    PauseGeneration,
    PrepareRollback,
    PushWeights,
    RunCanary,
    StartServer,
    StartTrainer,
    StopServer,
    StopTrainer,
)
from .core.events import EffectEnded, Event, GpuBaseline
from .core.state import State
from .effects import generation
from .effects.backends.contract import port_of
from .effects.canary import canary
from .effects.gpu_memory import Look, Release, baseline, given_back
from .effects.outcome import Outcome, failed
from .effects.rollback import prepare
from .effects.trainer import Resume
from .effects.weights import compare, push
from .failpoint import failpoint
from .journal import JournalError
from .sources.trainer_tree import TrainerProcesses
from .watching import WatchedServer

log = logging.getLogger("stepguardd")

INTENT_TIMEOUT_S: Final = 10.0
COMPARE_TIMEOUT_S: Final = 20.0
LOOK_BACK_S: Final = 2.0

Durable = asyncio.Future[None] | None


async def nobody_looks() -> None:
    """No GPU can be seen."""


class Acting:
    """
    The effects under way.

    Args:
        config: the whole configuration.
        watched: the servers' parts, by name.
        feed: takes the event with which an effect ends.
        state: the state as it is now.
        trainer: the trainer's parts, once there are any; None where it is somebody else's to start.
        skip: tells the guard which steps' batches to leave out, before a trainer starts.
        look: takes in what logs and kernel say now, so that why a server ended is known before it starts.
        gpus: looks at the GPUs.

    """

    def __init__(
        self,
        config: Config,
        watched: Mapping[str, WatchedServer],
        feed: Callable[[Event], None],
        state: Callable[[], State],
        *,
        trainer: Callable[[], TrainerProcesses | None] = lambda: None,
        skip: Callable[[tuple[int, ...]], None] = lambda steps: None,
        look: Callable[[], Awaitable[None]] | None = None,
        gpus: Look = nobody_looks,
    ) -> None:
        self._config = config
        self._watched = watched
        self._feed = feed
        self._state = state
        self._trainer = trainer
        self._skip = skip
        self._look = look
        self._gpus = gpus
        self._tasks: set[asyncio.Task[None]] = set()
        self.changing_checkpoints = asyncio.Lock()

    def begin(self, effect: Effect, durable: Durable) -> None:
        """Carry it out in a task of its own, once `durable` says that its intent is on disk."""
        task = asyncio.create_task(self._carry_out(effect, durable), name=effect.intent)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cut short what is under way: the next daemon finds it by its intent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry_out(self, effect: Effect, durable: Durable) -> None:
        kind = type(effect).__name__
        if durable is not None:
            try:
                async with asyncio.timeout(INTENT_TIMEOUT_S):
                    await asyncio.shield(durable)
            except (TimeoutError, JournalError) as error:
                # A full disk must not cost the night: the act is an ensure, findable on the machine itself.
                log.error("%s goes on without its intent on disk: %s", effect.intent, error)
        failpoint(f"before_{kind}")
        try:
            outcome = await self._act(effect)
        except Exception as error:  # a task's border: a bug in one effect must end as its failure
            log.exception("%s failed", effect.intent)
            outcome = failed(f"{type(error).__name__}: {error}")
        failpoint(f"after_{kind}")
        self._feed(
            EffectEnded(
                intent=effect.intent,
                ok=outcome.ok,
                detail=outcome.detail,
                procs=outcome.procs,
                target_step=outcome.target_step,
                target_path=outcome.target_path,
                needless=outcome.needless,
                looks=outcome.looks,
                kept_arguments=outcome.kept_arguments,
                gpu_baseline=outcome.gpu_baseline,
                memory_held=outcome.memory_held,
            )
        )

    async def _act(self, effect: Effect) -> Outcome:
        if isinstance(effect, PrepareRollback):
            before = "" if effect.before_step is None else f"before-{effect.before_step}-"
            async with self.changing_checkpoints:
                return _fits(
                    await prepare(
                        self._config.checkpoints,
                        effect.before_step,
                        name=before + effect.intent,
                        rows=self._state().checkpoints,
                    )
                )
        if isinstance(effect, StopTrainer | StartTrainer):
            return await self._on_trainer(effect)
        server = self._watched.get(effect.server)
        if server is None:
            return failed(f"the config has no server {effect.server} any more")
        return await self._on_server(server, effect)

    async def _look_back(self, server: str) -> None:
        """Its last words decide what its next start is given; a stalled disk must not keep it waiting."""
        if self._look is None:
            return
        try:
            async with asyncio.timeout(LOOK_BACK_S):
                await self._look()
        except TimeoutError:
            log.warning("why %s ended was not read within %g s", server, LOOK_BACK_S)

    async def _stop(self, server: WatchedServer, effect: StopServer) -> Outcome:
        running = await self._gpus() if _here(server) else None
        ended = {known.pid for known in effect.procs}
        if running is not None:
            ended |= {known.pid for known in await asyncio.to_thread(server.backend.find)}
        outcome = await server.backend.stop(effect.procs)
        await self._look_back(server.settings.name)
        if outcome.ok and running is not None:
            release = Release(ended, effect.gpu_baseline, running)
            timeout_s = self._config.recovery.gpu_free_timeout_s
            outcome = replace(outcome, memory_held=await given_back(release, self._gpus, timeout_s=timeout_s))
        server.adopt(())
        return outcome

    async def _before_start(self, server: WatchedServer) -> tuple[GpuBaseline, ...]:
        """The GPUs without it; unknown where a start of before left it running."""
        gpus = await self._gpus() if _here(server) else None
        if gpus is None:
            return ()
        found = await asyncio.to_thread(server.backend.find)
        return () if found else baseline(gpus)

    async def _on_trainer(self, effect: StopTrainer | StartTrainer) -> Outcome:
        trainer = self._trainer()
        if trainer is None:
            return failed("the config names no one who may start the trainer; see [trainer]")
        async with trainer.changing:
            if isinstance(effect, StopTrainer):
                outcome = await trainer.backend.stop(effect.procs)
                trainer.adopt(())
                return outcome
            self._skip(effect.skip_steps)
            resume = Resume(step=effect.target_step, path=effect.target_path)
            outcome = await trainer.backend.start(effect.intent, resume)
            trainer.adopt(outcome.procs)
            return outcome

    async def _on_server(
        self,
        server: WatchedServer,
        effect: ContinueServer
        | StopServer
        | StartServer
        | RunCanary
        | PushWeights
        | CompareWeights
        | AbortRequests
        | PauseGeneration
        | ContinueGeneration,
    ) -> Outcome:
        recovery = self._config.recovery
        match effect:
            case ContinueServer():
                return await server.resume(effect.procs)
            case StopServer():
                async with server.changing:
                    return await self._stop(server, effect)
            case StartServer():
                async with server.changing:
                    before = await self._before_start(server)
                    outcome = await server.backend.start(effect.intent, dict(effect.arguments))
                    server.adopt(outcome.procs)
                return replace(outcome, gpu_baseline=before)
            case RunCanary():
                outcome = await canary(
                    server.http,
                    requests=recovery.canary_requests,
                    timeout_s=recovery.canary_timeout_s,
                    ours=server.answers_itself,
                )
                # What generates is all there now: no process of it may end unwatched from here on.
                await server.look()
                return outcome
            case PushWeights():
                assert self._config.weights.path is not None
                return await push(
                    server.http,
                    pattern=self._config.weights.path,
                    version=effect.version,
                    timeout_s=recovery.resync_timeout_s,
                    base=server.base_model,
                    anew=effect.anew,
                )
            case AbortRequests():
                return await generation.abort(server.http)
            case PauseGeneration():
                return await generation.pause(server.http)
            case ContinueGeneration():
                return await generation.go_on(server.http)
            case CompareWeights():
                other = None if effect.other is None else self._watched.get(effect.other)
                return await compare(
                    (effect.server, server.http),
                    None if other is None else (other.settings.name, other.http),
                    timeout_s=min(recovery.canary_timeout_s, COMPARE_TIMEOUT_S),
                )


def _here(server: WatchedServer) -> bool:
    """Whether its GPUs can be this machine's."""
    return server.settings.node is None and port_of(server.settings.url) is not None


def _fits(outcome: Outcome) -> Outcome:
    """A rollback's target has to fit on the gate page."""
    length = len(os.fsencode(outcome.target_path or ""))
    if length <= PATH_BYTES_MAX:
        return outcome
    return failed(
        f"the checkpoint's path has {length} bytes, and the gate page holds {PATH_BYTES_MAX}: "
        f"use a shorter checkpoints.dir, or a symbolic link; {outcome.detail}"
    )
