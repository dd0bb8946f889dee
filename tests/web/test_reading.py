"""What is read of a run; and that trouble with telling never ends the watching."""

import asyncio
import json
import re
import socket
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from daemon_parts.test_daemon import config_file, lived
from shell.fake_daemon import WELL, FakeDaemon
from stepguardd.chronicle.chronicle import Chronicle, Entry
from stepguardd.config import load_config
from stepguardd.control.api import create_app
from stepguardd.control.client import ControlClient
from stepguardd.control.contract import SOCKET_NAME
from stepguardd.control.server import allowed_uids, serve_control
from stepguardd.core.events import CheckpointSaved, CheckpointVetted, OperatorAsked, StepCommitted, Tick
from stepguardd.core.verdict import Finding, Verdict
from stepguardd.daemon import Daemon
from stepguardd.web.metrics import families
from stepguardd.web.server import listening

DOCS = Path(__file__).parents[2] / "docs"
FULL = {**WELL, "gpus": [{"index": 0, "used_bytes": 10, "total_bytes": 80}]}


def get(daemon: Any, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport: Any = httpx.ASGITransport(create_app(daemon))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get(path)

    return asyncio.run(ask())


# ---- metrics and health ----------------------------------------------------------------------------


def scraped(daemon: FakeDaemon) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    reply = get(daemon, "/metrics")
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    found = text_string_to_metric_families(reply.text)
    return {(s.name, frozenset(s.labels.items())): s.value for one in found for s in one.samples}


def test_prometheus_reads_the_figures_as_the_status_has_them() -> None:
    found = scraped(FakeDaemon(FULL))
    assert found["stepguard_trainer_step_number", frozenset()] == 188
    assert found["stepguard_trainer_reward_value", frozenset()] == 0.8
    assert found["stepguard_gate_held_ratio", frozenset()] == 0
    assert found["stepguard_server_restarts_total", frozenset({("server", "sglang")})] == 0
    serving = frozenset({("server", "sglang"), ("state", "serving")})
    assert found["stepguard_server_state_info", serving] == 1
    assert found["stepguard_gpu_memory_total_bytes", frozenset({("gpu", "0")})] == 80


def test_what_is_unknown_is_left_out_of_the_figures() -> None:
    trainer = {"alive": None, "step": None, "reward": None, "beat_age_s": None}
    names = {name for name, _ in scraped(FakeDaemon({**WELL, "trainer": trainer}))}
    assert not {name for name in names if name.startswith("stepguard_trainer_")}
    assert "stepguard_refused_batches_total" in names


def test_a_strange_servers_name_breaks_no_scrape() -> None:
    name = 'a"b\\c\nd'
    server = {"name": name, "state": "dead", "since_s": 1.0, "restarts": 2}
    found = scraped(FakeDaemon({**WELL, "servers": [server]}))
    assert found["stepguard_server_restarts_total", frozenset({("server", name)})] == 2


def test_every_figure_is_documented_with_its_unit_and_meaning() -> None:
    row = re.compile(r"^\| `(stepguard_\w+)` \| (\w+) \| (.+?) \| (.+?) \|$", re.MULTILINE)
    rows = row.findall((DOCS / "metrics.md").read_text())
    documented = {(name, kind, meaning) for name, kind, _unit, meaning in rows}
    there = {
        (one.name + ("_total" if one.type == "counter" else ""), one.type, one.documentation)
        for one in families(FULL, quiet_s=0.1)
    }
    assert documented == there
    for name, _kind, unit, _meaning in rows:
        assert unit in name or unit in {"1", "count"}, name


def test_the_dashboard_asks_for_nothing_that_is_not_answered() -> None:
    board = json.loads((DOCS / "grafana.json").read_text())
    sources = [
        *board["annotations"]["list"],
        *(target for panel in board["panels"] for target in panel["targets"]),
    ]
    asked = set(re.findall(r"stepguard_\w+", " ".join(one["expr"] for one in sources)))
    answered = {one.name + ("_total" if one.type == "counter" else "") for one in families(FULL, quiet_s=0.1)}
    assert asked <= answered, asked - answered
    assert len(asked) > 10
    labels = {"phase", "state", "server", "gpu", "instance"}  # `instance` is Prometheus's own
    given = {name for one in families(FULL, quiet_s=0.1) for sample in one.samples for name in sample.labels}
    legends = set(re.findall(r"{{(\w+)}}", json.dumps(board)))
    assert legends <= labels & (given | {"instance"})
    places = [panel["gridPos"] for panel in board["panels"]]
    taken = [
        (x, y)
        for at in places
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(taken) == len(set(taken)), "two panels lie over each other"
    assert max(x for x, _ in taken) < 24


def test_health_is_the_decision_loops() -> None:
    assert get(FakeDaemon(quiet=0.2), "/healthz").json() == {"ok": True, "decided_s_ago": 0.2}
    silent = get(FakeDaemon(quiet=6.0), "/healthz")
    assert silent.status_code == 503
    assert "silent for 6 s" in silent.json()["error"]


# ---- what a run leaves -----------------------------------------------------------------------------


def test_the_curve_and_the_incidents_outlive_the_daemon(tmp_path: Path) -> None:
    path = config_file(tmp_path)

    def steps(daemon: Daemon) -> None:
        for step in range(1, 41):
            daemon.feed(StepCommitted(attempt=0, step=step, reward=None if step == 7 else step / 100))
        daemon.feed(OperatorAsked(verb="pause", who="ada", why="a look"))

    first = lived(path, steps)
    told = get(first, "/api/v1/events").json()
    assert "ada" in str(told)
    second = lived_longer(path, lambda daemon: daemon.chronicle.curve.points == 40)
    seen = get(second, "/api/v1/series").json()["lines"]
    assert [line["steps"] for line in seen] == [list(range(1, 41))]
    assert seen[0]["values"][6:8] == [None, 0.08]
    again = get(second, "/api/v1/events").json()
    assert again[: len(told)] == told
    assert get(second, "/api/v1/incidents").json() == get(first, "/api/v1/incidents").json()


def lived_longer(path: Path, until: Any) -> Daemon:
    """A daemon that lives until this holds."""
    daemon = Daemon(load_config(path))

    async def live() -> None:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            running = group.create_task(daemon.run())
            while not until(daemon):
                assert not running.done()
                await asyncio.sleep(0)
            daemon.stop()

    asyncio.run(live())
    return daemon


def test_checkpoints_are_the_ledgers(tmp_path: Path) -> None:
    def save(daemon: Daemon) -> None:
        for step, verdict in ((1, Verdict.GOOD), (9, Verdict.BAD)):
            where = str(tmp_path / f"checkpoint-{step}")
            daemon.feed(CheckpointSaved(attempt=0, step=step, path=where))
            daemon.feed(
                CheckpointVetted(
                    attempt=0,
                    step=step,
                    verdict=verdict.value,
                    finding=(Finding.WHOLE if verdict is Verdict.GOOD else Finding.DAMAGED).value,
                    reason="as the test says",
                    size_bytes=1,
                )
            )
        for step in range(2, 9):
            daemon.feed(StepCommitted(attempt=0, step=step, reward=0.5))

    rows = get(lived(config_file(tmp_path), save), "/api/v1/checkpoints").json()
    assert [(row["step"], row["verdict"], row["proven"], row["quarantined"]) for row in rows] == [
        (1, "good", True, False),
        (9, "bad", False, False),
    ]
    assert rows[1]["reason"] == "as the test says"


# ---- the watching goes on --------------------------------------------------------------------------


def test_a_page_that_fails_is_told_and_the_control_socket_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = asyncio.Event()

    async def fails(_app: object) -> None:
        failing.set()
        raise RuntimeError("a bug of the page")

    def status() -> object:
        with ControlClient(tmp_path / SOCKET_NAME) as client:
            return client.status()

    async def live() -> None:
        served = asyncio.create_task(
            serve_control(FakeDaemon(), tmp_path / SOCKET_NAME, uids=allowed_uids(), page=fails)
        )
        async with asyncio.timeout(30):
            await failing.wait()
            assert await asyncio.to_thread(status) == WELL
        assert not served.done()
        served.cancel()
        await asyncio.wait([served])
        assert served.cancelled()

    asyncio.run(live())
    assert "a bug of the page" in caplog.text


def test_an_answer_of_two_packets_does_not_wait_for_the_readers_leave() -> None:
    """Nagle's algorithm would hold the second one back until the first is acknowledged, 40 ms later."""
    delays = asyncio.Queue[int]()

    async def met(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        delays.put_nowait(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def live() -> int:
        listener = listening(IPv4Address("127.0.0.1"), 0)
        async with await asyncio.start_server(met, sock=listener), asyncio.timeout(30):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            at_once = await delays.get()
            writer.close()
            await writer.wait_closed()
        return at_once

    assert asyncio.run(live())


class BrokenChronicle(Chronicle):
    def __init__(self, bug: type[Exception]) -> None:
        super().__init__()
        self._bug = bug

    def take_in(self, *_args: object, **_kwargs: object) -> Entry | None:
        raise self._bug("a bug of the chronicle")


@pytest.mark.parametrize("bug", [OverflowError, KeyError, TypeError, ValueError, AttributeError])
def test_a_chronicle_that_fails_costs_its_entry_and_no_decision(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bug: type[Exception]
) -> None:
    def pause(daemon: Daemon) -> None:
        daemon.chronicle = BrokenChronicle(bug)
        daemon.feed(OperatorAsked(verb="pause", who="ada", why="a look"))
        daemon.feed(Tick())
        assert daemon.status()["gate"]["order"] == "HOLD"  # type: ignore[index]

    daemon = lived(config_file(tmp_path), pause)
    assert "a bug of the chronicle" in caplog.text
    assert daemon.journal.lost_rows == 0
