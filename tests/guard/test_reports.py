"""Reports: never in the way of training, never trusted by the reader."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepguard.reports import REPORT_BYTES_MAX, BadReport, ReportSender, number, numbers, parse_report

EXAMPLES: list[dict[str, Any]] = [
    {"kind": "hello", "attempt": 0, "pid": 4, "host": "n1", "version": "0.1.0", "handles": ["resync"]},
    {
        "kind": "batch",
        "attempt": 0,
        "step": 188,
        "batch": 201,
        "ok": 61,
        "failed": 3,
        "dropped_groups": 0,
        "reward": {"mean": 0.8, "std": 0.3, "min": 0.0, "max": 1},
        "weight_versions": {"187": 64},
        "stale": 0,
        "refused": None,
        "began": 12.5,
    },
    {
        "kind": "step",
        "attempt": 1,
        "step": 188,
        "reward": "NaN",
        "metrics": {"kl": "-Infinity"},
        "weight_version": "1",
    },
    {"kind": "saved", "attempt": 0, "step": 180, "path": "/ckpt", "norms": {"w": 1.5}},
    {"kind": "ack", "attempt": 0, "generation": 7, "order": "RESYNC", "ok": True, "detail": ""},
    {"kind": "memory", "attempt": 0, "cgroup": "/job", "identity": 42, "total": 3, "new": 1},
    {"kind": "call_failed", "attempt": 0, "what": "reward", "error": "timeout"},
    {"kind": "requests_failed", "attempt": 0, "in_a_row": 8, "error": "ConnectError"},
    {"kind": "calls_hung", "attempt": 0, "what": "reward", "failed": 40, "calls": 200},
]
EXAMPLES = [{"v": 1} | example for example in EXAMPLES]


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as bound:
        bound.bind(str(tmp_path / "reports.sock"))
        yield bound


@pytest.mark.parametrize("report", EXAMPLES, ids=[example["kind"] for example in EXAMPLES])
def test_every_kind_arrives_as_it_was_sent(tmp_path: Path, receiver: socket.socket, report: Any) -> None:
    sender = ReportSender(tmp_path / "reports.sock")
    assert sender.send(report)
    assert parse_report(receiver.recv(REPORT_BYTES_MAX + 1)) == report
    assert (sender.sent, sender.dropped) == (1, 0)
    sender.close()


@pytest.mark.parametrize("report", EXAMPLES, ids=[example["kind"] for example in EXAMPLES])
def test_a_field_missing_or_of_another_type_is_named(report: dict[str, Any]) -> None:
    for name in report.keys() - {"v", "kind", "began"}:
        with pytest.raises(BadReport, match=f"{report['kind']}.{name}: missing"):
            parse_report(json.dumps({key: value for key, value in report.items() if key != name}).encode())
        for wrong in ([[]], {"a": [1]}, -1.5e400, "x" * 5000):
            text = json.dumps(report | {name: wrong}).replace("-Infinity,", "-1e400,")
            with pytest.raises(BadReport):
                parse_report(text.encode())


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"{" * 60_000,
        b"[" * 60_000,
        b'{"v":1}',
        b'{"v":2,"kind":"hello"}',
        b'{"v":true,"kind":"hello"}',
        b'{"v":1,"kind":"goodbye"}',
        b'{"v":1,"kind":["hello"]}',
        b'{"v":1,"kind":"ack","attempt":0,"generation":'
        + b"9" * 5000
        + b',"order":"GO","ok":true,"detail":""}',
        b'{"v":1,"kind":"ack","attempt":0,"generation":1e3,"order":"GO","ok":true,"detail":""}',
        b'{"v":1,"kind":"ack","attempt":0,"generation":true,"order":"GO","ok":true,"detail":""}',
        b'{"v":1,"kind":"ack","attempt":-1,"generation":1,"order":"GO","ok":true,"detail":""}',
        b'{"v":1,"kind":"ack","attempt":0,"generation":1,"order":"FLY","ok":true,"detail":""}',
        b'{"v":1,"kind":"step","attempt":0,"step":1,"reward":NaN,"metrics":{},"weight_version":null}',
        b'{"v":1,"kind":"step","attempt":0,"step":1,"reward":"nan","metrics":{},"weight_version":null}',
        b" " * (REPORT_BYTES_MAX + 1),
    ],
)
def test_what_is_no_report_is_refused(datagram: bytes) -> None:
    with pytest.raises(BadReport):
        parse_report(datagram)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_give_a_report_or_the_declared_error(datagram: bytes) -> None:
    with pytest.raises(BadReport):
        parse_report(datagram)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    example=st.sampled_from(EXAMPLES),
    name=st.sampled_from(sorted({key for e in EXAMPLES for key in e})),
    value=json_values,
)
def test_any_value_in_any_field_gives_a_report_or_the_declared_error(
    example: Any, name: str, value: Any
) -> None:
    try:
        report = parse_report(json.dumps(example | {name: value}).encode())
    except BadReport:
        return
    json.dumps(report, allow_nan=False)


def test_fields_of_a_later_version_are_left_out() -> None:
    assert "colour" not in parse_report(json.dumps(EXAMPLES[0] | {"colour": 1}).encode())


def test_without_a_socket_reports_are_dropped_counted_and_come_back_with_it(tmp_path: Path) -> None:
    sender = ReportSender(tmp_path / "reports.sock")
    assert not sender.send(EXAMPLES[0])  # type: ignore[arg-type]
    assert sender.dropped == 1
    assert "reports.sock" in sender.last_error
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "reports.sock"))
        assert sender.send(EXAMPLES[0])  # type: ignore[arg-type]
    assert not sender.send(EXAMPLES[0])  # type: ignore[arg-type]
    assert (sender.sent, sender.dropped) == (1, 2)
    sender.close()


def test_a_full_socket_drops_and_counts_and_never_waits(tmp_path: Path, receiver: socket.socket) -> None:
    sender = ReportSender(tmp_path / "reports.sock")
    for _ in range(10_000):
        if not sender.send(EXAMPLES[1]):  # type: ignore[arg-type]
            break
    assert sender.dropped == 1, "the socket never filled"
    receiver.recv(REPORT_BYTES_MAX)
    assert sender.send(EXAMPLES[1])  # type: ignore[arg-type]
    sender.close()


def test_a_run_dir_too_deep_for_a_socket_is_said_not_raised(tmp_path: Path) -> None:
    sender = ReportSender(tmp_path / ("deep" * 40) / "reports.sock")
    assert not sender.send(EXAMPLES[0])  # type: ignore[arg-type]
    assert "shorten run_dir" in sender.last_error


def test_a_report_too_long_loses_what_it_can_do_without(tmp_path: Path, receiver: socket.socket) -> None:
    sender = ReportSender(tmp_path / "reports.sock")
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    assert sender.send(EXAMPLES[2] | {"metrics": {f"layer.{i}.norm": 0.1 for i in range(4000)}})  # type: ignore[arg-type]
    assert parse_report(receiver.recv(REPORT_BYTES_MAX + 1)) == EXAMPLES[2] | {"metrics": {}}
    assert not sender.send(EXAMPLES[5] | {"what": "x" * 70_000})  # type: ignore[arg-type]
    assert "too long" in sender.last_error
    sender.close()


def test_numbers_travel_by_name_where_json_has_none() -> None:
    assert [number(value) for value in (1, math.nan, math.inf, -math.inf)] == [
        1.0,
        "NaN",
        "Infinity",
        "-Infinity",
    ]
    assert numbers({"a": 1, "b": "0.5", "c": None, "d": math.nan, "e": [1]}) == {"a": 1.0, "d": "NaN"}
    assert len(numbers({str(i): i for i in range(10_000)})) == 4096
