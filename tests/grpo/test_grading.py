"""Grading in processes of its own: one that hangs costs one rollout, and is replaced."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from stepguard import Guard
from stepguard_grpo.grading import Graders, GradingError

pytestmark = pytest.mark.e2e


def test_a_grade_is_the_same_as_in_the_trainers_own_process() -> None:
    async def run() -> list[float]:
        graders = Graders(2, guard=None, timeout_s=60)
        try:
            return await asyncio.gather(*(graders.grade([1, 2, 3, 4], [1, 2, 3, last]) for last in (4, 5, 4)))
        finally:
            await graders.close()

    assert asyncio.run(run()) == [1.0, 0.75, 1.0]


def test_one_that_hangs_is_killed_and_replaced_with_a_guard() -> None:
    async def run() -> tuple[bool, float, list[int]]:
        graders = Graders(1, guard=Guard(None), timeout_s=1.0)
        try:
            await graders._add()
            (stopped,) = graders._all
            os.kill(stopped.pid, signal.SIGSTOP)
            with pytest.raises(GradingError, match="no answer within 1 s"):
                await graders.grade([1], [1])
            gone = stopped._process.returncode == -signal.SIGKILL
            graders._timeout_s = 60
            return gone, await graders.grade([1], [1]), [one.pid for one in graders._all if one is stopped]
        finally:
            await graders.close()

    assert asyncio.run(run()) == (True, 1.0, [])


def test_without_a_guard_the_call_is_awaited_for_ever() -> None:
    async def run() -> bool:
        graders = Graders(1, guard=None, timeout_s=0.1)
        try:
            await graders._add()
            (stopped,) = graders._all
            os.kill(stopped.pid, signal.SIGSTOP)
            waiting = asyncio.ensure_future(graders.grade([1], [1]))
            done, _ = await asyncio.wait({waiting}, timeout=0.5)
            waiting.cancel()
            return not done
        finally:
            await graders.close()

    assert asyncio.run(run())


def test_one_that_died_is_replaced() -> None:
    async def run() -> float:
        graders = Graders(1, guard=None, timeout_s=60)
        try:
            await graders._add()
            (first,) = graders._all
            os.kill(first.pid, signal.SIGKILL)
            with pytest.raises(GradingError, match="ended"):
                await graders.grade([1], [1])
            return await graders.grade([1], [1])
        finally:
            await graders.close()

    assert asyncio.run(run()) == 1.0
