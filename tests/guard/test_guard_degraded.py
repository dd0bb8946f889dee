"""Whatever is missing or broken: training goes on as configured, and it is said once."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guard.virtual_daemon import BOOT, LEASE_S, VirtualDaemon, VirtualTime, virtual_guard
from stepguard.gate import SEQUENCE_WORD, GatePage, Order, Phase
from stepguard.guard import Guard
from stepguard.orders import StopRequested
from stepguard.settings import GuardSettings

Guards = Callable[..., Guard]
Daemons = Callable[..., VirtualDaemon]


async def value(result: Any) -> Any:
    return result


def one_step(guard: Guard, step: int) -> None:
    outcomes = asyncio.run(guard.gather([value("a"), value("b")]))
    assert guard.admit(step, outcomes, rewards=[1.0, 0.0]).ok
    guard.before_step(step)
    guard.after_step(step, reward=0.5)
    guard.saved(step, "/ckpt")
    guard.beat()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_without_a_run_dir_everything_works_and_nothing_is_said(
    guards: Guards, time: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    guard = guards(None)
    before = time.ns
    for step in range(3):
        one_step(guard, step)
    assert time.ns == before
    assert said(caplog) == []
    assert guard.reports_dropped == 0


def test_from_env_reads_the_run_dir_and_the_rank(tmp_path: Path) -> None:
    code = "from stepguard import Guard; g = Guard.from_env(); g.before_step(1); print(g.reports_dropped)"

    def out(**variables: str) -> str:
        env = {
            key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")
        } | variables
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()

    assert out() == "0"
    assert out(STEPGUARD_RUN_DIR=str(tmp_path)) == "1", "hello had nobody to hear it"
    assert out(STEPGUARD_RUN_DIR=str(tmp_path), RANK="1", WORLD_SIZE="2") == "0", "only rank 0 reports"
    assert out(STEPGUARD_RUN_DIR=str(tmp_path), RANK="zero") == "1"


def test_a_missing_daemon_is_said_once_and_training_goes_on(
    guards: Guards, time: VirtualTime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = guards()
    for step in range(5):
        one_step(guard, step)
        time.sleep(2)
    assert len(said(caplog)) == 1
    assert str(tmp_path / "gate") in said(caplog)[0]
    assert guard.reports_dropped > 5


def test_a_missing_daemon_can_mean_a_hold_and_then_a_stop(guards: Guards, time: VirtualTime) -> None:
    guard = guards(settings=GuardSettings(on_daemon_lost="hold", orphan_hold_s=60))
    before = time.ns
    with pytest.raises(StopRequested, match="daemon_lost"):
        guard.before_step(1)
    assert 60 <= (time.ns - before) / 1e9 < 61


def test_a_daemon_that_starts_later_is_found(guards: Guards, daemons: Daemons, time: VirtualTime) -> None:
    guard = guards()
    one_step(guard, 1)
    daemon = daemons()
    daemon.order(Order.HOLD, "operator")
    time.after(1.5, lambda: daemon.order(Order.GO))
    time.sleep(1.1)
    guard.before_step(2)
    half = daemon.page.trainer()
    assert half is not None
    assert half.acked_generation == daemon.generation
    assert daemon.of_kind("hello")


def test_go_outlives_its_daemon_and_that_is_said_once_and_its_return_too(
    guards: Guards, daemons: Daemons, time: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = daemons()
    guard = guards()
    one_step(guard, 1)
    daemon.die()
    time.sleep(LEASE_S + 1)
    for step in range(2, 6):
        one_step(guard, step)
        time.sleep(1)
    assert [line for line in said(caplog) if "lease ran out on GO: training goes on" in line] == [
        said(caplog)[0]
    ]
    daemons()
    one_step(guard, 6)
    assert "the daemon is back" in said(caplog)
    assert any("reports go out again" in line for line in said(caplog))
    assert len(said(caplog)) == 4


def test_go_can_become_a_hold_when_its_daemon_dies(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    (daemon.run_dir / "guard.json").write_text(
        GuardSettings(on_daemon_lost="hold", orphan_hold_s=30).to_json()
    )
    guard = guards()
    guard.before_step(1)
    daemon.die()
    time.sleep(LEASE_S + 1)
    time.after(10, lambda: setattr(daemon, "alive", True))
    before = time.ns
    guard.before_step(2)
    assert 10 <= (time.ns - before) / 1e9 < 10.2
    daemon.alive = False
    time.sleep(LEASE_S + 1)
    with pytest.raises(StopRequested):
        guard.before_step(3)


def test_a_hold_outlives_its_daemon_until_another_takes_over(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    first = daemons()
    guard = guards()
    first.order(Order.HOLD, "server_dead")
    time.after(1, first.die)
    time.after(500, daemons)
    time.after(900, lambda: GatePage.open(first.run_dir / "gate", boot_id=BOOT).publish(first.half))
    second: list[VirtualDaemon] = []
    time.after(1000, lambda: second.append(daemons()))
    time.after(1400, lambda: second[0].order(Order.GO))
    before = time.ns
    guard.before_step(1)
    assert 1400 <= (time.ns - before) / 1e9 < 1401


def test_an_orphaned_hold_ends_in_a_stop_and_not_in_a_step(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    daemon.order(Order.HOLD, "server_dead")
    time.after(3, daemon.die)
    before = time.ns
    with pytest.raises(StopRequested, match="server_dead"):
        guard.before_step(1)
    assert 600 + 3 <= (time.ns - before) / 1e9 < 600 + 3 + LEASE_S + 1


def test_a_page_deleted_and_made_anew_by_a_restarted_daemon_is_found(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    first = daemons()
    guard = guards()
    guard.on_resync(lambda: None)
    one_step(guard, 1)
    first.die()
    (first.run_dir / "gate").unlink()
    second = daemons(generation=first.generation)
    second.order(Order.HOLD, "restarting")
    time.sleep(LEASE_S + 1)
    time.after(10, lambda: second.order(Order.GO))
    before = time.ns
    guard.before_step(2)
    assert (time.ns - before) / 1e9 >= 10
    half = second.page.trainer()
    assert half is not None
    assert half.handles_resync
    assert (half.attempt, half.acked_generation) == (0, second.generation)
    assert guard.admit(2, ["a"]).ok
    assert [report["batch"] for report in second.of_kind("batch")] == [2]


def test_a_heartbeat_notices_the_new_page_before_the_lease_of_the_old_one_ends(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    first = daemons()
    guard = guards()
    guard.before_step(1)
    (first.run_dir / "gate").unlink()
    second = daemons(generation=10)
    second.order(Order.HOLD, "restarting")
    while second.page.words[SEQUENCE_WORD] != first.page.words[SEQUENCE_WORD]:
        min(first, second, key=lambda daemon: daemon.page.words[SEQUENCE_WORD]).tick()
    guard.before_step(1)
    guard.beat()
    time.after(1, lambda: second.order(Order.GO))
    before = time.ns
    guard.before_step(2)
    assert (time.ns - before) / 1e9 >= 1


def test_a_page_that_vanishes_leaves_the_last_order_standing(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    daemon.order(Order.HOLD, "server_dead")
    time.after(1, lambda: (daemon.die(), (daemon.run_dir / "gate").unlink()))
    with pytest.raises(StopRequested):
        guard.before_step(1)


def corrupt(path: Path) -> None:
    with path.open("r+b") as file:
        for slot in (64, 1056):
            file.seek(slot)
            file.write(b"\xff" * 64)


def test_a_torn_page_never_lifts_a_hold(guards: Guards, daemons: Daemons, time: VirtualTime) -> None:
    daemon = daemons()
    guard = guards()
    daemon.order(Order.HOLD, "server_dead")
    time.after(1, lambda: (daemon.die(), corrupt(daemon.run_dir / "gate")))
    with pytest.raises(StopRequested):
        guard.before_step(1)
    assert daemon.page.daemon() is None


def test_a_torn_page_never_stops_a_run_that_was_let_go(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    guard = guards()
    guard.before_step(1)
    daemon.die()
    corrupt(daemon.run_dir / "gate")
    for step in range(2, 9):
        time.sleep(1)
        guard.before_step(step)
    assert len([line for line in said(caplog) if "does not check out" in line]) == 1
    daemon.alive = True
    daemon.order(Order.STOP, "enough")
    with pytest.raises(StopRequested):
        guard.before_step(9)


def test_an_order_that_arrives_late_behind_its_sequence_word_is_not_missed(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    """As where memory is weakly ordered: the word that names the slot is seen before the slot."""
    guard = guards()
    guard.before_step(1)
    daemon.order(Order.HOLD, "server_dead")
    path = daemon.run_dir / "gate"
    whole = path.read_bytes()
    corrupt(path)
    guard.before_step(2)
    with path.open("r+b") as file:
        file.write(whole[:2048])
    time.after(5, lambda: daemon.order(Order.GO))
    before = time.ns
    guard.before_step(3)
    assert (time.ns - before) / 1e9 >= 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"STEPGATE\x63" + bytes(4087), "layout version 99"),
        (b"junk", "not a gate page"),
        (None, "another boot"),
    ],
    ids=["version", "junk", "boot"],
)
def test_a_foreign_page_is_no_daemon_until_the_daemon_makes_its_own(
    guards: Guards,
    daemons: Daemons,
    time: VirtualTime,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes | None,
    words: str,
) -> None:
    if content is None:
        GatePage.create(tmp_path / "gate", boot_id=bytes(16)).close()
    else:
        (tmp_path / "gate").write_bytes(content)
    guard = guards()
    for step in range(4):
        one_step(guard, step)
        time.sleep(2)
    assert len([line for line in said(caplog) if words in line]) == len(said(caplog)) == 1
    daemon = daemons()
    daemon.order(Order.STOP, "enough")
    time.sleep(2)
    with pytest.raises(StopRequested):
        guard.before_step(5)


def test_a_page_that_may_only_be_read_is_obeyed(
    guards: Guards, daemons: Daemons, time: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    """Root may write anywhere, so the trainer here is another user."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        obeyed_read_only(guards, daemons(run_dir=Path(folder)), time)
    assert len([line for line in said(caplog) if "orders are obeyed" in line]) == 1


