"""A real daemon, a killed server, and the people who hear of it; no secret of theirs shows anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from alerts.http_peer import CHANNEL, TOKEN, Reply, http_peer
from alerts.mail_peer import PASSWORD, USER, mail_peer
from daemon_parts.small_run import small_run, training
from stepguard_grpo.model import write_base_model

KEY, HOOK, DEAD_MAN = "planted-signing-key-90aa", "planted-hook-c41b77", "planted-ping-88e2"
SECRETS = [TOKEN, PASSWORD, KEY, HOOK, DEAD_MAN]

pytestmark = pytest.mark.e2e


def secret(folder: Path, name: str, value: str) -> str:
    path = folder / name
    path.touch(mode=0o600)
    path.write_text(value + "\n")
    return str(path)


def said_by(*command: str) -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", "stepguardd", *command], capture_output=True, timeout=90, check=False
    )
    return done.stdout + done.stderr


def shown(folder: Path, but: Path) -> dict[str, bytes]:
    """Every plain file under a folder, without the secrets' own."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path): path.read_bytes() for path in files if but not in path.parents}


@pytest.mark.timeout(240)
def test_a_killed_server_is_one_thread_of_three_and_one_mail_with_the_curve_and_no_secret_shows(
    tmp_path: Path,
) -> None:
    model, hidden = tmp_path / "base", tmp_path / "secrets"
    write_base_model(model, seed=0)
    hidden.mkdir(mode=0o700)
    ca_file = tmp_path / "ca.pem"
    with (
        http_peer() as slack,
        http_peer() as hook,
        mail_peer(trustme.CA(), "starttls", ca_file) as post,
        small_run(tmp_path / "night", model, push=True) as run,
    ):
        hook.always = Reply(404, f"no such hook: /services/{HOOK} for {KEY}")
        slower = run.config.read_text().replace(
            "exec ", "sleep 2; exec "
        )  # so that its opening is told first
        run.config.write_text(slower)
        with run.config.open("a") as config:
            config.write(f"""
[alerts]
internal_hosts = ["127.0.0.1"]
ca_file = "{ca_file}"
dead_man_secret = "{secret(hidden, "ping", f"{hook.url}/{DEAD_MAN}")}"
[slack]
token_secret = "{secret(hidden, "token", TOKEN)}"
channel = "{CHANNEL}"
api_url = "{slack.url}/api"
[email]
host = "127.0.0.1"
port = {post.port}
user = "{USER}"
password_secret = "{secret(hidden, "password", PASSWORD)}"
sender = "stepguard@example.org"
to = ["oncall@example.org"]
[webhook]
url_secret = "{secret(hidden, "hook", f"{hook.url}/services/{HOOK}")}"
signing_secret = "{secret(hidden, "key", KEY)}"
""")
        run.daemon()
        run.until(run.serving, "the first start")
        with training(run) as trainer:
            run.until(lambda: trainer.committed >= 3, "three steps")
            run.kill_scheduler()
            run.until(lambda: post.mails, "the incident's mail")
            assert trainer.garbage == 0
        run.until(lambda: slack.called("/api/files.completeUploadExternal"), "the end in Slack")

        posts = slack.called("/api/chat.postMessage")
        (end,) = slack.called("/api/files.completeUploadExternal")
        assert [bool(one.json.get("thread_ts")) for one in posts] == [False, True], run.story()
        assert end.json["thread_ts"] == posts[1].json["thread_ts"]
        assert "Resolved" in end.json["initial_comment"]
        (upload,) = [one for one in slack.taken if one.path.startswith("/upload")]
        (mail,) = post.mails
        pictures = [part.get_content() for part in mail.walk() if part.get_content_type() == "image/png"]
        # Each is drawn when its message is, and the run may have gone on between the two.
        assert len(pictures) == 1
        assert all(picture.startswith(b"\x89PNG") for picture in (*pictures, upload.body))
        if keep := os.environ.get("STEPGUARD_KEEP_MAIL"):
            Path(keep, "curve.png").write_bytes(upload.body)
            Path(keep, "mail.eml").write_bytes(mail.as_bytes())

        asked = {one.path for one in hook.requests}
        assert asked == {f"/services/{HOOK}", f"/{DEAD_MAN}"}, "both met their failure"
        config = str(run.config)
        places = shown(tmp_path, hidden) | {
            "status": said_by("status", "--run-dir", str(run.run_dir)),
            "status --json": said_by("status", "--json", "--run-dir", str(run.run_dir)),
            "config show": said_by("config", "show", "--config", config),
            "alert-test": said_by("alert-test", "--config", config),
            "argv": Path(f"/proc/{run.daemons[-1].pid}/cmdline").read_bytes(),
        }
        assert b"webhook" in places["status --json"], "the trouble is told"
        assert b"404" in places["alert-test"]
        assert len(places) > 10
        found = [(place, one) for place, raw in places.items() for one in SECRETS if one.encode() in raw]
        assert found == []
