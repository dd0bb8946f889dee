"""Other people's command lines (systemctl, docker, ray), asked with a bound on their time and answer."""

import asyncio
import os
from dataclasses import dataclass, replace
from typing import Final

ANSWER_BYTES_MAX: Final = 64 << 10
MANAGER: Final = "STEPGUARD_SYSTEMD"
POLKIT_RULE: Final = "/etc/polkit-1/rules.d/50-stepguard.rules"
_NO_LEAVE: Final = ("access denied", "interactive authentication required")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a program came to. `code` is None when it could not be run, or did not end in time."""

    code: int | None
    out: str
    trouble: str

    @property
    def ok(self) -> bool:
        """Whether it ended with 0."""
        return self.code == 0


def systemctl() -> tuple[str, ...]:
    """The units of a user's manager say so; any other daemon speaks to the machine's."""
    return ("systemctl", "--user") if os.environ.get(MANAGER) == "user" else ("systemctl",)


def with_leave(answered: Answered, unit: str) -> Answered:
    """The same answer; where systemd refused for lack of leave, its trouble names the rule that gives it."""
    if answered.ok or not any(words in answered.trouble.lower() for words in _NO_LEAVE):
        return answered
    trouble = f"{answered.trouble.rstrip('.')}; let the daemon's user manage {unit} in {POLKIT_RULE}"
    return replace(answered, trouble=trouble)


async def ask(*command: str, timeout_s: float, shown: str = "") -> Answered:
    """
    Run a program to its end.

    Args:
        command: the program and its arguments; no shell reads it.
        timeout_s: after this long it is killed.
        shown: how trouble calls it; by default its first four words.

    """
    said = shown or " ".join(command[:4])
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return Answered(code=None, out="", trouble=f"cannot run {command[0]}: {error.strerror or error}")
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await child.communicate()
    except TimeoutError:
        child.kill()
        await child.wait()
        return Answered(code=None, out="", trouble=f"{said} took more than {timeout_s:.0f} s")
    text = out[:ANSWER_BYTES_MAX].decode("utf-8", "replace").strip()
    why = err[-2000:].decode("utf-8", "replace").strip()
    trouble = "" if child.returncode == 0 else f"{said}: {why or text or f'exit code {child.returncode}'}"
    return Answered(code=child.returncode, out=text, trouble=trouble)
