"""
What goes on, as it goes on: one stream of server-sent events for each page that is open.

A stream holds no copy of anything: it has a place in the chronicle and goes on from there, so a slow reader
costs nothing and misses no notice that is still kept.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Final

from stepguardd.control.contract import Daemon
from stepguardd.jsontext import to_json
from stepguardd.web.reading import notice_json

STREAMS_MAX: Final = 16
EVERY_S: Final = 1.0
EVERY_LARGE_S: Final = 3.0
LARGE_SERVERS: Final = 64


class Live:
    """The streams of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._open = 0
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Let every stream come to its end."""
        self._ending.set()

    def is_full(self) -> bool:
        """Whether as many are open as there may be."""
        return self._open >= STREAMS_MAX

    async def stream(self) -> AsyncIterator[str]:
        """
        Events until the reader goes away: `status` at least every few seconds, `points`, `notices`,
        and `incidents` when one has changed and is worth asking for.
        """
        chronicle = self._daemon.chronicle
        woken = asyncio.Event()
        done = chronicle.waiting(woken.set)
        points = chronicle.curve.points
        told = chronicle.notices[-1].id if chronicle.notices else 0
        changed = chronicle.incidents_changed
        self._open += 1
        try:
            while not self._ending.is_set():
                woken.clear()
                status = self._daemon.status()
                yield _event("status", to_json(status))
                if chronicle.curve.points > points:
                    fresh = [point for number, point in chronicle.recent if number > points]
                    rows = [[one.attempt, one.step, round(one.wall, 3), one.reward] for one in fresh]
                    total = chronicle.curve.points
                    missed = total - points > len(fresh)
                    yield _event("points", to_json({"points": rows, "missed": missed, "total": total}))
                    points = total
                if notices := chronicle.told_since(told):
                    yield _event("notices", to_json([notice_json(one) for one in notices]))
                    told = notices[-1].id
                if chronicle.incidents_changed != changed:
                    changed = chronicle.incidents_changed
                    yield _event("incidents", json.dumps({"changed": changed}))
                servers = status.get("servers")
                large = isinstance(servers, list) and len(servers) > LARGE_SERVERS
                await _either(woken, self._ending, EVERY_LARGE_S if large else EVERY_S)
        finally:
            self._open -= 1
            done()


async def _either(woken: asyncio.Event, ending: asyncio.Event, timeout_s: float) -> None:
    """Until something was told, the daemon ends, or the time is over."""
    waits = [asyncio.ensure_future(event.wait()) for event in (woken, ending)]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"
