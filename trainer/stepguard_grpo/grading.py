"""
Grading in processes of its own, as trainers do that run a verifier or a sandbox in Ray actors.

A `Grader` is one worker process that grades one rollout at a time over its pipes; it stands for an actor
where Ray is not installed. Promise: with a guard every call is bounded, a grader that hangs is killed and
replaced, and its rollout fails. Without a guard a call is awaited for as long as it takes, as in the
incident.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepguard import Guard

log = logging.getLogger("stepguard_grpo")


class GradingError(Exception):
    """The grader gave no grade."""


def score(output_ids: Sequence[int], target: Sequence[int]) -> float:
    """The share of target tokens written in their place, 0.0 to 1.0."""
    return sum(got == wanted for got, wanted in zip(output_ids, target, strict=False)) / len(target)


class Grader:
    """One worker process, and the call in it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> Grader:
        """A new one."""
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", "stepguard_grpo.grading"]
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    async def grade(self, output_ids: Sequence[int], target: Sequence[int]) -> float:
        """
        The reward of one rollout.

        Raises:
            GradingError: its process ended.

        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([list(output_ids), list(target)]).encode() + b"\n")
            await self._process.stdin.drain()
            answer = await self._process.stdout.readline()
            return float(answer)
        except (OSError, ValueError) as error:
            raise GradingError(f"the grader (pid {self.pid}) ended: {error}") from error

    def kill(self) -> None:
        """End its process; a stopped one as well."""
        if self._process.returncode is None:
            self._process.kill()

    async def close(self) -> None:
        """End it, and see it end."""
        self.kill()
        await self._process.wait()


class Graders:
    """
    A pool: each grader has one rollout at a time, so that one that hangs costs one.

    Args:
        count: how many.
        guard: bounds the calls; None: nothing does.
        timeout_s: of one grade, with a guard.

    """

    def __init__(self, count: int, *, guard: Guard | None, timeout_s: float) -> None:
        self._count = count
        self._guard = guard
        self._timeout_s = timeout_s
        self._all: set[Grader] = set()
        self._free: asyncio.Queue[Grader] = asyncio.Queue(maxsize=count)
        self._starting = asyncio.Lock()

    async def grade(self, output_ids: Sequence[int], target: Sequence[int]) -> float:
        """
        The reward of one rollout, from the next grader that is free.

        Raises:
            GradingError: there is none; the grader was replaced.

        """
        async with self._starting:
            while len(self._all) < self._count:
                await self._add()
        grader = await self._free.get()
        try:
            reward = await self._bounded(grader, output_ids, target)
        except GradingError:
            await self._replace(grader)
            raise
        self._free.put_nowait(grader)
        return reward

    async def close(self) -> None:
        """End them all."""
        for grader in self._all:
            await grader.close()
        self._all.clear()

    async def _bounded(self, grader: Grader, output_ids: Sequence[int], target: Sequence[int]) -> float:
        if self._guard is None:
            return await grader.grade(output_ids, target)
        from stepguard import CallOk  # noqa: PLC0415 - a run without Stepguard does not import it

        answer = await self._guard.call(
            grader.grade(output_ids, target), timeout_s=self._timeout_s, what="grade", or_kill=grader.kill
        )
        if isinstance(answer, CallOk):
            return answer.value
        fate = "" if answer.fate is None else f", {answer.fate.value}"
        log.warning("the grader (pid %d) gave no grade: %s%s", grader.pid, answer.exception, fate)
        raise GradingError(str(answer.exception)) from answer.exception

    async def _replace(self, grader: Grader) -> None:
        await grader.close()
        async with self._starting:
            self._all.discard(grader)
            await self._add()

    async def _add(self) -> None:
        grader = await Grader.start()
        self._all.add(grader)
        self._free.put_nowait(grader)


def main() -> None:
    """The worker process: a rollout and its target a line in, a reward a line out, until the pipe ends."""
    for line in sys.stdin:
        output_ids, target = json.loads(line)
        print(score(output_ids, target), flush=True)


if __name__ == "__main__":
    main()
