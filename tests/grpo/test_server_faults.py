"""How the embedded server fails: the same signs, in the same order, as measured on SGLang 0.5.23."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from grpo.server_process import ServerProcess, running

pytestmark = pytest.mark.e2e

GENERATE = {"input_ids": [10, 1, 11], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
Start = Callable[..., ServerProcess]


@pytest.fixture
def start(base_model: Path, tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(*flags: str, model: Path = base_model, **more: Any) -> ServerProcess:
            log = tmp_path / f"server-{time.monotonic_ns()}.log"
            return stack.enter_context(running(model, log, *flags, **more))

        yield start


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def gone(process: psutil.Process, timeout_s: float = 10.0) -> bool:
    """Whether the process ended by itself; a zombie has."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def until_log(server: ServerProcess, text: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while text not in server.log:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.02)


def until_busy(http: httpx.Client) -> None:
    deadline = time.monotonic() + 10
    while 'http_requests_active{endpoint="/generate",method="POST"} 0.0' in http.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)


# A process of the tree dies


def test_a_killed_scheduler_makes_a_black_hole_and_then_the_tree_kills_itself(
    start: Start, pool: ThreadPoolExecutor
) -> None:
    server = start("--crash-diagnostics-s", "2").until_up()
    with server.client() as http:
        http.post("/slow_down", json={"forward_sleep_time": 30})
        call = pool.submit(http.post, "/generate", json=GENERATE)
        until_busy(http)
        scheduler = server.scheduler()
        scheduler.kill()
        until_log(server, "before crash diagnostics")
        with pytest.raises(httpx.ReadTimeout):  # it connects and is never answered
            httpx.get(server.url + "/model_info", timeout=httpx.Timeout(0.5), trust_env=False)
        assert server.exit_code() == -signal.SIGKILL
        with pytest.raises(httpx.RemoteProtocolError):
            call.result(timeout=10)
    assert f"Subprocess scheduler_0 (pid={scheduler.pid}) crashed with exit code -9" in server.log
    assert "SIGQUIT received. signum=None, frame=None. It usually means one child failed." in server.log
    assert "No live scheduler processes found" in server.log


def test_without_diagnostics_the_tree_is_gone_at_once(start: Start) -> None:
    server = start(SGLANG_PYSPY_DUMP_BEFORE_CRASH="0").until_up()
    server.scheduler().kill()
    assert server.exit_code() == -signal.SIGKILL
    assert "crash diagnostics" not in server.log


@pytest.mark.parametrize("poison", [[10, 99_999], [[]]], ids=["out of vocabulary", "empty"])
def test_a_poison_request_takes_the_innocent_with_it(
    start: Start, pool: ThreadPoolExecutor, poison: list[Any]
) -> None:
    server = start("--crash-diagnostics-s", "0").until_up()
    with server.client() as http:
        http.post("/slow_down", json={"forward_sleep_time": 0.5})
        innocent = pool.submit(http.post, "/generate", json=GENERATE)
        until_busy(http)
        with pytest.raises(httpx.RemoteProtocolError):
            http.post("/generate", json=GENERATE | {"input_ids": poison})
        with pytest.raises(httpx.RemoteProtocolError):
            innocent.result(timeout=10)
    assert server.exit_code() == -signal.SIGKILL
    assert "Scheduler hit an exception: Traceback" in server.log
    assert "Error" in server.log


def test_two_loads_at_once_end_a_paused_server_and_no_other(
    start: Start, pool: ThreadPoolExecutor, base_model: Path
) -> None:
    """While it is paused nothing makes one load wait for the other, and both answers go to one promise."""
    server = start().until_up()
    body = {"model_path": str(base_model)}
    with server.client() as http:

        def two_at_once() -> list[BaseException | int]:
            """What became of both: a status, or the error; they meet in a scheduler that stands still."""
            server.scheduler().suspend()
            calls = [pool.submit(http.post, "/update_weights_from_disk", json=body) for _ in range(2)]
            http.get("/model_info")
            server.scheduler().resume()
            return [call.exception(timeout=20) or call.result().status_code for call in calls]

        assert two_at_once() == [200, 200]
        http.post("/pause_generation", json={"mode": "in_place"})
        deadline = time.monotonic() + 30
        while not any(isinstance(end, httpx.HTTPError) for end in two_at_once()):
            assert time.monotonic() < deadline, "they never met"
    assert server.exit_code() == -signal.SIGKILL
    assert "InvalidStateError" in server.log


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_scheduler_never_outlives_its_parent(start: Start, stopped: bool) -> None:
    server = start().until_up()
    scheduler = server.scheduler()
    if stopped:
        scheduler.suspend()
    server.process.kill()
    assert server.exit_code() == -signal.SIGKILL
    assert gone(scheduler)


# A process of the tree stops


def test_a_stopped_scheduler_is_never_noticed_and_open_calls_end_well(
    start: Start, pool: ThreadPoolExecutor
) -> None:
    server = start("--health-timeout-s", "1.5").until_up()
    scheduler = server.scheduler()
    with server.client(20) as http:
        scheduler.suspend()
        call = pool.submit(http.post, "/generate", json=GENERATE)
        info = pool.submit(http.get, "/server_info")
        for path in ("/model_info", "/ready", "/ping", "/metrics", "/v1/loads"):
            assert http.get(path).status_code == 200, path
        first, second = (http.get("/v1/loads").json()["loads"][0]["timestamp"] for _ in range(2))
        assert first == second  # the snapshot grows old
        assert http.get("/health").status_code == 503
        assert "couldn't get a response from detokenizer for last 1.5 seconds" in server.log
        assert http.get("/ready").status_code == 503  # the flag that the probe has set
        assert not call.done()
        assert not info.done()
        assert server.process.poll() is None
        scheduler.resume()
        assert call.result(timeout=10).status_code == 200
        assert info.result(timeout=10).status_code == 200
        assert http.get("/health").status_code == 200


