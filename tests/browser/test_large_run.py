"""A run of a thousand servers and a hundred thousand steps, in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.page import DIPS, SERVERS, STEPS, large_run
from playwright.sync_api import Browser, expect

from browser.looking import opened, violations

pytestmark = pytest.mark.e2e
# Where to leave what was looked at, for a person: docs/img, say.
PICTURES = os.environ.get("STEPGUARD_PICTURES")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with large_run() as (_pid, url, _link):
        yield url


@pytest.mark.parametrize(
    ("name", "scheme", "width", "height", "whole"),
    [("light-desktop", "light", 1280, 900, True), ("dark-phone", "dark", 390, 844, False)],
)
def test_a_thousand_servers_are_one_map_that_names_those_which_fail(
    browser: Browser, url: str, name: str, scheme: Any, width: int, height: int, whole: bool
) -> None:
    with opened(browser, url, scheme, width, height) as page:
        cells = page.locator("#servers .heat i")
        expect(cells).to_have_count(SERVERS)
        expect(page.locator("#servers .counts")).to_contain_text("8 dead")
        expect(page.locator("#servers .rows")).to_contain_text("rollout-0416")
        cells.nth(417).click()
        expect(page.locator("#servers")).to_contain_text("rollout-0417: dead")
        # What one comes for at night stands first, and nothing invites to let go of what is being repaired.
        expect(page.locator("#why")).to_contain_text("server died: rollout-0416")
        expect(page.locator("#next")).to_contain_text("Nothing to do yet")
        expect(page.locator("#warnings + #story-card")).to_contain_text("held now")
        expect(page.locator("#do-resume")).not_to_have_class("primary")
        overflow = page.locator("html").evaluate("page => page.scrollWidth - page.clientWidth")
        assert overflow <= 0, "it scrolls sideways"
        assert violations(page) == []
        if PICTURES is not None:
            page.locator("h1").click()
            page.screenshot(path=Path(PICTURES) / f"page-{name}.png", full_page=whole)


def test_a_hundred_thousand_steps_are_thinned_and_no_dip_is_lost(url: str) -> None:
    drawn = httpx.get(f"{url}/api/v1/series?points=800", timeout=30, trust_env=False).json()
    assert drawn["points"] >= STEPS
    at = [pair for line in drawn["lines"] for pair in zip(line["steps"], line["values"], strict=True)]
    assert len(at) <= 1000
    assert {step for step, value in at if value == 0.02} == set(DIPS)
