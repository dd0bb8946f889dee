"""The demo's incident as people meet it: a thread in Slack, a mail, the live page and the report."""

from __future__ import annotations

import os
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
import trustme
from playwright.sync_api import Browser, Page, expect

from alerts.http_peer import CHANNEL, TOKEN, http_peer
from alerts.mail_peer import PASSWORD, USER, mail_peer
from browser.looking import link_of, opened, violations
from stepguardd.demo.conduct import Arena, Plan
from stepguardd.demo.faults import SCENARIOS, Fault, strike
from stepguardd.incidents.folders import MARKDOWN, PAGE, folder_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
# Where to leave what was looked at, for a person.
PICTURES = os.environ.get("STEPGUARD_PICTURES")
# A busy machine may not look while it is held: what the page said is kept by the page.
KEEP_WHAT_IT_SAYS = """() => {
  window.said = [];
  const hero = document.querySelector("#hero .say");
  new MutationObserver(() => window.said.push(hero.innerText.replaceAll("\\n", " ").replace(/^\\S+ /, "")))
    .observe(hero, {subtree: true, childList: true, characterData: true});
}"""
LOOKS: list[tuple[Any, int]] = [("light", 1200), ("dark", 390)]


class Night(Arena):
    """The demo's run with people to tell, and a server that takes its time to start, as real ones do."""

    alerts = ""

    def _config(self, run_dir: Path) -> str:
        return super()._config(run_dir) + self.alerts

    def _server_command(self) -> list[str]:
        return ["sh", "-c", 'sleep 3; exec "$@"', "sh", *super()._server_command()]


def until(what: Callable[[], object], whats_name: str) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline, whats_name
        time.sleep(0.05)


@contextmanager
def shown(browser: Browser, source: Path, scheme: Any, width: int) -> Iterator[Page]:
    """A file in the browser, which may fetch nothing and complain of nothing."""
    with closing(
        browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    ) as context:
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda said: complaints.append(said.text))
        page.on("request", lambda asked: complaints.append(asked.url) if asked.url[:4] == "http" else None)
        page.goto(source.as_uri())
        overflow = page.locator("html").evaluate("page => page.scrollWidth - page.clientWidth")
        assert overflow <= 0, "it scrolls sideways"
        assert violations(page) == []
        yield page
        if PICTURES is not None:
            page.screenshot(path=Path(PICTURES, f"{source.stem}-{scheme}-{width}.png"), full_page=True)
        assert complaints == []


def as_a_mail_reader_has_it(mail: EmailMessage, folder: Path) -> Path:
    """The mail's HTML with its picture in it, as a file."""
    parts = {part.get_content_type(): part for part in mail.walk()}
    picture = parts["image/png"]
    data = f"data:image/png;base64,{b64encode(picture.get_content()).decode()}"
    text = parts["text/html"].get_content()
    found = f"cid:{picture['Content-ID'].strip('<>')}"
    assert text.count(found) == 1
    path = folder / "mail.html"
    path.write_text(text.replace(found, data))
    return path


def test_one_incident_is_a_thread_a_mail_a_live_page_and_a_report(browser: Browser, tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    for name, value in (("token", TOKEN), ("password", PASSWORD)):
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text(value)
    with http_peer() as slack, mail_peer(trustme.CA(), "starttls", ca_file) as post:
        Night.alerts = f"""
[alerts]
internal_hosts = ["127.0.0.1"]
ca_file = "{ca_file}"
[slack]
token_secret = "{tmp_path}/token"
channel = "{CHANNEL}"
api_url = "{slack.url}/api"
[email]
host = "127.0.0.1"
port = {post.port}
user = "{USER}"
password_secret = "{tmp_path}/password"
sender = "stepguard@example.org"
to = ["oncall@example.org"]
"""
        plan = Plan(scenario=SCENARIOS[Fault.KILL], root=tmp_path / "demo", guarded=True, steps=400, seed=0)
        with Night(plan) as night:
            assert night.run_dir is not None
            with opened(browser, link_of(night.run_dir)) as page:
                until(lambda: (night.status()["trainer"]["committed_step"] or 0) >= 3, "steps are taken")
                expect(page.locator("#word")).to_have_text("Going")
                page.evaluate(KEEP_WHAT_IT_SAYS)
                strike(Fault.KILL, night.status()["servers"][0]["pid"])
                if PICTURES is not None:
                    expect(page.locator("#word")).to_have_text("Held")
                    page.screenshot(path=Path(PICTURES, "live.png"))
                expect(page.locator("#story")).to_contain_text("the run is well again")
                expect(page.locator("#word")).to_have_text("Going")
                said = page.evaluate("window.said")
            held = " ".join(one for one in said if one.startswith("Held"))
            assert "server died: sglang" in held.lower(), said
            assert "Nothing to do yet: Stepguard is repairing it" in held
            folder = folder_of(night.root / "state", 1)
            until(lambda: post.mails, "the mail")
            until(lambda: slack.called("/api/files.completeUploadExternal"), "the last message in Slack")
            until(lambda: "State: closed" in _text(folder / MARKDOWN), "the report of the whole incident")
            posts = slack.called("/api/chat.postMessage")
            (end,) = slack.called("/api/files.completeUploadExternal")
            (mail,) = post.mails  # the end of the night, a trainer that is ended, is another story

    assert len(posts) == 2, [one.json["text"] for one in posts]
    opening, going_on = posts
    thread = going_on.json["thread_ts"]
    assert (opening.json.get("thread_ts"), thread, end.json["thread_ts"]) == (None, thread, thread)
    assert "sglang died" in opening.json["text"]
    assert "Resolved" in end.json["initial_comment"]
    assert "Resolved: sglang died" in mail["Subject"]
    words = next(part for part in mail.walk() if part.get_content_type() == "text/plain").get_content()
    assert max(map(len, words.splitlines())) <= 80, words
    letter = as_a_mail_reader_has_it(mail, tmp_path)
    for scheme, width in LOOKS:
        with shown(browser, letter, scheme, width) as page:
            expect(page.locator("body")).to_contain_text("Nothing is left to do.")
            expect(page.locator("img")).to_have_js_property("complete", True)
            assert page.locator("img").evaluate("image => image.naturalWidth") > 600
        with shown(browser, folder / PAGE, scheme, width) as page:
            expect(page.locator("h1")).to_contain_text("Incident 1: the inference server crashed")
            for title in ("What to do", "The reward", "What happened", "Why, most likely", "What it cost"):
                expect(page.get_by_role("heading", name=title)).to_be_visible()
            expect(page.locator("svg.chart .held")).to_be_visible()
            expect(page.locator(".tile", has_text="optimizer steps on garbage")).to_contain_text("0")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
