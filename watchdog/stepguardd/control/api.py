"""
The API of a running daemon: what the command line, the page and Prometheus ask of it.

GET never changes anything. Every answer is JSON but the page's own files, the stream of events and the
metrics; an error is `{"error": "one line"}`. Who may call at all is the listener's business (`server` for the
Unix socket, `web.doors` for TCP); the application passes on whom it vouches for.
"""

import asyncio
import pwd
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException

from stepguard import __version__
from stepguardd.control.contract import REQUEST_BYTES_MAX, Daemon, Refused, Verb
from stepguardd.core.planned import PLAN_MAX_S
from stepguardd.jsontext import to_json

if TYPE_CHECKING:
    from stepguardd.web.keys import Keys
    from stepguardd.web.live import Live

ASK_TIMEOUT_S = 10.0
QUIET_MAX_S = 5.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Wish(BaseModel):
    """What every wish may carry. Unknown keys are refused: a misspelt one must not be lost in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    why: Annotated[str, StringConstraints(max_length=500), AfterValidator(str.strip)] = ""


def _whole(value: object) -> object:
    """JSON has one kind of number: 188.0 is the step 188."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class RollbackWish(Wish):
    """Back to the newest good checkpoint before this step; without one, before the incident's onset."""

    before_step: Annotated[Annotated[int, Field(ge=0, le=10**12)] | None, BeforeValidator(_whole)] = None


class RestartWish(Wish):
    """Which server; it may be left out where there is only one."""

    server: Annotated[str, StringConstraints(max_length=64)] | None = None


class PlanWish(Wish):
    """Which server will be silent on purpose, all without a name, and for how long; 0 takes that back."""

    server: Annotated[str, StringConstraints(max_length=64)] | None = None
    for_s: Annotated[float, Field(ge=0, le=PLAN_MAX_S, allow_inf_nan=False)]


class AckWish(Wish):
    """Which incident is known to a person; without an id the open one."""

    incident: Annotated[str, StringConstraints(max_length=64)] | None = None


class ModeWish(Wish):
    """How far the daemon may go by itself."""

    mode: Literal["shadow", "hold", "act"]


class Trouble(BaseModel):
    """What went wrong, in one line."""

    error: str


class Accepted(BaseModel):
    """A wish was taken in; a `message` among the facts is for a person."""

    model_config = ConfigDict(extra="allow")


# Only for the description of the API: who holds a token is asked at the door (`web.doors`).
TOKEN_NEEDED = [
    Security(
        HTTPBearer(
            auto_error=False,
            description="The run's token, or a session of its page. The control socket needs neither.",
        )
    )
]

_TROUBLE: dict[int | str, dict[str, Any]] = {
    code: {"model": Trouble, "description": words}
    for code, words in {
        400: "The body is no JSON",
        401: "No valid token or session",
        403: "Not from here, or not by this caller",
        409: "Refused: it cannot be done now",
        413: "The request is too large",
        421: "This host is not called so",
        422: "The request is not exact",
        503: "Not now",
        504: "The daemon's own loop gave no answer",
    }.items()
}


def create_app(
    daemon: Daemon,
    keys: "Keys | None" = None,
    live: "Live | None" = None,
    *,
    ask_timeout_s: float = ASK_TIMEOUT_S,
) -> Application:
    """
    The application for this daemon: wrapped so that no request body can grow beyond 64 KiB.

    Args:
        daemon: who answers and is asked.
        keys: what opens the page; without any, a secret that nobody knows.
        live: its streams, where somebody has to end them.
        ask_timeout_s: how long the daemon may take to accept a wish.

    """
    from stepguardd.web.keys import Keys  # noqa: PLC0415 - they use this module's names
    from stepguardd.web.live import Live  # noqa: PLC0415
    from stepguardd.web.routes import add_routes  # noqa: PLC0415

    app = FastAPI(
        title="Stepguard",
        version=__version__,
        description=__doc__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/v1/openapi.json",
        responses=_TROUBLE,
        redirect_slashes=False,
    )
    app.add_exception_handler(HTTPException, _say_http_error)
    app.add_exception_handler(RequestValidationError, _say_invalid)
    _add_wishes(app, daemon, ask_timeout_s)

    @app.get("/healthz", responses={200: {"model": dict[str, Any]}})
    async def healthz() -> Response:
        """Whether the decision loop turns: 200, or 503 where it decided nothing for five seconds."""
        quiet_s = daemon.quiet_s()
        well = quiet_s < QUIET_MAX_S
        if well:
            return reply_json({"ok": True, "decided_s_ago": round(quiet_s, 3)})
        return reply_json({"error": f"the decision loop is silent for {quiet_s:.0f} s"}, 503)

    @app.get("/api/v1/status", responses={200: {"model": dict[str, Any]}})
    async def status() -> Response:
        """How the run is."""
        return reply_json(daemon.status())

    add_routes(app, daemon, keys or Keys.forgotten_at_the_end(), live or Live(daemon))
    return _BodyLimit(app)


