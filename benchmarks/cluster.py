"""
What one head carries: `python -m benchmarks.cluster [MACHINES ...]`.

A real daemon is the head. Agents of as many machines speak the real wire from one other process: they answer
as `stepguard agent` does, and own no page. For each number of machines: the head's share of a core while
nothing happens, how long a person's pause takes to the last machine, and how long the way back to GO, which
goes round twice. Beside it stands a bare echo of as many lines a second: what the sockets alone cost.

Then machines are lost, ten by a closed connection as of a killed agent, ten by silence as of a frozen one;
the head's journal says when it noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.daemon import _ready, _start
from stepguardd.cluster.wire import ALIVE_S, LINE_BYTES_MAX, call, read_token
from stepguardd.control.client import ControlClient

MACHINES = (10, 100, 1000)
IDLE_S, ROUNDS, LOST, LOST_AFTER_S = 4.0, 5, 20, 4.0
GOAL_LOST_S = 5.0

ECHO = """
import asyncio
async def talk(reader, writer):
    while line := await reader.readline():
        writer.write(line)
async def main():
    server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=2000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def main() -> None:
    """Measure and print."""
    given = sys.argv[1:] if sys.argv[0].endswith("cluster.py") else []
    numbers = tuple(int(one) for one in given) or MACHINES
    print("  machines  head, idle  bare echo  ratio  memory  pause to last  GO to last  CPU for both")
    for number in numbers:
        with _head(number) as (folder, port, daemon):
            print(asyncio.run(_carried(number, folder, port, daemon)), flush=True)
    with _head(LOST + 1) as (folder, port, _):
        closed, silent = asyncio.run(_lost(folder, port))
    print(f"  lost to noticed, {LOST // 2} of each, cluster.lost_after_s = {LOST_AFTER_S:.0f}:")
    for what, found in (("killed agents", closed), ("frozen agents", silent)):
        print(
            f"    {what}: median {sorted(found)[len(found) // 2]:.2f} s, worst {max(found):.2f} s, "
            f"goal <= {GOAL_LOST_S:.0f} s"
        )


@contextlib.contextmanager
def _head(number: int) -> Iterator[tuple[Path, int, psutil.Process]]:
    """A head that waits for so many machines."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = _free_port()
        config = folder / "config.toml"
        nodes = json.dumps([f"n{index}" for index in range(number)])
        config.write_text(
            f'[run]\nname = "bench"\nmode = "hold"\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\n'
            f'[web]\nenabled = false\n[cluster]\nlisten = "127.0.0.1:{port}"\nnodes = {nodes}\n'
            f"lost_after_s = {LOST_AFTER_S}\n"
        )
        daemon = _start(["-m", "stepguardd", "run", "--config", str(config)])
        try:
            _ready(folder / "run", time.monotonic())
            yield folder, port, psutil.Process(daemon.pid)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(20)


class _Agent:
    """One machine's agent, as far as the head can tell."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.order = ""
        self.order_at = 0.0
        self.task: asyncio.Task[None] | None = None

    async def join(self, port: int, token: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LINE_BYTES_MAX)
        self.wire = await call(reader, writer, token, self.name)
        self._send({"kind": "page", "life": self.name, "order": "HOLD", "generation": 0})
        self.task = asyncio.create_task(self._live())

    def _send(self, message: dict[str, Any]) -> None:
        self.wire.send({**message, "at": time.monotonic_ns()})

    async def _live(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._say())
            group.create_task(self._hear())

    async def _say(self) -> None:
        while True:
            self._send({"kind": "alive"})
            await asyncio.sleep(ALIVE_S)

    async def _hear(self) -> None:
        while True:
            message = await self.wire.receive()
            if message["kind"] == "gate":
                self.order, self.order_at = message["order"], time.monotonic()
                self._send({"kind": "ack", "generation": message["generation"]})

    async def freeze(self) -> float:
        """Say nothing any more, and keep the connection."""
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        return time.monotonic()

    async def close(self) -> float:
        """Be gone."""
        at = await self.freeze()
        self.wire.close()
        return at


