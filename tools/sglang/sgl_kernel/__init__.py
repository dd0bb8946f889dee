"""
Stands in for SGLang's compiled kernels where there are none: on a CPU without AMX.

SGLang imports names from here at start; the path of a Llama on CPU calls none of them. Promises that a call
fails loudly instead of computing something else; computes nothing.
"""

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: this environment has no compiled kernels")

    return missing
