"""Reports become events, each at most once; a page that says nothing is no news; an exit is told at once."""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from daemon_parts.conftest import until
from stepguard.gate import DaemonHalf, GatePage, Order, Phase, TrainerHalf
from stepguard.reports import ReportSender
from stepguardd.core.events import (
    BatchReported,
    CheckpointSaved,
    Event,
    OrderAcknowledged,
    StepCommitted,
    TrainerExited,
    TrainerSeen,
)
from stepguardd.core.state import Gate, GateOrder
from stepguardd.effects.gate import GateWriter
from stepguardd.sources.trainer import REPORTS_PER_WAKE_MAX, ReportSocket, TrainerPage

STEP = {
    "v": 1,
    "kind": "step",
    "attempt": 0,
    "step": 5,
    "reward": "NaN",
    "metrics": {"loss": "Infinity", "kl": 0.5},
    "weight_version": "5",
}
BATCH = {
    "v": 1,
    "kind": "batch",
    "attempt": 0,
    "step": 5,
    "batch": 9,
    "ok": 60,
    "failed": 4,
    "dropped_groups": 0,
    "reward": {"mean": 0.5, "std": "NaN", "min": 0, "max": 1},
    "weight_versions": {"4": 64},
    "stale": 0,
    "refused": None,
    "began": 12.5,
}
SAVED = {"v": 1, "kind": "saved", "attempt": 0, "step": 5, "path": "/c/5", "norms": None}
ACK = {"v": 1, "kind": "ack", "attempt": 0, "generation": 7, "order": "RESYNC", "ok": False, "detail": "why"}
HELLO = {"v": 1, "kind": "hello", "attempt": 0, "pid": 1, "host": "h", "version": "1", "handles": []}


def told(path: Path, *datagrams: bytes | dict[str, Any], count: int) -> tuple[list[Event], int]:
    """What comes out of a socket for these datagrams: so many events, and how many were bad."""

    async def go() -> tuple[list[Event], int]:
        events: list[Event] = []
        enough = asyncio.Event()

        def emit(event: Event) -> None:
            events.append(event)
            if len(events) >= count:
                enough.set()

        reports = ReportSocket(path / "reports.sock", emit)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            for datagram in datagrams:
                sent = datagram if isinstance(datagram, bytes) else json.dumps(datagram).encode()
                await asyncio.to_thread(sender.sendto, sent, str(path / "reports.sock"))
        async with asyncio.timeout(10):
            await enough.wait()
        reports.close()
        return events, reports.bad_reports

    return asyncio.run(go())


def test_each_kind_of_report_is_its_event(tmp_path: Path) -> None:
    events, bad = told(tmp_path, HELLO, BATCH, STEP, SAVED, ACK, count=4)
    batch, step, saved, ack = events
    assert bad == 0
    assert isinstance(batch, BatchReported)
    assert (batch.batch, batch.ok, batch.failed, batch.reward, batch.began) == (9, 60, 4, 0.5, 12.5)
    assert batch.reward_std is not None
    assert math.isnan(batch.reward_std)
    assert isinstance(step, StepCommitted)
    assert step.reward is not None
    assert math.isnan(step.reward)
    assert step.metrics == {"loss": math.inf, "kl": 0.5}
    assert saved == CheckpointSaved(attempt=0, step=5, path="/c/5")
    assert ack == OrderAcknowledged(generation=7, order="RESYNC", ok=False, detail="why")


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"{",
        b"[]",
        b"\xff" * 100,
        b"[" * 60_000,
        b'{"v":1,"kind":"step"}',
        b'{"v":2,"kind":"hello"}',
        b'{"v":1,"kind":"dance"}',
        json.dumps(STEP | {"step": -1}).encode(),
        json.dumps(STEP | {"step": 2**64}).encode(),
        json.dumps(BATCH | {"ok": "many"}).encode(),
        json.dumps(STEP | {"metrics": {"a": "x" * 70_000}}).encode(),
    ],
)
def test_a_datagram_that_is_no_report_is_counted_and_nothing_else(tmp_path: Path, datagram: bytes) -> None:
    events, bad = told(tmp_path, datagram, SAVED, count=1)
    assert (len(events), bad) == (1, 1)


def test_text_that_no_file_takes_is_made_storable(tmp_path: Path) -> None:
    strange = STEP | {"weight_version": "\ud800", "metrics": {"\udfff": 1}}
    events, _ = told(tmp_path, strange, SAVED | {"path": "/\udc80"}, ACK | {"detail": "\ud800"}, count=3)
    assert "?" in str(events)
    str(events).encode()


def test_a_flood_is_read_in_turns_and_none_of_it_is_lost(tmp_path: Path) -> None:
    async def go() -> tuple[int, int]:
        events: list[Event] = []
        reports = ReportSocket(tmp_path / "reports.sock", events.append)
        sender = ReportSender(tmp_path / "reports.sock")
        for _ in range(3):
            while sender.send(SAVED):  # type: ignore[arg-type]
                pass
            while len(events) < sender.sent:
                before = len(events)
                await asyncio.sleep(0)
                assert len(events) - before <= REPORTS_PER_WAKE_MAX
        sender.close()
        reports.close()
        return len(events), sender.sent

    got, sent = asyncio.run(go())
    assert got == sent
    assert sent > 10


