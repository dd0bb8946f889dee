"""`stepguard wait`: what is ready, and what is said of the rest."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from stepguardd.readiness import GpusWanted, look_at_gpus
from stepguardd.sources.gpu import GpuReading
from stepguardd.sources.nvml import Gpu

GIB = 1 << 30


class Loading(BaseHTTPRequestHandler):
    """A server whose flags answer at once, and which generates from the second time on."""

    asked = 0

    def do_GET(self) -> None:
        generates = self.path == "/health_generate"
        type(self).asked += generates
        self.send_response(503 if generates and type(self).asked < 2 else 200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def loading() -> Iterator[str]:
    Loading.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Loading) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def wait(*arguments: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "stepguardd", "wait", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.e2e
def test_a_server_is_ready_when_it_generates_and_not_before(loading: str) -> None:
    code, found, said = wait("--url", loading, "--timeout-s", "30")
    assert (code, found["ready"]) == (0, True)
    assert Loading.asked == 2
    assert found["looks"] == [{"name": loading, "ready": True, "detail": "generates"}]
    assert "listens, and does not generate (503)" in said


@pytest.mark.e2e
def test_what_is_not_ready_in_time_is_named(loading: str) -> None:
    code, found, said = wait("--url", loading, "--url", "http://127.0.0.1:9", "--timeout-s", "3")
    assert (code, found["ready"]) == (1, False)
    assert [look["ready"] for look in found["looks"]] == [True, False]
    assert said.splitlines()[-1].endswith("http://127.0.0.1:9: nothing listens at http://127.0.0.1:9 yet")


@pytest.mark.e2e
def test_nothing_to_wait_for_is_wrong_use() -> None:
    code, _, said = wait("--set", "run.name=empty")
    assert code == 2
    assert "--url" in said


def gpu(index: int, used: int = 0, *, lost: bool = False) -> Gpu:
    return Gpu(index=index, lost=lost, used_bytes=None if lost else used * GIB, total_bytes=80 * GIB)


@pytest.mark.parametrize(
    ("reading", "ready", "detail"),
    [
        (GpuReading(gpus=None, cause="no driver"), False, "no driver"),
        (GpuReading(gpus=(gpu(0),)), False, "1 of 2 answer"),
        (GpuReading(gpus=(gpu(0), gpu(1, lost=True))), False, "GPU 1 has fallen off the bus"),
        (GpuReading(gpus=(gpu(0), gpu(1, 40))), False, "GPU 1: 50 % of its memory is free"),
        (GpuReading(gpus=(gpu(0), Gpu(index=1))), False, "GPU 1: its memory is unknown"),
        (GpuReading(gpus=(gpu(0), gpu(1, 4))), True, "2 answer"),
    ],
)
def test_gpus_are_ready_when_enough_answer_with_enough_free(
    reading: GpuReading, ready: bool, detail: str
) -> None:
    look = look_at_gpus(GpusWanted(count=2, free_share=0.9), reading)
    assert (look.ready, look.detail) == (ready, detail)
