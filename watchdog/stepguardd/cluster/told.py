"""What an agent tells the head of: an event as a message, and back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, get_args

from pydantic import TypeAdapter, ValidationError

from ..core.events import (
    BatchReported,
    Event,
    GpuTroubled,
    LogSeen,
    OomSeen,
    ProcessExited,
    RolloutsLost,
    TrainerExited,
    TrainerSeen,
    TreeSampled,
    TreeSeen,
)
from ..sources.trainer import Reported
from .wire import WireError

OF_THE_TRAINER: Final[tuple[type, ...]] = (*get_args(Reported), TrainerSeen, TrainerExited)
OF_THE_MACHINE: Final[tuple[type, ...]] = (OomSeen, GpuTroubled)
OfItsServers = TreeSeen | TreeSampled | ProcessExited | LogSeen
_KNOWN: Final[dict[str, TypeAdapter[Any]]] = {
    kind.__name__: TypeAdapter(kind) for kind in (*OF_THE_TRAINER, *OF_THE_MACHINE, *get_args(OfItsServers))
}


def message_of(event: Event, now: float) -> dict[str, object]:
    """
    The event as a message.

    `began_ago` stands for `began`: the clocks of two machines have nothing in common but their pace.
    """
    body = TypeAdapter(type(event)).dump_python(event, mode="json")
    message = {"name": type(event).__name__, "body": body}
    if isinstance(event, BatchReported | RolloutsLost) and event.began is not None:
        message["began_ago"] = max(0.0, now - event.began)
    return message


def event_of(message: Mapping[str, Any], now: float) -> Event | None:
    """
    The event in a message, its times in this machine's; None for one that this version does not know.

    The way here makes them later by as much as the message took.

    Raises:
        WireError: an event of this name has other fields.

    """
    adapter = _KNOWN.get(str(message.get("name")))
    if adapter is None:
        return None
    try:
        event: Event = adapter.validate_python(message.get("body"))
    except ValidationError as wrong:
        raise WireError(f"an event that is none: {wrong.error_count()} fields are wrong") from None
    ago = message.get("began_ago")
    began = now - ago if isinstance(ago, int | float) and ago >= 0 else None
    if isinstance(event, BatchReported):
        return replace(event, began=began)
    if isinstance(event, RolloutsLost):
        if began is None:
            raise WireError("lost rollouts without the time that they were sent at")
        return replace(event, began=began)
    return event