def test_a_socket_that_a_dead_daemon_left_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "reports.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
        left.bind(str(path))

    async def go() -> None:
        ReportSocket(path, lambda event: None).close()
        assert not path.exists()
        path.write_text("mine")
        with pytest.raises(FileExistsError, match="no socket; remove it"):
            ReportSocket(path, lambda event: None)

    asyncio.run(go())
    assert path.read_text() == "mine"


# ---- the page --------------------------------------------------------------------------------------


def half(pid: int, **more: Any) -> TrainerHalf:
    return TrainerHalf(pid=pid, step=3, phase=Phase.ROLLOUT, **more)


def test_the_page_is_told_with_what_reports_do_not_say(tmp_path: Path) -> None:
    async def go() -> list[Event]:
        events: list[Event] = []
        page = GatePage.create(tmp_path / "gate")
        watching = TrainerPage(page, events.append)
        watching.look()
        assert events == []
        page.report(half(os.getpid(), weight_version="v3", handles_save=True, beats=7))
        watching.look()
        watching.close()
        page.close()
        return events

    (seen,) = asyncio.run(go())
    assert isinstance(seen, TrainerSeen)
    assert (seen.pid, seen.step, seen.phase, seen.beats) == (os.getpid(), 3, "ROLLOUT", 7)
    assert (seen.weight_version, seen.handles_save, seen.handles_resync) == ("v3", True, False)


MAPPED = """
import mmap, pathlib, sys
with open(sys.argv[1], "rb") as page, mmap.mmap(page.fileno(), 0, prot=mmap.PROT_READ):
    pathlib.Path(sys.argv[1] + ".mapped").touch()
    sys.stdin.read()
"""


def test_the_exit_of_the_trainer_is_told_at_once(tmp_path: Path) -> None:
    GatePage.create(tmp_path / "gate").close()
    child = subprocess.Popen([sys.executable, "-c", MAPPED, str(tmp_path / "gate")], stdin=subprocess.PIPE)

    async def go() -> list[Event]:
        events: list[Event] = []
        gone = asyncio.Event()

        def emit(event: Event) -> None:
            events.append(event)
            if isinstance(event, TrainerExited):
                gone.set()

        until((tmp_path / "gate.mapped").exists, "the page is mapped")
        page = GatePage.create(tmp_path / "gate")
        page.report(half(child.pid))
        watching = TrainerPage(page, emit)
        watching.look()
        os.kill(child.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            await gone.wait()
        watching.look()
        watching.close()
        page.close()
        return events

    events = asyncio.run(go())
    assert events[1] == TrainerExited(pid=child.pid, code=-9)
    child.wait()
    assert child.stdin is not None
    child.stdin.close()


def test_a_stranger_with_the_trainers_number_is_not_taken_for_it(tmp_path: Path) -> None:
    """A sidecar with a pid namespace of its own: the number on the page is another process here."""
    stranger = subprocess.Popen(["sleep", "1000"])

    async def go() -> list[Event]:
        events: list[Event] = []
        page = GatePage.create(tmp_path / "gate")
        page.report(half(stranger.pid))
        watching = TrainerPage(page, events.append)
        watching.look()
        stranger.kill()
        await asyncio.to_thread(stranger.wait)
        await asyncio.sleep(0)
        watching.look()
        watching.close()
        page.close()
        return events

    assert [type(event) for event in asyncio.run(go())] == [TrainerSeen, TrainerSeen]


def test_a_trainer_in_another_pid_namespace_is_followed_by_its_page_alone(tmp_path: Path) -> None:
    async def go() -> list[Event]:
        events: list[Event] = []
        page = GatePage.create(tmp_path / "gate")
        page.report(half(2**22 - 1))
        watching = TrainerPage(page, events.append)
        watching.look()
        watching.look()
        watching.close()
        page.close()
        return events

    assert [type(event) for event in asyncio.run(go())] == [TrainerSeen, TrainerSeen]


# ---- the daemon's half -----------------------------------------------------------------------------


def test_an_order_is_on_the_page_with_a_lease_and_without_one_after_the_end(tmp_path: Path) -> None:
    writer = GateWriter(tmp_path / "gate")
    assert writer.found() is None
    order = GateOrder.ROLLBACK
    writer.publish(
        Gate(order=order, generation=4, reason="why", target_step=3, target_path="/c/3", judged_batch=9)
    )
    reading = GatePage.open(tmp_path / "gate", writable=False)
    found = reading.daemon()
    assert isinstance(found, DaemonHalf)
    assert (found.order, found.generation, found.target_path) == (Order.ROLLBACK, 4, "/c/3")
    assert found.lease_deadline_ns > time.monotonic_ns()
    writer.renew()
    writer.close()
    ended = reading.daemon()
    assert ended is not None
    assert ended.order is Order.ROLLBACK
    assert ended.lease_deadline_ns <= time.monotonic_ns()
    reading.close()


def test_a_page_is_taken_up_as_an_earlier_daemon_left_it(tmp_path: Path) -> None:
    first = GateWriter(tmp_path / "gate")
    first.publish(Gate(order=GateOrder.HOLD, generation=9, reason="server_died"))
    first.close()
    second = GateWriter(tmp_path / "gate")
    found = second.found()
    assert found is not None
    assert (found.order, found.generation) == (Order.HOLD, 9)
    second.close()
    until(lambda: True, "nothing")
