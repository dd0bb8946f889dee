"""Whatever bytes or JSON a server answers with, each question to it comes to its declared result."""

import asyncio
import contextlib
import json
import math

from hypothesis import example, given, settings
from hypothesis import strategies as st

from stepguardd.core.events import Answer, GenerationAsked, SchedulerAsked, ServerProbed
from stepguardd.sources import sglang
from stepguardd.sources.sglang import Reply, open_requests, read_metrics, snapshot_time, weight_version

TIMEOUT_S = 5.0

numbers = st.integers() | st.floats() | st.integers(10**300, 10**310)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
loads = st.fixed_dictionaries({"loads": st.lists(st.fixed_dictionaries({"timestamp": scalars}), max_size=3)})
info = st.fixed_dictionaries({"weight_version": scalars})
bodies = (loads | info | anything).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=80)

names = st.sampled_from(
    [
        "sglang:num_running_reqs",
        "sglang:num_queue_reqs",
        "sglang:http_requests_active",
        "sglang:realtime_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:other",
        "# HELP",
        "",
    ]
)
labels = st.sampled_from(["", "{}", '{endpoint="/generate"}', '{rank="0', "{{", "}", '{a="b c"}']) | st.text(
    max_size=6
)
values = numbers.map(str) | st.text(max_size=6) | st.sampled_from(["NaN", "+Inf", "-Inf", "1_0", "1e999"])
metric_lines = st.lists(st.tuples(names, labels, values), max_size=6).map(
    lambda lines: "\n".join(f"{name}{label} {value}" for name, label, value in lines).encode(errors="replace")
)

heads = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 10\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nset-cookie: a=b; path=/\r\ncontent-length: 3, 4\r\n\r\n",
        b"HTTP/1.0 301 Moved\r\nlocation: http://[\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 204 None\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 \xff\xfe\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: \x00\r\n\r\n",
        b"",
    ]
)


@given(bodies)
@example(b"[" * 100_000)
@example(b'{"loads": [{"timestamp": 1e999}]}')
@example(b'{"loads": [{"timestamp": ' + b"9" * 5000 + b"}]}")
def test_a_snapshot_s_time_is_a_positive_number_or_unknown(body: bytes) -> None:
    found = snapshot_time(body)
    assert found is None or (found > 0.0 and math.isfinite(found))


@given(st.lists(st.floats(1.0, 2e9), min_size=1, max_size=4))
def test_the_slowest_scheduler_s_snapshot_counts(times: list[float]) -> None:
    body = json.dumps({"loads": [{"timestamp": at} for at in times]}).encode()
    assert snapshot_time(body) == min(times)


@given(bodies, st.sampled_from(Answer))
def test_a_version_is_told_of_an_ok_answer_alone(body: bytes, answer: Answer) -> None:
    found, version = weight_version(Reply(answer=answer, body=body))
    assert found is answer or (answer is Answer.OK and found is Answer.BROKEN)
    assert version is None or (found is Answer.OK and len(version) <= sglang.VERSION_CHARS_MAX)
    if version is not None:
        version.encode()  # can be stored


@given(metric_lines | st.binary(max_size=200))
def test_metrics_are_counts_or_unknown(body: bytes) -> None:
    for count in (*read_metrics(body), open_requests(body)):
        assert count is None or count >= 0


async def _asked(answer: bytes) -> tuple[int, ServerProbed, SchedulerAsked, GenerationAsked]:
    """Each of the daemon's questions, to a server that sends these bytes to everybody and hangs up."""
    requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            requests += 1
            writer.write(answer)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with sglang.client(url) as http:
            probed = await sglang.probe(http, "s", timeout_s=TIMEOUT_S)
            scheduler = await sglang.ask_scheduler(http, "s", timeout_s=TIMEOUT_S)
            token = await sglang.ask_token(http, "s", timeout_s=TIMEOUT_S)
    return requests, probed, scheduler, token


@settings(max_examples=60, deadline=None)
@given(heads, bodies | metric_lines)
def test_any_bytes_on_the_wire_are_an_answer(head: bytes, body: bytes) -> None:
    requests, probed, scheduler, token = asyncio.run(_asked(head + body))
    assert requests >= 6  # they were all asked
    answers = (probed.ready, probed.model_info, probed.metrics, scheduler.info, scheduler.loads, token.answer)
    assert all(isinstance(answer, Answer) for answer in answers)
    if probed.model_info is not Answer.OK:
        assert probed.weight_version is None
    if scheduler.loads is not Answer.OK:
        assert scheduler.loads_stamp is None
