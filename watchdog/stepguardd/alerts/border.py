"""
The border of what alerts do: a fault that nobody foresaw is told by its type and its place alone.

A library's error may repeat the address or the password that it was given, in its words or in the frames of
its trace. So neither is logged, kept or passed on, not even as the context of another error.
"""

from collections.abc import Awaitable
from typing import TypeVar

from ..core.alerts.words import Message
from ..credentials import CredentialError
from .channels.contract import Broken, Channel, Draw, Later, Rejected

T = TypeVar("T")

ANSWERS = (Later, Broken, Rejected, CredentialError)


class Unforeseen(Exception):  # noqa: N818 - somebody else's fault, as far as it may be told
    """What failed, as a type and a line of code."""


async def bordered(work: Awaitable[T], foreseen: tuple[type[Exception], ...] = ()) -> T:
    """
    The work's result.

    Raises:
        Unforeseen: it failed in none of the foreseen ways, which are raised as they are.

    """
    try:
        return await work
    except foreseen:
        raise
    except Exception as error:  # noqa: BLE001 - a task's border: the watchdog outlives a bug in its alerts
        fault = f"{type(error).__name__} at {_where(error)}"
    raise Unforeseen(fault)  # outside of the handler: it takes no context along


async def hand_over(channel: Channel, message: Message, root: str | None, draw: Draw) -> str | None:
    """
    Send one message, as `Channel.send` promises.

    Raises:
        Later, Broken, Rejected, CredentialError: what the channel says.
        Unforeseen: the channel has a bug.

    """
    return await bordered(channel.send(message, root, draw), ANSWERS)


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "an unknown line"
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
