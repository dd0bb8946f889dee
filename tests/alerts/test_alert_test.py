"""`stepguard alert-test` says of each channel whether it works, and how to mend it, without a secret."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme

from alerts.http_peer import HttpPeer, Reply, http_peer
from alerts.mail_peer import PASSWORD, USER, mail_peer
from stepguardd.alerts import setup
from stepguardd.alerts.channels.contract import Channel, Draw
from stepguardd.cli import main
from stepguardd.cli.alert_test import tried
from stepguardd.config import load_config
from stepguardd.core.alerts.words import Message

HOOK, KEY = "planted-hook-77d1", "planted-key-0c2e"


def written(folder: Path, *sections: str) -> Path:
    path = folder / "config.toml"
    path.write_text('[alerts]\ninternal_hosts = ["127.0.0.1"]\n' + "\n".join(sections))
    return path


def secret(folder: Path, name: str, value: str) -> str:
    (folder / name).touch(mode=0o600)
    (folder / name).write_text(value)
    return str(folder / name)


def webhook(folder: Path, peer: HttpPeer) -> str:
    url, key = secret(folder, "hook", f"{peer.url}/{HOOK}"), secret(folder, "key", KEY)
    return f'[webhook]\nurl_secret = "{url}"\nsigning_secret = "{key}"\n'


def slack(folder: Path, peer: HttpPeer) -> str:
    return f'[slack]\nwebhook_secret = "{secret(folder, "slack", f"{peer.url}/services/x")}"\n'


def run(config: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["alert-test", "--config", str(config), *more])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_each_channel_gets_one_message_that_says_what_it_is(tmp_path: Path) -> None:
    """By a process of its own, as people run it: TLS says goodbye when the loop of a test would be over."""
    ca_file = tmp_path / "ca.pem"
    with http_peer() as chat, http_peer() as hook, mail_peer(trustme.CA(), "tls", ca_file) as post:
        mail = f"""
[email]
host = "127.0.0.1"
port = {post.port}
security = "tls"
user = "{USER}"
password_secret = "{secret(tmp_path, "password", PASSWORD)}"
sender = "stepguard@example.org"
to = ["oncall@example.org"]
"""
        config = written(
            tmp_path, f'ca_file = "{ca_file}"', slack(tmp_path, chat), mail, webhook(tmp_path, hook)
        )
        command = [sys.executable, "-m", "stepguardd", "alert-test", "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout) == (0, "slack: ok\nemail: ok\nwebhook: ok\n"), done.stderr
    (in_chat,), (at_hook,), (in_mail,) = chat.requests, hook.requests, post.mails
    for told in (in_chat.json["text"], at_hook.json["headline"], in_mail["Subject"]):
        assert "This is a test: alerts of this run arrive here" in told
    assert at_hook.json["kind"] == "test"
    assert any(part.get_content_type() == "image/png" for part in in_mail.walk())


def test_one_that_fails_is_bad_news_and_does_not_keep_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with http_peer() as chat, http_peer() as hook:
        hook.always = Reply(404, f"no {HOOK} here for {KEY}")
        config = written(tmp_path, slack(tmp_path, chat), webhook(tmp_path, hook))
        assert run(config, "--json") == 1
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["channels"]
        assert [(one["channel"], one["ok"]) for one in found] == [("slack", True), ("webhook", False)]
        assert "404" in found[1]["error"]
        assert run(config) == 1
    told = capsys.readouterr()
    assert told.out.splitlines() == ["slack: ok", f"webhook: failed: {found[1]['error']}"]
    assert not any(one in told.out + told.err + str(found) for one in (HOOK, KEY))


def through(channel: Channel, folder: Path) -> dict[str, Any]:
    (found,) = asyncio.run(tried([channel], load_config(written(folder)), timeout_s=0.3))
    return dict(found)


def test_one_that_hangs_is_given_up_and_says_for_how_long(tmp_path: Path) -> None:
    with http_peer() as hook:
        hook.always = Reply(hangs=True)
        config = load_config(written(tmp_path, webhook(tmp_path, hook)))
        ((channel, _),) = setup.channels(config, setup.peers(config))
        found = through(channel, tmp_path)
        assert hook.requests, "it was asked"
    assert found == {"channel": "webhook", "ok": False, "error": "no answer within 0.3 s"}


class WithABug:
    name = "webhook"

    async def send(self, message: Message, root: str | None, draw: Draw) -> str | None:
        raise RuntimeError(f"with {HOOK} in it")


def test_a_bug_of_a_channel_is_called_one(tmp_path: Path) -> None:
    error = str(through(WithABug(), tmp_path)["error"])
    assert error.startswith("a fault of Stepguard: RuntimeError")
    assert HOOK not in error


def test_without_a_channel_the_sections_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path)
    assert run(config) == 1
    assert "[slack], [email], [webhook] or [apprise]" in capsys.readouterr().err
    assert run(config, "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"channels": []}


def test_a_config_that_is_wrong_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path, '[slack]\ntokn_secret = "x"\n')
    assert run(config) == 2
    assert "tokn_secret" in capsys.readouterr().err
