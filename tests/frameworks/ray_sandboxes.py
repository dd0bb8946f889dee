"""Actors that hang, in a module of their own: Ray's workers import it."""

from __future__ import annotations

import asyncio
import os
import signal
import time


class Sandbox:
    """Scores what it is given; at a chosen call it hangs, or its whole process stands still."""

    def pid(self) -> int:
        return os.getpid()

    def score(self, number: int, how: str) -> int:
        if how == "hang":
            time.sleep(3600)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        return number * number


class AsyncSandbox:
    """Its calls are coroutines: one that hangs can be ended alone."""

    async def score(self, number: int, how: str) -> int:
        if how == "hang":
            await asyncio.Event().wait()
        return number * number
