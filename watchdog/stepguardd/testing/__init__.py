"""
Fakes and a driver for tests of decisions: public, because whoever writes a rule wants to try it.

`World` is a run in miniature on its own clock. `Promises` looks at every decision and raises `BrokenPromise`.
Nothing here starts a process, opens a socket or reads a clock.
"""

from .promises import BrokenPromise, Promises
from .world import FakeServer, FakeTrainer, World

__all__ = ["BrokenPromise", "FakeServer", "FakeTrainer", "Promises", "World"]
