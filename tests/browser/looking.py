"""The page in a browser, as the tests open it, and what axe says of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {[node['target'] for node in one['nodes']][:3]}" for one in found]
