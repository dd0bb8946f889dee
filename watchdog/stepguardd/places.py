"""Where runs live on this machine when nobody says: folders for root and for a plain user."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def default_run_dir(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Where a run's gate and sockets live when nobody says: in memory, and gone after a reboot."""
    return run_roots(environ)[0] / name


def run_roots(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """The folders that hold the run folders of this user, the one for new runs first."""
    system = Path("/run/stepguard")
    runtime = environ.get("XDG_RUNTIME_DIR")
    own = Path(runtime, "stepguard") if runtime else Path(tempfile.gettempdir(), f"stepguard-{os.getuid()}")
    return [system, own] if _is_ours(system) else [own, system]


def default_state_dir(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Where a run's journal lives when nobody says: it must survive a reboot."""
    system = Path("/var/lib/stepguard")
    if _is_ours(system):
        return system / name
    state_home = environ.get("XDG_STATE_HOME")
    return (Path(state_home) if state_home else Path("~/.local/state").expanduser()) / "stepguard" / name


def _is_ours(folder: Path) -> bool:
    """True where this user may make a run's folder: in the folder if it is there, else as root."""
    return os.access(folder, os.W_OK | os.X_OK) if folder.is_dir() else os.geteuid() == 0
