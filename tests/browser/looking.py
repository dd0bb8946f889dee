"""The page in a browser, as the tests open it, and what axe says of it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

expect.set_options(timeout=30_000)


@contextlib.contextmanager
def opened(
    browser: Browser, url: str, scheme: Any = "light", width: int = 1280, height: int = 900
) -> Iterator[Page]:
    """The page, drawn; whatever it complained of in its console is a failure."""
    with contextlib.closing(
        browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
    ) as context:
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda said: complaints.append(said.text) if said.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        expect(page.locator("#pulse")).to_have_text("live")
        expect(page.locator("#plot svg.main-svg").first).to_be_visible()
        yield page
        assert complaints == []


def link_of(run_dir: Path) -> str:
    """A one-time link to a run's page, as a person gets it."""
    done = subprocess.run(
        [sys.executable, "-m", "stepguardd", "open", "--run-dir", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {[node['target'] for node in one['nodes']][:3]}" for one in found]
