"""A real server, embedded or SGLang, for the tests of evidence: looked at by the daemon's own sources."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx

from daemon_parts.server_evidence import SENT
from stepguardd import proc
from stepguardd.core.events import GenerationAsked, SchedulerAsked, ServerProbed
from stepguardd.sources import sglang

PASS_S = 0.2
PROMPT = [10, 1, 2, 3, 4, 11]
TIMEOUT_S = 2.0
HEALTH_TIMEOUT_S = 60.0


class HttpSubject:
    """The server at this address, whose processes are on this machine."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self._names = sglang.Names()
        self._calls: list[threading.Thread] = []
        parent = proc.port_owner(urlsplit(url).port or 80)
        assert parent is not None, f"nobody listens at {url}"
        self._tree = proc.tree(parent)
        (self._scheduler,) = [known.pid for known in self._tree if known.role == "scheduler"]
        self._path = str(self._http.get("/model_info").json()["model_path"])

    def close(self) -> None:
        for call in self._calls:
            call.join(timeout=60)
        self._http.close()

    def look(self) -> ServerProbed:
        async def go() -> ServerProbed:
            async with sglang.client(self.url) as http:
                return await sglang.probe(http, "s", timeout_s=TIMEOUT_S, names=self._names)

        return asyncio.run(go())

    def opinion(self) -> SchedulerAsked:
        async def go() -> SchedulerAsked:
            async with sglang.client(self.url) as http:
                return await sglang.ask_scheduler(http, "s", timeout_s=TIMEOUT_S, names=self._names)

        return asyncio.run(go())

    def token(self) -> GenerationAsked:
        async def go() -> GenerationAsked:
            async with sglang.client(self.url) as http:
                return await sglang.ask_token(http, "s", timeout_s=HEALTH_TIMEOUT_S, names=self._names)

        return asyncio.run(go())

    def stopped(self) -> tuple[int, ...]:
        stats = (proc.stat(known.pid) for known in self._tree)
        return tuple(found.pid for found in stats if found is not None and found.stopped)

    def send(self) -> None:
        self._slow_down(PASS_S)
        params = {"temperature": 0, "max_new_tokens": 50, "ignore_eos": True}
        body = {"input_ids": PROMPT, "sampling_params": params}
        for _ in range(SENT):
            call = threading.Thread(target=self._generate, args=(body,))
            call.start()
            self._calls.append(call)

    def drop(self) -> None:
        self._http.post("/abort_request", json={"abort_all": True}).raise_for_status()
        self._slow_down(None)

    def pause(self, mode: str) -> None:
        self._http.post("/pause_generation", json={"mode": mode}).raise_for_status()

    def go_on(self) -> None:
        self._http.post("/continue_generation", json={}).raise_for_status()

    def stop(self) -> None:
        os.kill(self._scheduler, signal.SIGSTOP)

    def wake(self) -> None:
        os.kill(self._scheduler, signal.SIGCONT)

    def load(self, version: str) -> None:
        body = {"model_path": self._path, "weight_version": version}
        assert self._http.post("/update_weights_from_disk", json=body).json()["success"] is True

    def let(self, seconds: float) -> None:
        time.sleep(seconds)

    def _generate(self, body: dict[str, object]) -> None:
        with httpx.Client(base_url=self.url, timeout=120, trust_env=False) as http:
            http.post("/generate", json=body)

    def _slow_down(self, seconds: float | None) -> None:
        self._http.post("/slow_down", json={"forward_sleep_time": seconds}).raise_for_status()


@contextlib.contextmanager
def http_subject(url: str) -> Iterator[HttpSubject]:
    """The subject; every request of it has ended when the block is left."""
    subject = HttpSubject(url)
    try:
        yield subject
    finally:
        subject.close()
