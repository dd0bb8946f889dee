"""What an agent does when it is asked to, and what it does on nobody's word."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from grpo.server_process import free_port
from stepguardd import proc
from stepguardd.cluster.far import FarBackend, NotDoneError, message_of, outcome_of, procs_of
from stepguardd.cluster.hands import Hands
from stepguardd.cluster.wire import WireError
from stepguardd.config import Config, ConfigError, ServerSettings, load_config
from stepguardd.core.events import Event, Proc, TreeSeen
from stepguardd.effects.outcome import Outcome

LISTEN = "import socket, sys, time; s = socket.create_server(('', int(sys.argv[1]))); time.sleep(600)"


def config(folder: Path, **server: object) -> Config:
    table = {"name": "s", "url": f"http://gpu2:{free_port()}", "node": "n2", "stop_timeout_s": 5, **server}
    command = (sys.executable, "-c", LISTEN, str(table["url"]).rpartition(":")[2], "--chunked-prefill-size=8")
    given = ServerSettings.model_validate({"command": command, **table})
    return Config.model_validate(
        {
            "run": {"name": "r", "run_dir": folder, "state_dir": folder},
            "servers": [given],
            "cluster": {"listen": "127.0.0.1:8723", "nodes": ["n1", "n2"]},
        }
    )


def on_hands(given: Config | None, folder: Path, what: Callable[[Hands], Awaitable[None]]) -> list[Event]:
    told: list[Event] = []

    async def main() -> None:
        hands = Hands(given, "n2", folder, told.append)
        hands.open()
        try:
            await what(hands)
        finally:
            await hands.close()

    asyncio.run(main())
    return told


def asked(verb: str, *procs: Proc, **more: object) -> dict[str, object]:
    outcome = message_of(Outcome(ok=True, procs=procs))
    plain: dict[str, object] = {"id": "1", "server": "s", "verb": verb, "intent": "start-1", "arguments": {}}
    return {**plain, "procs": outcome["procs"], **more}


def test_a_server_is_started_once_for_an_intent_and_ended_with_its_port(tmp_path: Path) -> None:
    given = config(tmp_path)

    async def what(hands: Hands) -> None:
        first, same = await asyncio.gather(*(hands.do(asked("start")) for _ in range(2)))
        assert first.ok, first
        assert same is first, "asked again while it is done, it is done once"
        again = await hands.do(asked("start", arguments={"--max-running-requests": "16"}))
        assert (again.detail, again.procs) == ("found running", first.procs)
        ended = await hands.do(asked("stop", *first.procs))
        assert ended.ok, ended
        assert not proc.alive(first.procs[0])

    told = on_hands(given, tmp_path, what)
    assert told[0] == TreeSeen(server="s", procs=()), "that nothing runs is worth telling"


def test_no_process_is_signalled_on_the_heads_word_that_was_not_seen_as_the_servers(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        seen = proc.stat(stranger.pid)
        assert seen is not None
        known = Proc(pid=stranger.pid, start_ticks=seen.start_ticks, role="server")

        async def what(hands: Hands) -> None:
            assert (await hands.do(asked("stop", known))).ok
            stranger.send_signal(signal.SIGSTOP)
            assert not (await hands.do(asked("continue", known))).ok, "there is none to continue"

        on_hands(config(tmp_path), tmp_path, what)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize(
    "wrong",
    [
        {"arguments": {"--trust-remote-code": "1"}},
        {"arguments": {"--max-running-requests": "1; reboot"}},
        {"verb": "run"},
        {"procs": [{"pid": "x"}]},
        {"intent": 7},
        {"id": None},
    ],
)
def test_what_no_head_asks_for_is_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    async def what(hands: Hands) -> None:
        with pytest.raises(WireError):
            await hands.do({**asked("start"), **wrong})

    on_hands(config(tmp_path), tmp_path, what)


def test_an_agent_that_cannot_says_why_and_what_helps(tmp_path: Path) -> None:
    async def bare(hands: Hands) -> None:
        assert "start it with --config FILE" in (await hands.do(asked("start"))).detail

    async def other(hands: Hands) -> None:
        outcome = await hands.do(asked("stop", server="t"))
        assert (outcome.ok, "give it the head's config" in outcome.detail) == (False, True)

    on_hands(None, tmp_path, bare)
    on_hands(config(tmp_path), tmp_path, other)
    on_hands(config(tmp_path, node="n1"), tmp_path, other)


def test_an_outcome_arrives_as_it_was_told_or_not_at_all() -> None:
    told = Outcome(
        ok=True, detail="pid 7", procs=(Proc(pid=7, start_ticks=9, role="server"),), kept_arguments="no leave"
    )
    assert outcome_of(message_of(told)) == told
    for key, wrong in {"ok": 1, "detail": None, "procs": 3, "kept_arguments": 4}.items():
        with pytest.raises(WireError):
            outcome_of({**message_of(told), key: wrong})
    assert procs_of({"procs": []}) == ()


def test_a_head_without_an_answer_has_a_failed_effect(tmp_path: Path) -> None:
    async def silent(node: str, message: object, timeout_s: float) -> dict[str, object]:
        raise NotDoneError(f"its agent has not done it within {timeout_s:.0f} s")

    backend = FarBackend(config(tmp_path).servers[0], silent)
    assert backend.find() == ()
    outcome = asyncio.run(backend.stop(()))
    assert (outcome.ok, outcome.detail) == (False, "node n2: its agent has not done it within 20 s")


def test_a_trainer_on_another_machine_is_not_started_on_this_one(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    cluster = '[cluster]\nlisten = "127.0.0.1:1"\nnodes = ["n1"]\ntrainer = "n1"\n[trainer]\nbackend = '
    path.write_text(cluster + '"process"\ncommand = ["x"]\n')
    with pytest.raises(ConfigError, match="backend 'process' would start it on the daemon's own machine"):
        load_config(path)
    path.write_text(cluster + '"none"\n')
    load_config(path)


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ('node = "n9"\ncommand = ["x"]', "cluster.nodes has no 'n9', where the server 'server' is to be"),
        ('node = "n1"\nbackend = "ray"\nactor = "a"', "an agent has no part in"),
    ],
)
def test_a_node_that_cannot_be_is_named_in_one_line(tmp_path: Path, server: str, why: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        f'[cluster]\nlisten = "127.0.0.1:1"\nnodes = ["n1"]\n[server]\nurl = "http://n1:1"\n{server}\n'
    )
    with pytest.raises(ConfigError, match=why):
        load_config(path)