def obeyed_read_only(guards: Guards, daemon: VirtualDaemon, time: VirtualTime) -> None:
    daemon.run_dir.chmod(0o755)
    (daemon.run_dir / "gate").chmod(0o644)
    os.seteuid(65534)
    try:
        guard = guards(daemon.run_dir)
        daemon.order(Order.HOLD, "server_dead")
        time.after(5, lambda: daemon.order(Order.GO))
        before = time.ns
        guard.before_step(1)
        guard.after_step(1)
        assert (time.ns - before) / 1e9 >= 5
    finally:
        os.seteuid(0)
    assert daemon.page.trainer() is None


def test_a_run_dir_that_is_a_file_or_read_only_or_full_is_no_exception(
    guards: Guards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", Path("/proc/1"), Path("/dev/full"), tmp_path / ("x" * 300)):
        guard = guards(place)
        for step in range(2):
            one_step(guard, step)
    assert 4 <= len(said(caplog)) <= 8


def test_guard_json_is_read_and_what_is_wrong_in_it_is_said_once(
    guards: Guards, daemon: VirtualDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    (daemon.run_dir / "guard.json").write_text(
        '{"max_failed_fraction": 0.5, "colour": 1, "orphan_hold_s": "long"}'
    )
    guard = guards()
    for step in range(3):
        one_step(guard, step)
    assert guard.settings == GuardSettings(max_failed_fraction=0.5)
    assert len(said(caplog)) == 2
    assert "colour" in said(caplog)[0]
    assert "orphan_hold_s" in said(caplog)[1]


def test_a_full_socket_drops_reports_and_does_not_hang_the_run(
    guards: Guards, daemons: Daemons, time: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = daemons(listens=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(daemon.run_dir / "reports.sock"))
        guard = guards()
        guard.before_step(1)
        for _ in range(5000):
            if guard.reports_dropped:
                break
            guard.saved(1, "/c")
        assert guard.reports_dropped, "the socket never filled"
        before = time.ns
        one_step(guard, 1)
        assert 5 <= (time.ns - before) / 1e9 < 6
    assert any("takes no reports" in line for line in said(caplog))


def test_an_absent_socket_with_on_daemon_lost_hold_holds(
    guards: Guards, daemons: Daemons, time: VirtualTime
) -> None:
    daemon = daemons(listens=False)
    guard = guards(settings=GuardSettings(on_daemon_lost="hold"))
    time.after(100, daemon.listen)
    before = time.ns
    assert guard.admit(1, ["a"]).ok
    assert 100 <= (time.ns - before) / 1e9 < 102


def test_a_heartbeat_thread_beats_and_survives_what_goes_wrong(
    daemons: Daemons, time: VirtualTime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = daemons()
    beaten = threading.Event()

    class Clock:
        def __call__(self) -> int:
            if threading.current_thread().name == "stepguard-heartbeat":
                raise RuntimeError("a broken clock")
            return time.now()

    guard = virtual_guard(tmp_path, time, heartbeat_s=0.001, clock_ns=Clock())
    try:
        for _ in range(2000):
            half = daemon.page.trainer()
            assert half is not None
            if half.beats >= 5:
                beaten.set()
                break
            beaten.wait(0.005)
        assert beaten.is_set()
        guard.before_step(1)
    finally:
        guard.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "stepguard-heartbeat"]


def test_a_closed_guard_goes_on_as_without_a_daemon(
    guards: Guards, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    guard = guards()
    with guard:
        guard.before_step(1)
    daemon.order(Order.STOP, "enough")
    one_step(guard, 2)
    guard.close()
    half = daemon.page.trainer()
    assert half is not None
    assert half.phase is Phase.UNKNOWN
    assert not daemon.of_kind("step")
