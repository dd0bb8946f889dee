"""A daemon of the tests' own, on a real control socket, in a thread of its own."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepguardd.chronicle.chronicle import Chronicle
from stepguardd.control.contract import SOCKET_NAME, Refused
from stepguardd.control.server import allowed_uids, serve_control
from stepguardd.web.reading import CheckpointDict

WELL: dict[str, Any] = {
    "run": "math",
    "mode": "act",
    "breaker": {"phase": "closed", "since_s": 3.0, "reason": ""},
    "gate": {"order": "GO", "generation": 3, "reason": ""},
    "trainer": {"alive": True, "step": 188, "attempt": 0, "phase": "TRAIN", "reward": 0.8, "beat_age_s": 0.1},
    "servers": [{"name": "sglang", "state": "serving", "since_s": 90.0, "pid": 7, "restarts": 0}],
    "incident": None,
    "budget": {"restarts_left": 3},
    "rewards": [0.1, None, 0.8],
    "refused_batches": 0,
    "warnings": [],
    "version": "0.1.0",
    "uptime_s": 100.0,
}


@dataclass
class FakeDaemon:
    """Answers with `state`; keeps what it was asked; refuses where `refusal` says why."""

    state: Mapping[str, Any] = field(default_factory=lambda: WELL)
    refusal: str | None = None
    asked: list[tuple[str, str, str, dict[str, Any]]] = field(default_factory=list)
    chronicle: Chronicle = field(default_factory=Chronicle)
    saved: list[CheckpointDict] = field(default_factory=list)
    quiet: float = 0.1

    def checkpoints(self) -> list[CheckpointDict]:
        return self.saved

    def quiet_s(self) -> float:
        return self.quiet

    def status(self) -> Mapping[str, Any]:
        return self.state

    async def ask(self, verb: str, who: str, why: str, args: Mapping[str, object]) -> Mapping[str, object]:
        self.asked.append((verb, who, why, dict(args)))
        if self.refusal is not None:
            raise Refused(self.refusal)
        return {"message": f"{verb} is under way"}


@contextlib.contextmanager
def serving(folder: Path, daemon: Any, uids: frozenset[int] | None = None) -> Iterator[Path]:
    """The socket of this daemon, served until the block ends; what goes wrong in there comes out here."""
    path = folder / SOCKET_NAME
    loop = asyncio.new_event_loop()
    failures: list[BaseException] = []
    task = loop.create_task(serve_control(daemon, path, uids=allowed_uids() if uids is None else uids))
    bound = threading.Event()

    def live() -> None:
        loop.call_soon(bound.set)
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            failures.append(error)
        finally:
            bound.set()
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = threading.Thread(target=live, name="fake-daemon")
    thread.start()
    try:
        assert bound.wait(10)
        yield path
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)
        thread.join(20)
        assert not thread.is_alive()
        if failures:
            raise failures[0]
