"""A restart waits until the GPU has its memory back, seen through the real pynvml at a living daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon_parts.small_run import SmallRun
from senses.nvml_library import compiled_library, write_script

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

GIB = 1 << 30


class GpuRun(SmallRun):
    """A small run on a machine with a GPU whose driver is scripted."""

    def __init__(self, root: Path, model: Path, library: Path) -> None:
        self.library, self.gpus = library, root / "gpus"
        super().__init__(root, model, push=True)
        self.says(server=0, left=0)

    def environment(self) -> dict[str, str]:
        return {
            **super().environment(),
            "LD_LIBRARY_PATH": str(self.library),
            "FAKE_NVML": str(self.gpus),
        }

    def says(self, *, server: int, left: int) -> None:
        """Let the driver list the server's root with so many GiB, and count as many that nobody holds."""
        lines = {"gpu0_used": (1 + server + left) * GIB}
        if server:
            root = self.started()[0].pid
            lines |= {"gpu0_processes": 1, "gpu0_pid0": root, "gpu0_pid0_used": server * GIB}
        write_script(self.gpus, count=1, **lines)


def test_a_server_is_started_again_once_its_gpu_has_its_memory_back(tmp_path: Path, base_model: Path) -> None:
    library = tmp_path / "nvml"
    library.mkdir()
    root = tmp_path / "run"
    root.mkdir()
    run = GpuRun(root, base_model, compiled_library(library))
    try:
        run.daemon()
        run.until(lambda: run.status().get("gpus"), "the GPU is seen")
        run.until(run.serving, "the first start")
        run.says(server=60, left=0)
        run.until(lambda: run.status()["gpus"][0]["used_bytes"] == 61 * GIB, "the server holds memory")

        run.ask("restart-server", server="server")
        run.until(lambda: not run.started(), "the server is ended")
        run.says(server=0, left=60)
        run.until(lambda: run.status()["gpus"][0]["used_bytes"] == 61 * GIB, "nobody holds it any more")
        assert run.status()["servers"][0]["stage"] == "stop", run.story()
        assert len(run.starts()) == 1
        run.says(server=0, left=0)
        run.until(lambda: len(run.starts()) == 2, "it starts once the memory is back", timeout_s=45.0)
        run.until(run.serving, "it serves")
        assert "although" not in run.log.read_text()
    finally:
        run.close()
