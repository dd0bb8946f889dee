"""The page in a real browser: each button with its confirmation, no error, and what axe says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from browser.looking import link_of, opened, violations
from daemon_parts.little_run import little_run
from daemon_parts.own_daemons import OwnDaemons
from daemon_parts.small_run import SmallRun

pytestmark = pytest.mark.e2e
LOOKS: list[tuple[Any, int, int]] = [
    ("light", 1280, 900),
    ("dark", 1280, 900),
    ("light", 390, 844),
    ("dark", 390, 844),
]


@pytest.fixture(autouse=True)
def free_again(run: SmallRun) -> Iterator[None]:
    """A test that failed with the run paused does not take the others with it."""
    yield
    if run.order() == "HOLD":
        run.ask("resume")
        run.until(lambda: run.order() == "GO", "the trainer is free")


def link(run: OwnDaemons) -> str:
    return link_of(run.run_dir)


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
        expect(page.locator("#story .evidence").first).to_contain_text("asked for by")


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
        expect(dialog).to_contain_text("stepguard rollback --undo")
        dialog.get_by_role("button", name="Cancel").click()
        expect(dialog).to_be_hidden()
        assert run.status()["trainer"]["attempt"] == 0


def test_an_accepted_rollback_takes_the_run_back_and_sets_what_is_newer_aside(
    browser: Browser, tmp_path: Path
) -> None:
    with little_run(tmp_path, in_place=True, page=True) as run:
        run.daemon()
        run.until(run.proven, "a checkpoint is proven")
        proven = max(run.proven())
        with opened(browser, link(run)) as page:
            expect(page.locator("#trainer .big")).to_contain_text("step")
            page.get_by_role("button", name="Roll back").click()
            page.get_by_label("before step").fill(str(proven + 1))
            dialog = page.get_by_role("dialog")
            expect(dialog).to_contain_text(f"before it is of step {proven}")
            expect(dialog).to_contain_text(f"stepguard rollback --undo {run.checkpoints}")
            dialog.get_by_label("Why").fill("the test wants it")
            dialog.locator("#ask-yes").click()
            expect(dialog).to_be_hidden()
            run.until(lambda: (1, proven + 1) in run.steps(), "it goes on behind the step of the checkpoint")
            run.until(lambda: run.order() == "GO", "nothing holds it")
            told = page.request.get(f"{run.status()['page']['url']}/api/v1/checkpoints").json()
    aside = {(one["attempt"], one["step"]) for one in told if one["quarantined"]}
    assert aside
    assert all(attempt == 0 and step > proven for attempt, step in aside)


def test_without_a_session_a_button_says_how_to_get_one(browser: Browser, run: SmallRun) -> None:
    url = str(run.status()["page"]["url"])
    with opened(browser, url) as page:
        page.get_by_role("button", name="Pause", exact=True).click()
        expect(page.get_by_role("dialog")).to_contain_text("stepguard open")
        expect(page.locator("#ask-yes")).to_be_hidden()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
    assert run.order() == "GO"


@pytest.mark.parametrize(("scheme", "width", "height"), LOOKS)
def test_it_is_clean_for_everybody_in_both_themes_and_on_a_phone(
    browser: Browser, run: SmallRun, scheme: Any, width: int, height: int
) -> None:
    with opened(browser, link(run), scheme, width, height) as page:
        expect(page.locator("#toast")).to_contain_text("You may act here now")
        assert violations(page) == []
        overflow = page.locator("html").evaluate("page => page.scrollWidth - page.clientWidth")
        assert overflow <= 0, "it scrolls sideways"
        expect(page.locator("#toast")).to_be_hidden()
        page.get_by_role("button", name="Roll back").click()
        expect(page.get_by_role("dialog")).to_be_visible()
        assert violations(page) == []
