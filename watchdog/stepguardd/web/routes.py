"""The routes that only read, the page's own files, and the way from a one-time code to a session."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.responses import FileResponse, StreamingResponse

from stepguardd.control.api import caller, reply_json
from stepguardd.control.contract import Daemon
from stepguardd.web import reading
from stepguardd.web.keys import CODE_LIFE_S, SESSION_LIFE_S, Keys
from stepguardd.web.live import Live
from stepguardd.web.reading import CheckpointDict, EpisodeDict, NoticeDict, SeriesDict

PAGE: Final = Path(__file__).parent / "page"
TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
STEPS_MAX: Final = 1 << 62

Step = Annotated[int | None, Query(ge=-STEPS_MAX, le=STEPS_MAX)]


class Code(BaseModel):
    """What a one-time link carries behind its #."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    code: Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Nothing(BaseModel):
    """An empty object."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Session(BaseModel):
    """A session: send `Authorization: Bearer <token>` with each request."""

    token: str
    who: str
    expires_s: float


class Link(BaseModel):
    """A link that opens the page once; `expires_s` from now it is void."""

    url: str
    expires_s: float


def add_routes(app: FastAPI, daemon: Daemon, keys: Keys, live: Live) -> None:
    """Add them to the application."""
    _add_reading(app, daemon, live)
    _add_sessions(app, daemon, keys)
    _add_page(app)


def _add_reading(app: FastAPI, daemon: Daemon, live: Live) -> None:
    @app.get("/api/v1/series", responses=_answer(SeriesDict))
    async def series(
        points: Annotated[int, Query(ge=16, le=reading.POINTS_MAX)] = reading.POINTS_DEFAULT,
        from_step: Step = None,
        to_step: Step = None,
    ) -> Response:
        """The reward curve, thinned with every peak and trough kept."""
        return reply_json(reading.series(daemon.chronicle, from_step, to_step, points))

    @app.get("/api/v1/incidents", responses=_answer(list[EpisodeDict]))
    async def incidents(limit: Annotated[int, Query(ge=1, le=256)] = 50) -> Response:
        """The incidents with their timelines, the newest first."""
        return reply_json(reading.incidents(daemon.chronicle, limit))

    @app.get("/api/v1/events", responses=_answer(list[NoticeDict]))
    async def events(
        after: Annotated[int, Query(ge=0, le=STEPS_MAX)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """What was told, in order; `after` is the id of the newest one that is known already."""
        return reply_json(reading.events(daemon.chronicle, after, limit))

    @app.get("/api/v1/servers", responses=_answer(list[dict[str, Any]]))
    async def servers() -> Response:
        """The inference servers as the status has them."""
        return reply_json(daemon.status().get("servers", []))

    @app.get("/api/v1/checkpoints", responses=_answer(list[CheckpointDict]))
    async def checkpoints() -> Response:
        """The checkpoints that are known, in ascending order of attempt and step."""
        return reply_json(daemon.checkpoints())

    stream: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Events"}
    }

    @app.get("/api/v1/live", responses=stream, response_class=StreamingResponse)
    async def live_events() -> Response:
        """Server-sent events without an end: status, points, notices, incidents."""
        if live.is_full():
            return reply_json({"error": "too many pages are open; close one"}, 503)
        return StreamingResponse(
            live.stream(), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    metrics_answer: dict[int | str, dict[str, Any]] = {
        200: {
            "content": {"application/openmetrics-text": {"schema": {"type": "string"}}},
            "description": "Figures",
        }
    }

    @app.get("/metrics", responses=metrics_answer, response_class=Response)
    async def metrics() -> Response:
        """The run's figures for Prometheus, in OpenMetrics text."""
        from stepguardd.web.metrics import CONTENT_TYPE, exposition  # noqa: PLC0415 - only where scraped

        text = exposition(daemon.status(), quiet_s=daemon.quiet_s())
        return Response(text, headers={"content-type": CONTENT_TYPE, "cache-control": "no-store"})


def _add_sessions(app: FastAPI, daemon: Daemon, keys: Keys) -> None:
    @app.post("/api/v1/link", responses=_answer(Link))
    async def link(request: Request, wish: Nothing) -> Response:
        """A link that opens the page once, for callers at the control socket, whom the kernel names."""
        del wish
        if "peer" not in request.scope:
            return reply_json({"error": "only the control socket gives links: see `stepguard open`"}, 403)
        page = daemon.status().get("page")
        url = page.get("url") if isinstance(page, dict) else None
        if url is None:
            why = page.get("failure") if isinstance(page, dict) else None
            return reply_json({"error": f"there is no page: {why or 'web.enabled is false'}"}, 409)
        code = keys.code(caller(request.scope))
        return reply_json({"url": f"{url}/#code={code}", "expires_s": CODE_LIFE_S})

    @app.post("/api/v1/session", responses=_answer(Session))
    async def session(wish: Code) -> Response:
        """Turn a one-time code into a session."""
        opened = keys.redeem(wish.code)
        if opened is None:
            return reply_json(
                {"error": "the link was used already, or is too old: `stepguard open` gives a new one"}, 403
            )
        token, who = opened
        return reply_json({"token": token, "who": who, "expires_s": SESSION_LIFE_S})


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return _file("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return _plotly() if name == "plotly.min.js" else _file(name)


def _file(name: str) -> Response:
    path = PAGE / name
    kind = TYPES.get(path.suffix)
    if kind is None or path.parent != PAGE or not path.is_file():
        return reply_json({"error": f"no file {name!r}"}, 404)
    return Response(
        path.read_bytes(), headers={"content-type": f"{kind}; charset=utf-8", "cache-control": "no-cache"}
    )


def _plotly() -> Response:
    """Plotly's own script out of its package, which is not imported for it: that would cost 20 MB."""
    spec = importlib.util.find_spec("plotly")
    path = Path((spec.origin if spec else None) or "/nowhere").parent / "package_data" / "plotly.min.js"
    if not path.is_file():
        return reply_json({"error": "the package plotly is not installed: no curve is drawn"}, 404)
    headers = {"cache-control": "private, max-age=86400"}
    return FileResponse(path, media_type="text/javascript; charset=utf-8", headers=headers)


def _answer(model: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model}}
