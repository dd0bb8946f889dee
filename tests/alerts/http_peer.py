"""An HTTP server on loopback that plays Slack and a user's own webhook, and fails as it is told."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "xoxb-planted-token-7f3a9c"
CHANNEL = "C0123456789"
BLOCK_CHARS_MAX = 3000


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered in place of what Slack would say; `hangs` answers nothing."""

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    hangs: bool = False


class HttpPeer:
    """`replies` are given to the next requests, `always` to all of them; without either it is Slack."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.taken: list[Request] = []
        self.replies: deque[Reply] = deque()
        self.always: Reply | None = None
        self.threads: set[str] = set()
        self.closing = threading.Event()
        peer = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                request = Request(self.path, dict(self.headers.items()), self.rfile.read(length))
                reply = peer.reply(request)
                if reply.hangs:
                    peer.closing.wait(30)
                    return
                raw = reply.body.encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = _answer  # noqa: N815 - http.server's names

            def log_message(self, *_: object) -> None:
                """Keep the tests' output quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def reply(self, request: Request) -> Reply:
        """What this request gets; it is `taken` if it gets what a well peer would say."""
        self.requests.append(request)
        scripted = self.replies.popleft() if self.replies else self.always
        if scripted is not None:
            return scripted
        reply = self._as_slack(request)
        self.taken.append(request)
        return reply

    def called(self, path: str) -> list[Request]:
        return [one for one in self.taken if one.path == path]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join(timeout=10)
        self._server.server_close()

    def _as_slack(self, request: Request) -> Reply:
        if not request.path.startswith("/api/"):
            return Reply(body="ok")
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _no("invalid_auth")
        method = request.path.removeprefix("/api/")
        if method == "files.getUploadURLExternal":
            return _yes(upload_url=f"{self.url}/upload/F1?signed=1", file_id="F1")
        body = request.json
        if body.get("channel", body.get("channel_id")) != CHANNEL:
            return _no("channel_not_found")
        if body.get("thread_ts") is not None and body["thread_ts"] not in self.threads:
            return _no("thread_not_found")
        if method == "files.completeUploadExternal":
            return _yes(files=body["files"])
        texts = [block["text"]["text"] for block in body["blocks"] if "text" in block]
        if any(not text or len(text) > BLOCK_CHARS_MAX for text in texts):
            return _no("invalid_blocks")
        ts = f"1700000000.{len(self.threads):06}"
        self.threads.add(ts)
        return _yes(ts=ts, channel=CHANNEL)


def _yes(**values: object) -> Reply:
    return Reply(body=json.dumps({"ok": True} | values))


def _no(error: str) -> Reply:
    return Reply(body=json.dumps({"ok": False, "error": error}))


@contextlib.contextmanager
def http_peer() -> Iterator[HttpPeer]:
    peer = HttpPeer()
    try:
        yield peer
    finally:
        peer.close()
