"""
What goes on around the run, live: logs, kills for memory, GPUs and memory pressure, as events of the core.

Promises that none of it ever ends the daemon or keeps it waiting: a source that fails is unknown, said in one
line when that begins, and asked again. Files are read in a thread of their own, since a disk may stall.
"""

from .host import THIS_HOST, HostFiles
from .watch import Surroundings

__all__ = ["THIS_HOST", "HostFiles", "Surroundings"]
