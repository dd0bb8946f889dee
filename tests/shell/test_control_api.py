"""The control socket: who may call, what may be said, and what a hostile or broken other end can do."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shell.fake_daemon import WELL, FakeDaemon, serving
from stepguardd.control.client import ControlClient, ControlError, NoDaemonError
from stepguardd.control.contract import REPLY_BYTES_MAX, REQUEST_BYTES_MAX, SOCKET_NAME, Refused
from stepguardd.control.server import ControlSocketError, allowed_uids, listen, serve_control


def raw(path: Path, request: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the answer to these very bytes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def post(path: Path, what: str, body: bytes, headers: str = "") -> tuple[int, dict[str, Any]]:
    head = (
        f"POST /api/v1/{what} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return raw(path, head.encode() + body)


def test_the_status_is_what_the_daemon_says_with_null_for_what_json_lacks(tmp_path: Path) -> None:
    daemon = FakeDaemon({**WELL, "rewards": [float("nan"), 1.0, float("inf")]})
    with serving(tmp_path, daemon) as path, ControlClient(path) as client:
        assert client.status() == {**WELL, "rewards": [None, 1.0, None]}


@pytest.mark.parametrize(
    ("verb", "args", "passed_on"),
    [
        ("pause", {}, {}),
        ("resume", {}, {}),
        ("rollback", {"before_step": 188}, {"before_step": 188}),
        ("rollback", {}, {"before_step": None}),
        ("restart-server", {"server": "sglang"}, {"server": "sglang"}),
        ("plan-server", {"server": "s", "for_s": 60}, {"server": "s", "for_s": 60.0}),
        ("ack", {"incident": "i-1"}, {"incident": "i-1"}),
        ("mode", {"mode": "hold"}, {"mode": "hold"}),
    ],
)
def test_a_wish_reaches_the_daemon_with_the_callers_name_by_the_kernels_word(
    tmp_path: Path, verb: Any, args: dict[str, object], passed_on: dict[str, object]
) -> None:
    daemon = FakeDaemon()
    with serving(tmp_path, daemon) as path, ControlClient(path) as client:
        assert client.ask(verb, "because", args) == {"message": f"{verb} is under way"}
    ((asked, who, why, got),) = daemon.asked
    assert (asked, why, got) == (verb, "because", passed_on)
    assert f"(uid {os.geteuid()}, pid {os.getpid()})" in who


def test_a_refusal_keeps_its_words(tmp_path: Path) -> None:
    daemon = FakeDaemon(refusal="nothing is paused")
    with (
        serving(tmp_path, daemon) as path,
        ControlClient(path) as client,
        pytest.raises(Refused, match="nothing is paused"),
    ):
        client.ask("resume")
    assert len(daemon.asked) == 1


@pytest.mark.parametrize(
    ("verb", "body", "words"),
    [
        ("pause", {"whyy": "x"}, "whyy: Extra inputs"),
        ("pause", {"why": 3}, "why: "),
        ("pause", {"why": "x" * 501}, "why: "),
        ("rollback", {"before_step": "3"}, "before_step: "),
        ("rollback", {"before_step": -1}, "before_step: "),
        ("rollback", {"path": "/etc/passwd"}, "path: Extra inputs"),
        ("mode", {}, "mode: Field required"),
        ("mode", {"mode": "yolo"}, "mode: "),
        ("restart-server", {"server": ["a"]}, "server: "),
        ("plan-server", {}, "for_s: Field required"),
        ("plan-server", {"for_s": 90_000}, "for_s: "),
        ("plan-server", {"for_s": -1}, "for_s: "),
        ("pause", [], "the request's body: "),
    ],
)
def test_a_wish_that_is_not_exact_is_refused_by_name(
    tmp_path: Path, verb: str, body: object, words: str
) -> None:
    daemon = FakeDaemon()
    with serving(tmp_path, daemon) as path:
        code, answer = post(path, verb, json.dumps(body).encode())
    assert code == 422
    assert answer["error"].startswith(words)
    assert "\n" not in answer["error"]
    assert daemon.asked == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(verb=st.sampled_from(["pause", "rollback", "mode", "x"]), body=st.binary(max_size=200))
def test_bytes_of_any_kind_are_answered_in_json(
    fuzzed: tuple[Path, FakeDaemon], verb: str, body: bytes
) -> None:
    path, daemon = fuzzed
    code, answer = post(path, verb, body)
    assert code in {400, 404, 422}
    assert "error" in answer
    assert daemon.asked == []


@pytest.fixture
def fuzzed(tmp_path: Path) -> Iterator[tuple[Path, FakeDaemon]]:
    daemon = FakeDaemon()
    with serving(tmp_path, daemon) as path:
        yield path, daemon


def test_another_uid_is_refused_whatever_it_asks(tmp_path: Path) -> None:
    daemon = FakeDaemon()
    nobody_here = frozenset({os.geteuid() + 1})
    with serving(tmp_path, daemon, nobody_here) as path, ControlClient(path) as client:
        with pytest.raises(ControlError, match=r"may not do this: see allowed_uids"):
            client.status()
        with pytest.raises(ControlError, match=f"uid {os.geteuid()} may not"):
            client.ask("pause")
    assert daemon.asked == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_process_of_another_user_is_refused_even_where_the_file_lets_it_in() -> None:
    """The kernel names the uid; nothing that the caller sends can change it."""
    daemon = FakeDaemon()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), daemon) as path:
        path.parent.chmod(0o755)
        path.chmod(0o666)
        request = "POST /api/v1/pause HTTP/1.1\r\nHost: x\r\nX-Uid: 0\r\nContent-Length: 2\r\n\r\n{}"
        code = f"""if True:
            import os, socket, sys
            os.setuid(65534)
            caller = socket.socket(socket.AF_UNIX)
            caller.connect(sys.argv[1])
            caller.sendall({request.encode()!r})
            print(caller.makefile().read())
        """
        answer = _run_python(code, str(path))
    assert answer.startswith("HTTP/1.1 403")
    assert "uid 65534 may not do this" in answer
    assert daemon.asked == []


def _run_python(code: str, *arguments: str) -> str:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout


def test_root_the_daemon_and_the_configured_are_allowed() -> None:
    assert allowed_uids((1000,)) == {0, os.geteuid(), 1000}


@pytest.mark.parametrize("announced", [True, False])
def test_a_request_without_end_is_cut_off(tmp_path: Path, announced: bool) -> None:
    """413 after 64 KiB, whether the length was announced or comes in chunks."""
    body = b'{"why": "' + b"x" * (2 * REQUEST_BYTES_MAX)
    daemon = FakeDaemon()
    with serving(tmp_path, daemon) as path:
        if announced:
            code, answer = post(path, "pause", body)
        else:
            head = b"POST /api/v1/pause HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            head += b"Transfer-Encoding: chunked\r\n\r\n"
            code, answer = raw(path, head + b"%x\r\n" % len(body) + body + b"\r\n")
    assert code == 413
    assert "larger than" in answer["error"]
    assert daemon.asked == []


def test_reading_changes_nothing_and_unknown_paths_say_so(tmp_path: Path) -> None:
    daemon = FakeDaemon()
    with serving(tmp_path, daemon) as path:
        for request, code in [
            ("GET /api/v1/pause", 405),
            ("GET /api/v2", 404),
            ("DELETE /api/v1/status", 405),
        ]:
            got, answer = raw(path, f"{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert (got, request.split()[1] in answer["error"]) == (code, True)
        assert raw(path, b"GET /healthz HTTP/1.0\r\n\r\n") == (200, {"ok": True, "decided_s_ago": 0.1})
    assert daemon.asked == []


def test_a_daemon_that_does_not_answer_a_wish_is_not_waited_for_forever(tmp_path: Path) -> None:
    from stepguardd.control.api import create_app
    from stepguardd.control.server import serve

    class Stuck(FakeDaemon):
        async def ask(self, *_: object) -> Mapping[str, object]:
            self.asked.append(("", "", "", {}))
            await asyncio.Event().wait()
            raise AssertionError

    stuck = Stuck()

    async def scene() -> None:
        listener = listen(tmp_path / SOCKET_NAME)
        task = asyncio.create_task(
            serve(create_app(stuck, ask_timeout_s=0.05), listener, uids=allowed_uids())
        )
        with (
            ControlClient(tmp_path / SOCKET_NAME) as client,
            pytest.raises(ControlError, match=r"within 0\.05 s"),
        ):
            await asyncio.to_thread(client.ask, "pause")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scene())
    assert len(stuck.asked) == 1


def test_the_socket_is_for_owner_and_group_and_is_gone_afterwards(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with serving(tmp_path, FakeDaemon()) as path:
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
    finally:
        assert os.umask(before) == 0o022, "the process's umask was left as it was"
    assert not path.exists()


def test_a_socket_that_a_dead_daemon_left_is_taken_over(tmp_path: Path) -> None:
    left = listen(tmp_path / SOCKET_NAME)
    left.close()
    assert (tmp_path / SOCKET_NAME).is_socket()
    with serving(tmp_path, FakeDaemon()) as path, ControlClient(path) as client:
        assert client.status() == WELL


def test_a_living_daemons_socket_is_not_taken(tmp_path: Path) -> None:
    with serving(tmp_path, FakeDaemon()) as path:
        with pytest.raises(ControlSocketError, match=r"control\.sock: a daemon is already running there"):
            asyncio.run(serve_control(FakeDaemon(), path, uids=allowed_uids()))
        with ControlClient(path) as client:
            assert client.status() == WELL


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / SOCKET_NAME
    file.write_text("precious")
    with pytest.raises(ControlSocketError, match="is in the way and is not a socket"):
        listen(file)
    assert file.read_text() == "precious"
    with pytest.raises(ControlSocketError, match="No such file or directory"):
        listen(tmp_path / "nowhere" / SOCKET_NAME)


def test_a_successors_socket_survives_the_end_of_its_predecessor(tmp_path: Path) -> None:
    with serving(tmp_path, FakeDaemon()) as path:
        path.rename(tmp_path / "old")
        successor = listen(path)
    assert path.is_socket()
    successor.close()


def test_the_daemons_signal_handlers_stay_its_own(tmp_path: Path) -> None:
    """uvicorn would take SIGINT and SIGTERM for itself."""

    async def scene() -> list[object]:
        path = tmp_path / SOCKET_NAME
        task = asyncio.create_task(serve_control(FakeDaemon(), path, uids=allowed_uids()))
        await asyncio.sleep(0)
        with ControlClient(path) as client:
            assert await asyncio.to_thread(client.status) == WELL
        during = [signal.getsignal(what) for what in (signal.SIGINT, signal.SIGTERM)]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return during

    before = [signal.getsignal(what) for what in (signal.SIGINT, signal.SIGTERM)]
    during = asyncio.run(scene())
    # asyncio.run has a handler of its own for SIGINT while it runs.
    assert during[1] == before[1]
    assert "uvicorn" not in repr(during)


# --- the client against a bad other end ---


@contextlib.contextmanager
def answering(path: Path, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """Somebody at this socket who reads a request and then does this."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def live() -> None:
        knock, _ = listener.accept()
        knock.close()
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            answer(connection)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def _endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
    for _ in range(1024):
        connection.sendall(b"x" * (1 << 20))