def _add_wishes(app: FastAPI, daemon: Daemon, ask_timeout_s: float) -> None:
    async def ask(request: Request, verb: Verb, wish: Wish) -> Response:
        args = wish.model_dump(exclude={"why"})
        try:
            async with asyncio.timeout(ask_timeout_s):
                answer = await daemon.ask(verb, caller(request.scope), wish.why, args)
        except Refused as refused:
            return reply_json({"error": str(refused)}, 409)
        except TimeoutError:
            return reply_json(
                {"error": f"no answer from the daemon's own loop within {ask_timeout_s:g} s"}, 504
            )
        return reply_json(answer)

    accepted: dict[int | str, dict[str, Any]] = {200: {"model": Accepted}}

    @app.post("/api/v1/pause", responses=accepted, dependencies=TOKEN_NEEDED)
    async def pause(request: Request, wish: Wish) -> Response:
        """Hold the trainer before its next optimizer step."""
        return await ask(request, "pause", wish)

    @app.post("/api/v1/resume", responses=accepted, dependencies=TOKEN_NEEDED)
    async def resume(request: Request, wish: Wish) -> Response:
        """Let go of whatever holds the trainer."""
        return await ask(request, "resume", wish)

    @app.post("/api/v1/rollback", responses=accepted, dependencies=TOKEN_NEEDED)
    async def rollback(request: Request, wish: RollbackWish) -> Response:
        """Go back to the newest good checkpoint before a step."""
        return await ask(request, "rollback", wish)

    @app.post("/api/v1/restart-server", responses=accepted, dependencies=TOKEN_NEEDED)
    async def restart_server(request: Request, wish: RestartWish) -> Response:
        """Restart a server, and renew its weights."""
        return await ask(request, "restart-server", wish)

    @app.post("/api/v1/plan-server", responses=accepted, dependencies=TOKEN_NEEDED)
    async def plan_server(request: Request, wish: PlanWish) -> Response:
        """Announce that a server will be silent for a while: what speaks softly against it is excused."""
        return await ask(request, "plan-server", wish)

    @app.post("/api/v1/ack", responses=accepted, dependencies=TOKEN_NEEDED)
    async def ack(request: Request, wish: AckWish) -> Response:
        """Say that an incident is known."""
        return await ask(request, "ack", wish)

    @app.post("/api/v1/mode", responses=accepted, dependencies=TOKEN_NEEDED)
    async def mode(request: Request, wish: ModeWish) -> Response:
        """Set how far the daemon may go by itself."""
        return await ask(request, "mode", wish)


def caller(scope: Mapping[str, Any]) -> str:
    """Who calls, in the words for the journal: by name, uid and pid where the listener vouches for them."""
    if isinstance(named := scope.get("caller"), str):
        return named
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
    words = f"{request.method} {request.url.path}: {error.detail}"
    return reply_json({"error": words}, error.status_code, error.headers)  # with Allow, where it has one


async def _say_invalid(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    first, *others = error.errors()
    where = ".".join(str(part) for part in first["loc"][1:]) or "the request's body"
    more = f" (and {len(others)} more)" if others else ""
    return reply_json({"error": " ".join(f"{where}: {first['msg']}{more}".split())}, 422)


def reply_json(value: object, status_code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that no cache keeps."""
    named = {"cache-control": "no-store", **(headers or {})}
    return Response(to_json(value), status_code, named, media_type="application/json")


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
                await reply_json({"error": f"the request is larger than {REQUEST_BYTES_MAX} bytes"}, 413)(
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
