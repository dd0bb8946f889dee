"""The wire: only who holds the token is heard, and only as it was said."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from stepguardd.cluster.wire import TokenError, Wire, WireError, answer, call, kept_token, read_token

T = TypeVar("T")
TOKEN = "t" * 43
Talk = Callable[[Wire, Wire], Awaitable[None]]


def connected(talk: Talk, *, agents_token: str = TOKEN, refused: str | None = None) -> None:
    """Head and agent over a real socket; the head's end of the handshake is seen through, whatever comes."""

    async def main() -> None:
        head: asyncio.Future[Wire] = asyncio.get_running_loop().create_future()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                wire, node = await answer(reader, writer, TOKEN, lambda _: refused)
                assert node == "n1"
                head.set_result(wire)
            except WireError:
                await writer.drain()
                writer.close()

        server = await asyncio.start_server(accepted, "127.0.0.1", 0)
        async with server, asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            try:
                agent = await call(reader, writer, agents_token, "n1")
                await talk(agent, await head)
                (await head).close()
            finally:
                writer.close()

    asyncio.run(main())


def test_messages_arrive_both_ways_in_their_order() -> None:
    async def talk(agent: Wire, head: Wire) -> None:
        for number in range(3):
            agent.send({"n": number})
            head.send({"n": -number})
        assert [(await head.receive())["n"] for _ in range(3)] == [0, 1, 2]
        assert [(await agent.receive())["n"] for _ in range(3)] == [0, -1, -2]

    connected(talk)


async def nothing(agent: Wire, head: Wire) -> None:
    """Nobody says anything."""


def test_who_does_not_hold_the_token_is_turned_away_with_the_reason() -> None:
    with pytest.raises(WireError, match="does not hold this run's token"):
        connected(nothing, agents_token="u" * 43)


def test_a_node_that_the_head_does_not_want_hears_why() -> None:
    with pytest.raises(WireError, match="no such node"):
        connected(nothing, refused="no such node")


@pytest.mark.parametrize("how", ["changed", "repeated", "left out", "none of ours"])
def test_a_message_that_was_tampered_with_ends_the_connection(how: str) -> None:
    async def talk(agent: Wire, head: Wire) -> None:
        lines: list[bytes] = []

        class Tapped:
            transport = agent._writer.transport

            def is_closing(self) -> bool:
                return False

            def write(self, line: bytes) -> None:
                lines.append(line)

        real = agent._writer
        agent._writer = Tapped()  # type: ignore[assignment]
        agent.send({"order": "HOLD"})
        agent.send({"order": "GO"})
        first, second = lines
        match how:
            case "changed":
                real.write(first.replace(b"HOLD", b"GOGO"))
            case "repeated":
                real.write(first)
                assert (await head.receive())["order"] == "HOLD"
                real.write(first)
            case "left out":
                real.write(second)
            case _:
                real.write(b"hello there\n")
        with pytest.raises(WireError, match="changed, repeated or left out"):
            await head.receive()

    connected(talk)


def test_an_end_that_does_not_read_loses_the_connection() -> None:
    async def talk(agent: Wire, head: Wire) -> None:
        def flood() -> None:
            for _ in range(10_000):
                agent.send({"text": "x" * 100_000})

        with pytest.raises(WireError, match="does not read"):
            flood()

    connected(talk)


def test_the_token_is_made_once_and_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "cluster.token"
    token = kept_token(path)
    assert len(token) >= 32
    assert kept_token(path) == read_token(path) == token
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(TokenError, match="chmod 600"):
        read_token(path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(TokenError, match="at least 32"):
        read_token(path)
    with pytest.raises(TokenError, match="No such file"):
        read_token(tmp_path / "nothing")