async def _all_in(number: int, folder: Path, port: int) -> list[_Agent]:
    token = read_token(folder / "state" / "cluster.token")
    agents = [_Agent(f"n{index}") for index in range(number)]
    for first in range(0, number, 50):
        await asyncio.gather(*(one.join(port, token) for one in agents[first : first + 50]))
    await _shown(agents, "GO")
    return agents


async def _shown(agents: list[_Agent], order: str) -> float:
    """When the last of them heard this order."""
    deadline = time.monotonic() + 60
    while any(one.order != order for one in agents):
        if time.monotonic() > deadline:
            raise SystemExit(f"not every machine came to {order}")
        await asyncio.sleep(0.002)
    return max(one.order_at for one in agents)


async def _carried(number: int, folder: Path, port: int, daemon: psutil.Process) -> str:
    agents = await _all_in(number, folder, port)
    await asyncio.sleep(1.0)
    head = await _share(daemon)
    pauses, returns = [], []
    before = _cpu_s(daemon)
    with ControlClient(folder / "run" / "control.sock") as control:
        for _ in range(ROUNDS):
            for verb, order, found in (("pause", "HOLD", pauses), ("resume", "GO", returns)):
                asked = time.monotonic()
                await asyncio.to_thread(control.ask, verb, "a benchmark")
                found.append(await _shown(agents, order) - asked)
                await asyncio.sleep(0.2)
    used_s = (_cpu_s(daemon) - before) / ROUNDS - 0.4 * head
    rss_mb = daemon.memory_info().rss / 1e6
    for one in agents:
        await one.close()
    bare = await _echo(number)
    pause_ms, go_ms = (1e3 * sorted(found)[len(found) // 2] for found in (pauses, returns))
    return (
        f"  {number:8,d}  {head:10.1%}  {bare:9.1%}  {head / max(bare, 1e-4):5.1f}  {rss_mb:3.0f} MB"
        f"  {pause_ms:10.0f} ms  {go_ms:7.0f} ms  {1e3 * used_s:9.0f} ms"
    )


async def _share(process: psutil.Process) -> float:
    """Of a core, while nothing happens."""
    before, began = _cpu_s(process), time.monotonic()
    await asyncio.sleep(IDLE_S)
    return (_cpu_s(process) - before) / (time.monotonic() - began)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def _echo(number: int) -> float:
    """The same lines a second, read and written, and nothing done with them."""
    echo = _start(["-c", ECHO])
    assert echo.stdout is not None
    port = int(echo.stdout.readline())
    line = b"x" * 120 + b"\n"

    async def talk() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            writer.write(line)
            await reader.readline()
            await asyncio.sleep(ALIVE_S)

    tasks = [asyncio.create_task(talk()) for _ in range(number)]
    await asyncio.sleep(1.0)
    share = await _share(psutil.Process(echo.pid))
    for task in tasks:
        task.cancel()
    echo.kill()
    echo.wait()
    return share


async def _lost(folder: Path, port: int) -> tuple[list[float], list[float]]:
    agents = await _all_in(LOST + 1, folder, port)
    went: dict[str, float] = {}
    for index, one in enumerate(agents[:LOST]):
        went[one.name] = await (one.close() if index % 2 == 0 else one.freeze())
        await asyncio.sleep(0.13)
    await asyncio.sleep(LOST_AFTER_S + 2.0)
    for one in agents:
        await one.close()
    rows = sqlite3.connect(f"file:{folder}/state/journal.db?mode=ro", uri=True).execute(
        "select at, body from events where kind = 'NodeLost' order by at"
    )
    noticed: dict[str, float] = {}
    for at, body in rows:
        noticed.setdefault(json.loads(body)["node"], at)
    took = [noticed[name] - at for name, at in went.items()]
    return took[::2], took[1::2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
