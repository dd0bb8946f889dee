"""`guard.call` on real Ray actors: 200 calls of which ten hang, and the run goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from frameworks.ray_sandboxes import AsyncSandbox, Sandbox
from stepguard import CallFailed, CallFailure, CallOk, Fate, Guard

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("ray")]


def actors(of: type, count: int) -> list[Any]:
    """Actors of this class, all of them up."""
    made = [ray.remote(of).options(num_cpus=0).remote() for _ in range(count)]
    ray.get([actor.__ray_ready__.remote() for actor in made], timeout=120)
    return made


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_ten_of_two_hundred_calls_hang_and_exactly_their_actors_are_killed(ray_cluster: str) -> None:
    """Incident C: nine hang in a call, one stands still as a process, which Ray's kill alone leaves."""
    sandboxes = actors(Sandbox, 12)
    hanging, others = sandboxes[:10], sandboxes[10:]
    pids = ray.get([actor.pid.remote() for actor in sandboxes], timeout=60)
    # The one that stands still is asked nothing before: its stop takes answers along that are not out yet.
    plan = [(actor, "well") for actor in hanging[1:] for _ in range(16)]
    plan += [(actor, "stop" if actor is hanging[0] else "hang") for actor in hanging]
    plan += [(actor, "well") for actor in others for _ in range(23)]
    assert len(plan) == 200

    async def run() -> tuple[list[Any], list[Any]]:
        with Guard(None) as guard:
            first = await asyncio.gather(
                *(
                    guard.call(actor.score.remote(number, how), timeout_s=25, what="score", or_kill=actor)
                    for number, (actor, how) in enumerate(plan)
                )
            )
            again = await asyncio.gather(
                *(
                    guard.call(actor.score.remote(7, "well"), timeout_s=20, or_kill=actor)
                    for actor in sandboxes
                )
            )
            guard.before_step(1)  # nothing is held
        return first, again

    first, again = asyncio.run(run())
    for number, ((_, how), answer) in enumerate(zip(plan, first, strict=True)):
        if how == "well":
            assert answer == CallOk(number * number)
        else:
            assert isinstance(answer, CallFailed)
            assert (answer.kind, answer.fate) == (CallFailure.TIMEOUT, Fate.KILLED)
    assert [alive(pid) for pid in pids] == [False] * 10 + [True] * 2
    for answer in again[:10]:
        assert isinstance(answer, CallFailed)
        assert (answer.kind, answer.fate) == (CallFailure.ERROR, Fate.GONE)
    assert again[10:] == [CallOk(49)] * 2


def test_a_mass_of_hung_calls_kills_no_actor(ray_cluster: str) -> None:
    sandboxes = actors(Sandbox, 4)
    pids = ray.get([actor.pid.remote() for actor in sandboxes], timeout=60)

    async def run() -> list[Any]:
        guard = Guard(None)
        return await asyncio.gather(
            *(guard.call(actor.score.remote(1, "hang"), timeout_s=1, or_kill=actor) for actor in sandboxes)
        )

    answers = asyncio.run(run())
    assert [answer.fate for answer in answers] == [Fate.SPARED] * 4
    assert [alive(pid) for pid in pids] == [True] * 4


def test_a_coroutine_that_hangs_is_cancelled_and_its_actor_lives(ray_cluster: str) -> None:
    (sandbox,) = actors(AsyncSandbox, 1)

    async def run() -> tuple[Any, Any]:
        guard = Guard(None)
        hung = await guard.call(sandbox.score.remote(3, "hang"), timeout_s=1, or_kill=sandbox)
        return hung, await guard.call(sandbox.score.remote(3, "well"), timeout_s=20, or_kill=sandbox)

    hung, well = asyncio.run(run())
    assert isinstance(hung, CallFailed)
    assert (hung.kind, hung.fate) == (CallFailure.TIMEOUT, Fate.ENDED)
    assert well == CallOk(9)
