"""A command run to its end: bounded, and its failure in one line."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from .contract import COMMAND_TIMEOUT_S

_WORDS_MAX = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a command ended: what it printed, and why it failed; `error` is "" for one that did not."""

    output: str
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it did what it was asked."""
        return not self.error


async def run(*command: str, timeout_s: float = COMMAND_TIMEOUT_S, shown: Sequence[str] = ()) -> Done:
    """
    Run a command to its end; it is killed when it takes too long, or when the caller is cancelled.

    Args:
        command: the program and its arguments; no shell reads them.
        timeout_s: how long it may take.
        shown: how errors call it; by default the command itself, at full length.

    """
    name = " ".join(shown or command)
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return Done(output="", error=f"cannot run {command[0]}: {error.strerror}")
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await child.communicate()
    except TimeoutError:
        return Done(output="", error=f"{name} took more than {timeout_s:.0f} s")
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    output = stdout.decode("utf-8", "replace").strip()
    if child.returncode == 0:
        return Done(output=output)
    words = " ".join((stderr.decode("utf-8", "replace").strip() or output).split())[-_WORDS_MAX:]
    return Done(output=output, error=f"{name}: {words or f'exit code {child.returncode}'}")