def _dripping(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    pause = threading.Event()
    for _ in range(1000):
        connection.sendall(b"x")
        pause.wait(0.02)


def _silent(connection: socket.socket) -> None:
    connection.recv(1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (_endless, "larger than 1 MiB"),
        (_dripping, "no whole answer within"),
        (_silent, "no answer within"),
        (lambda c: c.sendall(b"SSH-2.0-OpenSSH\r\n"), "control.sock: "),
        (lambda c: None, "control.sock: "),
        (lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"), "no JSON object"),
        (lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"), "control.sock: "),
        (
            lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n" + b"[" * 400_000),
            "no JSON object",
        ),
        (lambda c: c.sendall(b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n{}"), "HTTP status 500"),
    ],
)
def test_the_client_survives_any_other_end(
    tmp_path: Path, answer: Callable[[socket.socket], None], words: str
) -> None:
    path = tmp_path / SOCKET_NAME
    with (
        answering(path, answer),
        ControlClient(path, timeout_s=0.5) as client,
        pytest.raises(ControlError) as failed,
    ):
        client.status()
    assert words in str(failed.value)
    assert "\n" not in str(failed.value)
    assert REPLY_BYTES_MAX == 1 << 20


def test_without_a_daemon_the_client_names_the_socket(tmp_path: Path) -> None:
    with ControlClient(tmp_path / SOCKET_NAME) as client:
        with pytest.raises(NoDaemonError, match=r"control\.sock: No such file or directory"):
            client.status()
        listen(tmp_path / SOCKET_NAME).close()
        with pytest.raises(NoDaemonError, match=r"control\.sock: Connection refused"):
            client.status()
