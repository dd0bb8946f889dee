import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import runs_on_disk
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[runs_on_disk.Kind], Path]:
    home, built = tmp_path_factory.mktemp("templates"), {}

    def template(kind: runs_on_disk.Kind) -> Path:
        if kind.framework not in built:
            kind.build(home / kind.framework)
            built[kind.framework] = home / kind.framework
        return built[kind.framework]

    return template


@pytest.fixture
def a_run(
    tmp_path: Path, _templates: Callable[[runs_on_disk.Kind], Path]
) -> Callable[[runs_on_disk.Kind], Path]:
    """A fresh copy of a run of this kind, with checkpoints at steps 10, 20 and 30."""

    def make(kind: runs_on_disk.Kind) -> Path:
        root = tmp_path / kind.framework
        shutil.copytree(_templates(kind), root)
        return root

    return make
