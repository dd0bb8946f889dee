"""
The parent's end of the scheduler: starts the process, sends it messages, wakes whoever waits for the answer.

An answer that never comes is never made up: a call on a stopped scheduler waits, as it does in SGLang. Who
calls sets the time limit.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from stepguard_grpo.server.wire import Inbox, Message, pack

TITLE = "stepguard_grpo::scheduler"

log = logging.getLogger("stepguard_grpo.server")


class SchedulerDiedError(Exception):
    """The scheduler ended before it was ready; `code` is its exit code as subprocess gives it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"scheduler ended with {code}")
        self.code = code


class SchedulerLink:
    """
    One scheduler process. Bound to the running loop.

    Args:
        model_path: the weights it loads.
        weight_version: what it calls them.
        max_running: requests in a batch.
        memory: what they take, as the scheduler's own last arguments: see its `main`.

    """

    def __init__(
        self,
        model_path: Path,
        weight_version: str,
        max_running: int,
        memory: Sequence[str] = ("0", "", "0.8"),
    ) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "stepguard_grpo.server.scheduler", TITLE, str(os.getpid())]
        command += [str(theirs.fileno()), str(model_path), weight_version, str(max_running), *memory]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self._socket = ours
        self._ids = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self._requests: dict[str, asyncio.Future[Message]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._ready: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._reading: asyncio.Task[None] | None = None
        self.load: Message = {}
        self.last_output_at = 0.0  # monotonic; when a generation last came back

    async def start(self) -> None:
        """Wait until the model is loaded; SchedulerDiedError when it never will be."""
        reader, self._writer = await asyncio.open_connection(sock=self._socket)
        self._reading = asyncio.create_task(self._read(reader))
        while not self._ready.done():
            code = self.process.poll()
            if code is not None:
                raise SchedulerDiedError(code)
            await asyncio.wait([self._ready], timeout=0.05)

    async def ask(self, operation: str, **fields: Any) -> Message:
        """Do a control operation and return its reply; waits for as long as the scheduler does not answer."""
        number = next(self._ids)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._replies[number] = future
        self._post({"op": operation, "id": number, **fields})
        try:
            return await future
        finally:
            self._replies.pop(number, None)

    async def generate(self, rid: str, input_ids: list[int], sampling: dict[str, Any]) -> Message:
        """Run one request to its end. A caller that is cancelled takes its request out of the batch."""
        if rid in self._requests:
            raise ValueError(f"rid {rid} is already in use.")
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._requests[rid] = future
        self._post({"op": "generate", "rid": rid, "input_ids": input_ids, "sampling": sampling})
        try:
            return await future
        except asyncio.CancelledError:
            self.abort(rid)
            raise
        finally:
            self._requests.pop(rid, None)

    def abort(self, rid: str | None) -> None:
        """Take one request out, or all for None; each then ends with what it has."""
        self._post({"op": "abort", "rid": rid})

    def shut_down(self) -> None:
        """Ask the scheduler to end; it does so between two forward passes."""
        self._post({"op": "shutdown"})

    def _post(self, message: Message) -> None:
        assert self._writer is not None, "start() comes first"
        if not self._writer.is_closing():  # asyncio logs each write to a dead peer, and says nothing else
            self._writer.write(pack(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        inbox = Inbox()
        while data := await reader.read(1 << 20):
            for message in inbox.feed(data):
                self._take(message)

    def _take(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "ready":
            self._ready.set_result(message)
        elif kind == "load":
            self.load = message
        elif kind == "reply":
            _resolve(self._replies.get(message["id"]), message)
        else:
            self.last_output_at = time.monotonic()
            _resolve(self._requests.get(message["rid"]), message)


def _resolve(future: asyncio.Future[Message] | None, message: Message) -> None:
    if future is not None and not future.done():
        future.set_result(message)


def kill_all(link: SchedulerLink) -> NoReturn:
    """SGLang's own end: the scheduler, and then the parent by its own hand."""
    kill_tree(link)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable: SIGKILL cannot be caught")


def kill_tree(link: SchedulerLink) -> None:
    """End the scheduler."""
    log.info("kill_process_tree called: parent_pid=%d", os.getpid())
    if link.process.poll() is None:
        link.process.kill()
        link.process.wait(timeout=5)
