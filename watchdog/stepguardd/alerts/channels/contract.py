"""What every channel promises: a message is handed over, or one of three errors says what to do about it."""

from collections.abc import Awaitable, Callable
from typing import Protocol

from ...core.alerts.words import Message

Draw = Callable[[], Awaitable[bytes | None]]


class Later(Exception):  # noqa: N818 - an answer, not a fault
    """Not now: try again, after `after_s` where the peer said so."""

    def __init__(self, why: str, after_s: float | None = None) -> None:
        super().__init__(why)
        self.after_s = after_s


class Broken(Exception):  # noqa: N818
    """The channel cannot work as it is set up; the message ends with the remedy. Tried again now and then."""


class Rejected(Exception):  # noqa: N818
    """The peer will never take this message; the next one it may."""


class Channel(Protocol):
    """A way to people."""

    name: str

    async def send(self, message: Message, root: str | None, draw: Draw) -> str | None:
        """
        Hand one message over.

        Args:
            message: what to say.
            root: the receipt of the first message of its thread on this channel; None for the first.
            draw: gives the curve as PNG, or None where there is none; takes seconds, so after the words.

        Returns:
            A receipt, by which later messages of the thread find this one; None where the channel has none.

        Raises:
            Later: it could not be handed over now.
            Broken: the channel's setup is wrong.
            Rejected: this message is not taken.

        """
        ...
