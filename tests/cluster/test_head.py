"""What the head believes of an agent, and how it has one do something."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo.server_process import free_port
from stepguardd.cluster.far import NotDoneError
from stepguardd.cluster.head import NodeLinks
from stepguardd.cluster.told import message_of
from stepguardd.cluster.wire import Wire, WireError, call, read_token
from stepguardd.config import Config
from stepguardd.core.events import Event, OomKind, OomSeen, Proc, ProcessExited, Role, TreeSeen
from stepguardd.core.state import Mode, Node, Settings, initial

ONE = Proc(pid=7, start_ticks=1, role="server")


class Head:
    """The head's end alone, with agents that a test speaks for."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.config = Config.model_validate(
            {
                "run": {"run_dir": folder, "state_dir": folder},
                "servers": [{"name": "s", "url": "http://gpu2:1", "node": "n2", "command": ["x"]}],
                "cluster": {"listen": f"127.0.0.1:{self.port}", "nodes": ["n1", "n2"]},
            }
        )
        nodes = tuple(Node(name=name) for name in ("n1", "n2"))
        state = replace(initial(Settings(), Mode.ACT, ()), nodes=nodes)
        self.fed: list[Event] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.links = NodeLinks(self.config, lambda: state, self.fed.append)

    async def agent(self, name: str) -> Wire:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        wire = await call(reader, writer, read_token(self.links.token_file), name)
        say(wire, kind="page", life=name, order="HOLD", generation=0)
        return wire


def say(wire: Wire, **message: object) -> None:
    wire.send({"at": time.monotonic_ns(), **message})


async def asked(wire: Wire) -> dict[str, Any]:
    """What the head wants done next."""
    while (message := await wire.receive())["kind"] != "do":
        pass
    return message


def with_head(folder: Path, what: Callable[[Head], Awaitable[None]]) -> Head:
    head = Head(folder)

    async def main() -> None:
        head.links.open()
        tasks = [asyncio.create_task(work) for work in head.links.work()]
        try:
            async with asyncio.timeout(60):
                await what(head)
        finally:
            head.links.close()
            for task in tasks:
                task.cancel()
            for writer in head.writers:
                writer.close()
            closed = (writer.wait_closed() for writer in head.writers)
            await asyncio.gather(*tasks, *closed, return_exceptions=True)

    asyncio.run(main())
    return head


def test_what_befalls_a_server_is_believed_of_its_own_machine_alone(tmp_path: Path) -> None:
    told = [
        TreeSeen(server="s", procs=(ONE,)),
        ProcessExited(server="s", proc=ONE),
        ProcessExited(server="t", proc=ONE),
        OomSeen(kind=OomKind.CUDA_RUN, role=Role.SERVER, server="s"),
    ]

    async def what(head: Head) -> None:
        for name in ("n1", "n2"):
            wire = await head.agent(name)
            for number, event in enumerate(told, 1):
                say(wire, kind="event", seq=number, **message_of(event, time.monotonic()))
            say(wire, kind="bye")
            with contextlib.suppress(WireError):
                while True:
                    await wire.receive()

    fed = with_head(tmp_path, what).fed
    assert [event for event in fed if isinstance(event, TreeSeen | ProcessExited)] == told[:2]
    kills = [event for event in fed if isinstance(event, OomSeen)]
    assert [(kill.server, kill.facts["node"]) for kill in kills] == [(None, "n1"), ("s", "n2")]


def test_an_agent_that_comes_back_is_asked_again_under_the_same_id(tmp_path: Path) -> None:
    async def what(head: Head) -> None:
        doing = asyncio.create_task(head.links.have_done("n2", {"kind": "do", "verb": "start"}, 30))
        first = await head.agent("n2")  # while the machine is away, the asking waits
        wanted = await asked(first)
        first.close()
        second = await head.agent("n2")
        again = await asked(second)
        assert (again["id"], again["verb"]) == (wanted["id"], "start")
        say(second, kind="done", id="another's", ok=False)
        say(second, kind="done", id=again["id"], ok=True)
        assert (await doing)["ok"] is True

    with_head(tmp_path, what)


def test_an_agent_that_never_says_that_it_is_done_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    async def what(head: Head) -> None:
        wire = await head.agent("n2")
        doing = asyncio.create_task(head.links.have_done("n2", {"kind": "do", "verb": "stop"}, 0.3))
        await asked(wire)
        with pytest.raises(NotDoneError, match="has not done it"):
            await doing

    with_head(tmp_path, what)