# It is told to end


def test_sigterm_ends_an_idle_server_with_0(start: Start) -> None:
    server = start().until_up()
    scheduler = server.scheduler()
    server.process.terminate()
    assert server.exit_code() == 0
    assert gone(scheduler)
    assert "Draining requests and shutting down" in server.log


def test_sigterm_drains_and_still_takes_new_requests(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start().until_up()
    with server.client() as http:
        http.post("/slow_down", json={"forward_sleep_time": 0.3})
        early = pool.submit(http.post, "/generate", json=GENERATE)
        until_busy(http)
        server.process.terminate()
        until_log(server, "Gracefully exiting... Remaining number of requests 1.")
        late = pool.submit(http.post, "/generate", json=GENERATE)
        assert http.get("/health").status_code == 503
        assert early.result(timeout=10).status_code == 200
        assert late.result(timeout=10).status_code == 200
    assert server.exit_code() == 0


def test_sigterm_waits_for_a_frozen_scheduler_while_a_request_is_open(
    start: Start, pool: ThreadPoolExecutor
) -> None:
    server = start().until_up()
    scheduler = server.scheduler()
    with server.client() as http:
        scheduler.suspend()
        call = pool.submit(http.post, "/generate", json=GENERATE)
        until_busy(http)
        server.process.terminate()
        until_log(server, "Remaining number of requests 1.")
        assert server.process.poll() is None
        scheduler.resume()
        assert call.result(timeout=10).status_code == 200
    assert server.exit_code() == 0


def test_sigterm_forces_its_way_out_once_a_health_check_has_failed(
    start: Start, pool: ThreadPoolExecutor
) -> None:
    server = start("--health-timeout-s", "1", "--shutdown-grace-s", "0.5").until_up()
    server.scheduler().suspend()
    with server.client(20) as http:
        call = pool.submit(http.post, "/generate", json=GENERATE)
        assert http.get("/health").status_code == 503
        server.process.terminate()
        assert server.exit_code() == 0
        with pytest.raises(httpx.TransportError):
            call.result(timeout=10)
    assert "Force exiting." in server.log
    assert "Schedulers still alive 0.5s after ShutdownReq" in server.log


def test_sigint_ends_it_as_an_interrupt(start: Start) -> None:
    server = start().until_up()
    scheduler = server.scheduler()
    server.process.send_signal(signal.SIGINT)
    assert server.exit_code() == -signal.SIGINT
    assert gone(scheduler)


# It cannot start


def test_a_bad_model_path_exits_with_1(start: Start, tmp_path: Path) -> None:
    server = start(model=tmp_path / "nothing")
    assert server.exit_code() == 1
    assert str(tmp_path / "nothing") in server.log


def test_corrupt_weights_end_in_its_own_sigkill(start: Start, base_model: Path, tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt"
    shutil.copytree(base_model, corrupt)
    os.truncate(corrupt / "model.safetensors", 1000)
    server = start(model=corrupt)
    assert server.exit_code() == -signal.SIGKILL
    assert "Scheduler hit an exception" in server.log
    assert "Received sigquit from a child process." in server.log


def test_a_scheduler_killed_while_it_starts_exits_with_1(start: Start) -> None:
    server = start()
    server.until_scheduler().kill()
    assert server.exit_code() == 1
    assert "Rank 0 scheduler died during initialization (exit code: -9)" in server.log


def test_a_port_held_by_a_live_server_exits_with_3_after_the_ready_line(start: Start) -> None:
    first = start().until_up()
    second = start(port=first.port)
    assert second.exit_code() == 3
    assert "fired up and ready to roll" in second.log  # its warm-up met the other one: no proof of anything
    assert "[Errno 98] error while attempting to bind on address" in second.log
    with first.client() as http:
        assert http.get("/ready").status_code == 200


def test_a_port_held_by_nobody_who_answers_ends_in_its_own_sigkill(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        server = start("--warmup-timeout-s", "1", port=holder.getsockname()[1])
        assert server.exit_code() == -signal.SIGKILL
    assert "Initialization failed. warmup error:" in server.log
    assert "ready to roll" not in server.log


def test_the_parent_imports_neither_torch_nor_numpy(start: Start) -> None:
    server = start().until_up()
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "_multiarray_umath" not in maps
    assert "libtorch" not in maps
    assert "_multiarray_umath" in Path(f"/proc/{server.scheduler().pid}/maps").read_text()


def test_requests_to_a_dead_scheduler_do_not_flood_the_log(start: Start) -> None:
    """What reached the parent before it noticed was written to a closed socket, one line of log each."""
    server = start("--crash-diagnostics-s", "0").until_up()
    scheduler = server.scheduler()
    os.kill(server.process.pid, signal.SIGSTOP)  # it shall notice with all of them at its door
    asked = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    body = json.dumps(GENERATE).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    for connection in asked:
        connection.sendall(head + body)
    scheduler.kill()
    assert gone(scheduler)
    os.kill(server.process.pid, signal.SIGCONT)
    assert server.exit_code() == -signal.SIGKILL
    for connection in asked:
        connection.close()
    assert "crashed with exit code -9" in server.log
    assert "socket.send()" not in server.log
