"""
The two servers that the demo can run on: the embedded one, and a real SGLang.

Each is a command, its environment and the times it needs. Nothing here starts anything.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

SGLANG_VENV: Final = ".venv-sglang"


class ServerKind(StrEnum):
    """Which server makes the rollouts."""

    EMBEDDED = "embedded"
    SGLANG = "sglang"


class ServerMissingError(Exception):
    """The server is not installed; the message is one line with the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProgram:
    """
    How a server is started.

    Args:
        kind: which.
        program: what comes before the model's path.
        flags: what comes after it.
        environment: variables beside those of the demo.
        start_timeout_s: within this it serves, or something is wrong.

    """

    kind: ServerKind
    program: tuple[str, ...]
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 90.0

    def command(self, model: Path, port: int) -> list[str]:
        """The whole command line."""
        return [*self.program, "--model-path", str(model), "--port", str(port), *self.flags]


def server_program(kind: ServerKind) -> ServerProgram:
    """
    The program of this kind of server.

    Raises:
        ServerMissingError: it is not installed.

    """
    match kind:
        case ServerKind.EMBEDDED:
            return ServerProgram(kind=kind, program=(sys.executable, "-m", "stepguard_grpo.server"))
        case ServerKind.SGLANG:
            return sglang(sglang_venv())


def sglang_venv() -> Path:
    """
    The environment with a real SGLang: $SGLANG_VENV, or `.venv-sglang` here or in the checkout.

    Raises:
        ServerMissingError: there is none, or its build was not finished.

    """
    given = os.environ.get("SGLANG_VENV")
    candidates = [Path(given)] if given else [Path(SGLANG_VENV), Path(__file__).parents[3] / SGLANG_VENV]
    for venv in candidates:
        if (venv / ".stepguard-built").is_file():
            return venv.absolute()
    raise ServerMissingError(f"no SGLang in {candidates[-1].absolute()}; build it with `make sglang` (3 GB)")


def sglang(venv: Path) -> ServerProgram:
    """
    A real SGLang on the CPU, as small and as quiet as it goes.

    Without a bound on its tokens it takes 20 GB of memory, and without sleeping a whole core when idle.
    """
    flags = ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--skip-tokenizer-init"]
    flags += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
    flags += ["--max-total-tokens", "8192", "--max-running-requests", "64"]
    flags += ["--disable-overlap-schedule", "--sleep-on-idle", "--enable-metrics"]
    environment = {
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return ServerProgram(
        kind=ServerKind.SGLANG,
        program=(str(venv / "bin" / "python"), "-m", "sglang.launch_server"),
        flags=tuple(flags),
        environment=environment,
        start_timeout_s=240.0,
    )
