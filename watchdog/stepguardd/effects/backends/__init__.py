"""Starting and ending a server: one back-end for each who may own it."""

from pathlib import Path

from ...config import ServerSettings
from .actor import RayBackend
from .contract import Backend
from .docker import DockerBackend
from .http import HookBackend
from .none import ObservedBackend
from .process import ProcessBackend
from .systemd import SystemdBackend
from .trainer import TrainerBackend


def backend(run: str, settings: ServerSettings, log: Path) -> Backend:
    """
    The back-end that the config names.

    Args:
        run: what names the run on this machine.
        settings: the server's table of the config.
        log: where the output of a server goes that the daemon starts itself.

    """
    match settings.backend:
        case "process":
            return ProcessBackend(run, settings, log)
        case "systemd":
            return SystemdBackend(settings)
        case "docker":
            return DockerBackend(run, settings)
        case "ray":
            return RayBackend(settings)
        case "http":
            return HookBackend(settings)
        case "trainer":
            return TrainerBackend(settings)
        case "none":
            return ObservedBackend(settings)
