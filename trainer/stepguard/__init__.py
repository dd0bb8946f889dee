"""
Stepguard inside the training process: the gate before each optimizer step.

Standard library only, by promise: installing it brings nothing into a training environment. Names are
imported on first use, so that `import stepguard` costs next to nothing.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in typing, whose import would cost more than all the rest of this file

if TYPE_CHECKING:
    from stepguard.admission import Admission, Refusal, group_advantages
    from stepguard.calls import CallFailed, CallFailure, CallOk, Fate
    from stepguard.gate import Phase
    from stepguard.guard import Guard
    from stepguard.isolation import Aborted
    from stepguard.orders import RollbackRequested, StopRequested
    from stepguard.settings import GuardSettings

__all__ = [
    "Aborted",
    "Admission",
    "CallFailed",
    "CallFailure",
    "CallOk",
    "Fate",
    "Guard",
    "GuardSettings",
    "Phase",
    "Refusal",
    "RollbackRequested",
    "StopRequested",
    "group_advantages",
]

_HOMES = {
    "Aborted": "isolation",
    "Admission": "admission",
    "CallFailed": "calls",
    "CallFailure": "calls",
    "CallOk": "calls",
    "Fate": "calls",
    "Guard": "guard",
    "GuardSettings": "settings",
    "Phase": "gate",
    "Refusal": "admission",
    "RollbackRequested": "orders",
    "StopRequested": "orders",
    "group_advantages": "admission",
}


def __getattr__(name: str) -> object:
    """Import a public name on its first use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - on first use

    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
