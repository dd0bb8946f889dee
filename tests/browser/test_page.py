"""The page in a real browser: each button with its confirmation, no error, and what axe says of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from daemon_parts.small_run import SmallRun

pytestmark = pytest.mark.e2e
LOOKS: list[tuple[str, Any, int, int]] = [
    ("light-desktop", "light", 1280, 900),
    ("dark-desktop", "dark", 1280, 900),
    ("light-phone", "light", 390, 844),
    ("dark-phone", "dark", 390, 844),
]
# Where to leave what was looked at, for a person: docs/img, say.
PICTURES = os.environ.get("STEPGUARD_PICTURES")
expect.set_options(timeout=30_000)


def link(run: SmallRun) -> str:
    """A one-time link to the run's page."""
    done = subprocess.run(
        [sys.executable, "-m", "stepguardd", "open", "--run-dir", str(run.run_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


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


def confirmed(page: Page, button: str, says: str, why: str = "the test wants it") -> None:
    """Press it, read what will happen, agree."""
    page.get_by_role("button", name=button).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text(says)
    dialog.get_by_label("Why").fill(why)
    dialog.locator("#ask-yes").click()
    # Its own button has the name of what was asked for: until it is gone, two are called "Pause".
    expect(dialog).to_be_hidden()


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {[node['target'] for node in one['nodes']][:3]}" for one in found]


def test_pause_and_resume_hold_and_free_the_trainer(browser: Browser, run: SmallRun) -> None:
    with opened(browser, link(run)) as page:
        confirmed(page, "Pause", "holds before its next optimizer step")
        expect(page.locator("#word")).to_have_text("Paused")
        assert run.order() == "HOLD"
        expect(page.get_by_role("button", name="Pause", exact=True)).to_be_disabled()
        confirmed(page, "Resume", "The pause ends")
        expect(page.locator("#word")).not_to_have_text("Paused")
        run.until(lambda: run.order() == "GO", "the trainer is free")


def test_a_server_is_restarted(browser: Browser, run: SmallRun) -> None:
    before = len(run.starts())
    with opened(browser, link(run)) as page:
        confirmed(page, "Restart server…", "whole process tree is ended")
        run.until(lambda: len(run.starts()) == before + 1, "it was started again")
        run.until(run.serving, "it serves again")
        expect(page.locator("#servers")).to_contain_text("1 of 1 serving")


def test_shadow_goes_on_and_off(browser: Browser, run: SmallRun) -> None:
    with opened(browser, link(run)) as page:
        confirmed(page, "Shadow on", "holds nothing")
        expect(page.locator("#mode")).to_have_text("mode shadow")
        assert run.status()["mode"] == "shadow"
        page.get_by_role("button", name="Shadow off").click()
        page.get_by_label("Mode").select_option("act")
        page.locator("#ask-yes").click()
        expect(page.locator("#mode")).to_have_text("mode act")
        assert run.status()["mode"] == "act"


def test_a_rollback_says_where_it_goes_and_can_be_cancelled(browser: Browser, run: SmallRun) -> None:
    with opened(browser, link(run)) as page:
        page.get_by_role("button", name="Roll back to…").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("No checkpoint before it is known here")
        expect(dialog).to_contain_text("stepguard checkpoints undo")
        dialog.get_by_role("button", name="Cancel").click()
        expect(dialog).to_be_hidden()
        assert run.status()["trainer"]["attempt"] == 0


def test_without_a_session_a_button_says_how_to_get_one(browser: Browser, run: SmallRun) -> None:
    url = str(run.status()["page"]["url"])
    with opened(browser, url) as page:
        page.get_by_role("button", name="Pause", exact=True).click()
        expect(page.get_by_role("dialog")).to_contain_text("stepguard open")
        expect(page.locator("#ask-yes")).to_be_hidden()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
    assert run.order() == "GO"


@pytest.mark.parametrize(("name", "scheme", "width", "height"), LOOKS)
def test_it_is_clean_for_everybody_in_both_themes_and_on_a_phone(
    browser: Browser, run: SmallRun, name: str, scheme: Any, width: int, height: int
) -> None:
    with opened(browser, link(run), scheme, width, height) as page:
        expect(page.locator("#toast")).to_contain_text("You may act here now")
        assert violations(page) == []
        overflow = page.locator("html").evaluate("page => page.scrollWidth - page.clientWidth")
        assert overflow <= 0, "it scrolls sideways"
        expect(page.locator("#toast")).to_be_hidden()
        if PICTURES is not None:
            page.screenshot(path=Path(PICTURES) / f"page-{name}.png", full_page=True)
        page.get_by_role("button", name="Roll back to…").click()
        expect(page.get_by_role("dialog")).to_be_visible()
        assert violations(page) == []
