"""
Who may come in over TCP, and with what: the checks before the application sees a request.

A browser is anybody's deputy, so a request must name this host (against DNS rebinding), must not come from
another site's page (against forged requests), and must carry the token or a session to change anything.
Nothing changes by GET.
"""

from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from stepguardd.control.api import reply_json
from stepguardd.web.keys import Keys

if TYPE_CHECKING:
    from stepguardd.control.api import Application, Receive, Scope, Send

SESSION_PATH: Final = "/api/v1/session"
# What a browser gets before it has a session, and what says nothing about the run.
OPEN_PATHS: Final = ("/", "/healthz")
READING: Final = frozenset({"GET", "HEAD"})

# Plotly sets styles from its script, so styles may be inline; scripts may not.
HEADERS: Final = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        b"frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
]


class Doors:
    """
    The application behind its doors.

    Args:
        app: what is behind them.
        keys: what opens them.
        hosts: the names under which this host may be called, without ports.
        reads_are_open: whether reading needs no key: on loopback only.

    """

    def __init__(
        self, app: "Application", keys: Keys, *, hosts: Iterable[str], reads_are_open: bool = True
    ) -> None:
        self._app = app
        self._keys = keys
        self._hosts = frozenset(host.lower() for host in hosts)
        self._reads_are_open = reads_are_open

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """One request: refused here, or passed on with its caller's name."""
        if scope["type"] != "http":
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        who, refusal = self._look(scope)
        if refusal is not None:
            code, why = refusal
            extra = {"www-authenticate": "Bearer"} if code == 401 else {}
            await reply_json({"error": why}, code, extra)(scope, receive, with_headers)
            return
        await self._app({**scope, "caller": who}, receive, with_headers)

    def _look(self, scope: "Scope") -> tuple[str | None, tuple[int, str] | None]:
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value.decode("latin-1"))
        host = headers.get(b"host", [])
        if len(host) != 1 or _name(host[0]) not in self._hosts:
            return None, (421, "this host is not called so here; see allowed_hosts in [web]")
        reading = scope["method"] in READING
        path = scope["path"]
        if not _same_site(headers, host[0], navigation=reading and path == "/"):
            return None, (403, "another site's page may not do this")
        bearer = _bearer(headers)
        who = None if bearer is None else self._keys.holder(bearer)
        if who is not None:
            return who, None
        if path == SESSION_PATH or path in OPEN_PATHS or path.startswith("/static/"):
            return None, None
        if reading and self._reads_are_open:
            return None, None
        if bearer is None:
            return None, (401, "this needs the token, or the page's session: see `stepguard open`")
        return None, (401, "the token or session is not valid (any more): see `stepguard open`")


def _name(host: str) -> str | None:
    """The host's name without its port; None for what is no host."""
    try:
        parts = urlsplit(f"//{host}")
        port = parts.port  # raises where it is none
    except ValueError:
        return None
    if parts.netloc != host or parts.username is not None or (port is not None and port < 0):
        return None
    return parts.hostname


def _same_site(headers: dict[bytes, list[str]], host: str, *, navigation: bool) -> bool:
    """A browser says where a request comes from; other programs say nothing."""
    for origin in headers.get(b"origin", ()):
        if urlsplit(origin).netloc != host or not origin.startswith(("http://", "https://")):
            return False
    sites = headers.get(b"sec-fetch-site", ())
    return navigation or all(site in {"same-origin", "none"} for site in sites)


def _bearer(headers: dict[bytes, list[str]]) -> str | None:
    given = headers.get(b"authorization", [])
    if len(given) != 1:
        return None
    scheme, _, token = given[0].partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None
