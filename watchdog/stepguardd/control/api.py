"""
The control API: what `stepguard status`, `pause` and the others ask of a running daemon.

GET never changes anything. Every answer is JSON; an error is `{"error": "one line"}`. Who may call at all is
the listener's business (`server` for the Unix socket); the application passes on whom it vouches for.
"""

import asyncio
import pwd
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException

from stepguardd.control.contract import REQUEST_BYTES_MAX, Daemon, Refused, Verb
from stepguardd.jsontext import to_json

ASK_TIMEOUT_S = 10.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Wish(BaseModel):
    """What every wish may carry. Unknown keys are refused: a misspelt one must not be lost in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    why: Annotated[str, StringConstraints(max_length=500, strip_whitespace=True)] = ""


class RollbackWish(Wish):
    """Back to the newest good checkpoint before this step; without one, before the incident's onset."""

    before_step: Annotated[int, Field(ge=0, le=10**12)] | None = None


class RestartWish(Wish):
    """Which server; it may be left out where there is only one."""

    server: Annotated[str, StringConstraints(max_length=64)] | None = None


class AckWish(Wish):
    """Which incident is known to a person; without an id the open one."""

    incident: Annotated[str, StringConstraints(max_length=64)] | None = None


class ModeWish(Wish):
    """How far the daemon may go by itself."""

    mode: Literal["shadow", "hold", "act"]


def create_app(daemon: Daemon, *, ask_timeout_s: float = ASK_TIMEOUT_S) -> Application:
    """The application for this daemon: wrapped so that no request body can grow beyond 64 KiB."""
    app = FastAPI(
        title="Stepguard control API", docs_url=None, redoc_url=None, openapi_url="/api/v1/openapi.json"
    )
    app.add_exception_handler(HTTPException, _say_http_error)
    app.add_exception_handler(RequestValidationError, _say_invalid)

    async def ask(request: Request, verb: Verb, wish: Wish) -> Response:
        args = wish.model_dump(exclude={"why"})
        try:
            async with asyncio.timeout(ask_timeout_s):
                answer = await daemon.ask(verb, caller(request.scope), wish.why, args)
        except Refused as refused:
            return _json({"error": str(refused)}, 409)
        except TimeoutError:
            return _json({"error": f"no answer from the daemon's own loop within {ask_timeout_s:g} s"}, 504)
        return _json(answer)

    @app.get("/healthz")
    async def healthz() -> Response:
        return _json({"ok": True})

    @app.get("/api/v1/status")
    async def status() -> Response:
        return _json(daemon.status())

    @app.post("/api/v1/pause")
    async def pause(request: Request, wish: Wish) -> Response:
        return await ask(request, "pause", wish)

    @app.post("/api/v1/resume")
    async def resume(request: Request, wish: Wish) -> Response:
        return await ask(request, "resume", wish)

    @app.post("/api/v1/rollback")
    async def rollback(request: Request, wish: RollbackWish) -> Response:
        return await ask(request, "rollback", wish)

    @app.post("/api/v1/restart-server")
    async def restart_server(request: Request, wish: RestartWish) -> Response:
        return await ask(request, "restart-server", wish)

    @app.post("/api/v1/ack")
    async def ack(request: Request, wish: AckWish) -> Response:
        return await ask(request, "ack", wish)

    @app.post("/api/v1/mode")
    async def mode(request: Request, wish: ModeWish) -> Response:
        return await ask(request, "mode", wish)

    return _BodyLimit(app)


def caller(scope: Mapping[str, Any]) -> str:
    """Who calls, in the words for the journal: by name, uid and pid where the listener vouches for them."""
    uid, pid = scope.get("peer", (None, None))
    if uid is None:
        return "unknown"
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = "nameless"
    return f"{name} (uid {uid}, pid {pid})"


async def _say_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return _json({"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code)


async def _say_invalid(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    first, *others = error.errors()
    where = ".".join(str(part) for part in first["loc"][1:]) or "the request's body"
    more = f" (and {len(others)} more)" if others else ""
    return _json({"error": " ".join(f"{where}: {first['msg']}{more}".split())}, 422)


def _json(value: object, status_code: int = 200) -> Response:
    return Response(to_json(value), status_code, media_type="application/json")


class _BodyLimit:
    """Answers 413 to a body over the limit, announced or not, before anybody has read it whole."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > REQUEST_BYTES_MAX:
                await _json({"error": f"the request is larger than {REQUEST_BYTES_MAX} bytes"}, 413)(
                    scope, receive, send
                )
                return
        given = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replay, send)
