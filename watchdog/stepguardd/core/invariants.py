"""Claims that must hold whatever the world does: checked at run time, also under `python -O`."""


class InvariantError(Exception):
    """The core found itself in a state that its design rules out: a bug, never a fault of the world."""


def require(claim: bool, message: str) -> None:
    """Raise `InvariantError(message)` unless the claim holds."""
    if not claim:
        raise InvariantError(message)
