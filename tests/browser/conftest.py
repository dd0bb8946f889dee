"""One Chromium for all tests here, and one small run with its daemon."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from daemon_parts.small_run import SmallRun, small_run, training
from requirements import require
from stepguard_grpo.model import write_base_model

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        require("browser", "no chromium here")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRun]:
    """A run under way."""
    root = tmp_path_factory.mktemp("browser")
    write_base_model(root / "model", seed=0)
    with small_run(root / "run", root / "model", push=True) as run:
        run.daemon()
        run.until(run.serving, "the run is up")
        with training(run, resync=True):
            run.until(lambda: (run.status()["trainer"]["committed_step"] or 0) > 5, "steps are taken")
            yield run
