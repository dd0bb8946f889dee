"""W&B's HTTP interface, against a server of the tests' own on the loopback: pages, patience, refusals."""

import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepguardd.sources.reward.rows import StreamError
from stepguardd.sources.reward.wandb_api import PAGE_STEPS, WandbApi

Answer = tuple[int, dict[str, str], bytes]


class Server:
    """Answers each question with `answer(variables)`; keeps the questions and the authorizations."""

    def __init__(self) -> None:
        self.questions: list[dict[str, object]] = []
        self.authorizations: list[str | None] = []
        self.answer: Callable[[dict[str, int]], Answer] = history([])
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                question = json.loads(body)
                server.questions.append(question["variables"])
                server.authorizations.append(self.headers["Authorization"])
                status, headers, content = server.answer(question["variables"])
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._httpd.server_port}"
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._thread.join(timeout=10)
        self._httpd.server_close()


def history(rows: list[dict[str, object]], state: str = "running") -> Callable[[dict[str, int]], Answer]:
    """A run with these rows, given out as W&B does: pages of rows as JSON text, and the newest step."""

    def answer(variables: dict[str, int]) -> Answer:
        page = [
            json.dumps(row) for row in rows if variables["from"] <= int(str(row["_step"])) < variables["to"]
        ]
        last = max((int(str(row["_step"])) for row in rows), default=-1)
        run = {"state": state, "historyKeys": {"lastStep": last}, "history": page}
        return 200, {}, json.dumps({"data": {"project": {"run": run}}}).encode()

    return answer


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def api(server: Server) -> Iterator["Clocked"]:
    server.questions.clear()
    server.authorizations.clear()
    clocked = Clocked(server)
    yield clocked
    clocked.reader.close()


class Clocked:
    """A reader on a clock that the test turns."""

    def __init__(self, server: Server, **options: object) -> None:
        self.now = 1000.0
        self.server = server
        self.reader = WandbApi(
            "me/p/abc",
            key="secret-key",
            base_url=server.url,
            clock=lambda: self.now,
            timeout_s=5.0,
            **options,  # type: ignore[arg-type]
        )


def row(step: int) -> dict[str, object]:
    return {
        "_step": step,
        "_timestamp": 1.5e9 + step,
        "train/reward": step / 4,
        "train/global_step": step // 2,
    }


def test_pages_follow_one_another_and_nothing_is_read_twice(api: Clocked, server: Server):
    rows = [row(step) for step in [*range(0, 1200, 7)]]
    server.answer = history(rows)
    seen = []
    while True:
        seen += [r for r in api.reader.poll() if r.metric == "train/reward"]
        if api.reader.caught_up:
            break
    assert [(r.step, r.value, r.time) for r in seen] == [
        (s // 2, s / 4, 1.5e9 + s) for s in range(0, 1200, 7)
    ]
    assert len(server.questions) == 1 + 1200 // PAGE_STEPS
    assert server.authorizations[0] == "Basic " + base64.b64encode(b"api:secret-key").decode()
    assert api.reader.poll() == ()
    assert len(server.questions) == 3, "it waits for its period"
    rows.append(row(1200))
    api.now += api.reader.due_s
    assert [r.value for r in api.reader.poll() if r.metric == "train/reward"] == [300.0]
    server.answer = history(rows, "finished")
    api.now += 15
    assert api.reader.poll() == ()
    assert api.reader.finished
    resumed = Clocked(server, position=api.reader.position)
    assert resumed.reader.poll() == ()
    resumed.reader.close()


def test_steps_that_lie_far_apart_and_rows_that_were_not_asked_for(api: Clocked, server: Server):
    """Empty pages are passed over; what lies before the page was read already."""
    rows = [row(0), row(5000)]
    answer = history(rows)
    server.answer = lambda asked: answer(asked if asked["from"] < 4500 else {"from": 0, "to": 9999})
    seen = []
    while True:
        seen += [r.value for r in api.reader.poll() if r.metric == "train/reward"]
        if api.reader.caught_up:
            break
    assert seen == [0.0, 1250.0]
    assert len(server.questions) == 5000 // PAGE_STEPS + 1


def test_the_server_is_left_alone_for_as_long_as_it_asks(api: Clocked, server: Server):
    server.answer = lambda _: (429, {"Retry-After": "77"}, b"slow down")
    assert api.reader.poll() == ()
    assert api.reader.due_s == 77
    assert any("HTTP 429" in note for note in api.reader.notes())
    server.answer = lambda _: (429, {"RateLimit-Remaining": "0", "RateLimit-Reset": "55"}, b"")
    api.now += 77
    api.reader.poll()
    assert api.reader.due_s == 55
    answer = history([row(1)])
    server.answer = lambda variables: (
        200,
        {"RateLimit-Remaining": "0", "RateLimit-Reset": "44"},
        answer(variables)[2],
    )
    api.now += 55
    assert api.reader.poll() != ()
    assert api.reader.due_s == 44


def test_failures_pass_with_growing_gaps_and_a_note(api: Clocked, server: Server):
    gaps = []
    for answer in [(500, {}, b""), (503, {}, b""), (200, {}, b"no json"), (200, {}, b"[" * 100_000)]:
        server.answer = lambda _, answer=answer: answer
        assert api.reader.poll() == ()
        assert api.reader.caught_up
        gaps.append(api.reader.due_s)
        api.now += api.reader.due_s
    assert gaps == [15, 30, 60, 120]
    server.answer = history([row(1)])
    assert api.reader.poll() != ()
    assert api.reader.due_s == 15
    assert len(api.reader.notes()) == 3


def test_a_server_that_is_not_there_is_a_failure_that_passes():
    reader = WandbApi("me/p/abc", key="k", base_url="http://127.0.0.1:9", timeout_s=2.0)
    assert reader.poll() == ()
    assert any("could not be read" in note for note in reader.notes())
    reader.close()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_for_a_person_and_does_not_show_the_key(api: Clocked, server: Server, status: int):
    server.answer = lambda _: (status, {}, b"")
    with pytest.raises(StreamError, match=rf"me/p/abc: W&B answers {status}") as refused:
        api.reader.poll()
    assert "secret-key" not in str(refused.value)


def test_no_such_run_and_a_refused_query_are_said(api: Clocked, server: Server):
    server.answer = lambda _: (200, {}, b'{"data": {"project": null}}')
    with pytest.raises(StreamError, match="knows no such run"):
        api.reader.poll()
    server.answer = lambda _: (200, {}, b'{"errors": [{"message": "no field x"}]}')
    api.now += 100
    with pytest.raises(StreamError, match="no field x"):
        api.reader.poll()


def test_an_endless_answer_is_cut_off(api: Clocked, server: Server):
    server.answer = lambda _: (200, {}, b"x" * (17 << 20))
    assert api.reader.poll() == ()
    assert any("longer than" in note for note in api.reader.notes())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    run=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["state", "historyKeys", "lastStep", "history", "_step", "train/reward"]),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_no_answer_makes_it_raise_anything_but_its_error(api: Clocked, server: Server, run: object):
    body = json.dumps({"data": {"project": {"run": run}}}).encode()
    server.answer = lambda _: (200, {}, body)
    api.now += 1000
    with contextlib.suppress(StreamError):
        api.reader.poll()
        json.dumps(api.reader.position)


def test_a_run_is_named_in_full():
    with pytest.raises(StreamError, match="entity/project/run_id"):
        WandbApi("p/abc", key="k")
