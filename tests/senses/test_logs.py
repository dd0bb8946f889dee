"""Logs: every row of the table on its own example, and the follower on files that misbehave."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepguardd.core.signs import Sign
from stepguardd.sources.logs import LINE_CHARS_MAX, LogError, LogFollower, Stage
from stepguardd.sources.signatures import SIGNATURES

HARMLESS = [
    '[2026-11-20 10:00:00] INFO:     127.0.0.1:51234 - "POST /generate HTTP/1.1" 200 OK',
    "[2026-11-20 10:00:01] Decode batch. #running-req: 32, #token: 12345, token usage: 0.31, #queue-req: 0",
    "kill_process_tree called: parent_pid=4242",
    "step:12 - critic/score/mean:0.5 - timing_s/step:9.1",
    "WARNING: watchdog timeout ( not one of ours )",
    "Subprocess scheduler_0 started",
    "RuntimeError: CUDA error: out of memory",  # without capitals it is the driver's wording of the same
]


@pytest.mark.parametrize("row", SIGNATURES, ids=lambda row: f"{row.sign.value}-{row.needle.decode()[:24]}")
def test_each_row_knows_its_example(row, tmp_path):
    """The first row that fits a line is the one that is reported: each example must reach its own meaning."""
    log = tmp_path / "server.log"
    log.write_text(row.example + "\n")
    [match] = LogFollower(log).poll()
    assert match.sign is row.sign
    assert (
        row.pattern is None or row.pattern.groups == 0 or match.facts or "?" in row.pattern.pattern.decode()
    )


@pytest.mark.parametrize("line", HARMLESS)
def test_harmless_lines_mean_nothing(line, tmp_path):
    log = tmp_path / "server.log"
    log.write_text(line + "\n")
    assert LogFollower(log).poll() == ()


def test_every_meaning_has_a_row():
    assert {row.sign for row in SIGNATURES} == set(Sign)


@pytest.mark.parametrize(
    ("sign", "facts"),
    [
        (Sign.SCHEDULER_CRASHED, {"rank": "0", "pid": "4242", "code": "-9"}),
        (Sign.SCHEDULER_HUNG, {"who": "Scheduler", "seconds": "300", "soft": "False"}),
        (Sign.CUDA_OOM, {"tried": "2.00 GiB", "gpu": "3", "total": "79.10 GiB", "free": "1.02 GiB"}),
        (Sign.POOL_TOO_SMALL, {"fraction": "0.6"}),
        (Sign.KV_EXHAUSTED, {"retracted": "3"}),
        (
            Sign.RAY_MEMORY_KILL,
            {"pid": "123", "used": "21.50GB", "node_used": "241.00GB", "node_total": "251.00GB"},
        ),
        (Sign.HOST_OOM_KILL, {"pid": "4242", "name": "python"}),
        (Sign.XID, {"bus": "0000:3b:00", "xid": "79", "pid": "4242"}),
        (Sign.NCCL_TIMEOUT, {"rank": "3", "operation": "ALLREDUCE", "timeout_ms": "600000"}),
        (Sign.CONNECTION_REFUSED, {"port": "30000"}),
        (Sign.DISK_FULL, {"path": "/ckpt/step_188/model.safetensors"}),
        (Sign.START_FAILED, {"rank": "0", "code": "-9"}),
        (Sign.PORT_TAKEN, {"host": "127.0.0.1", "port": "30000"}),
    ],
)
def test_the_facts_of_a_line(sign, facts):
    row = next(row for row in SIGNATURES if row.sign is sign)
    assert row.facts(row.example.encode()) == facts


def test_running_out_of_memory_at_the_start_and_later_are_told_apart(tmp_path):
    """Unknown where the log begins in the middle; known from the start line on; kept over a restart."""
    log = tmp_path / "server.log"
    oom = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
    log.write_text(oom)
    follower = LogFollower(log)
    assert [match.stage for match in follower.poll()] == [Stage.UNKNOWN]
    with log.open("a") as file:
        file.write("server_args=ServerArgs(model_path='/m')\n" + oom)
    assert [match.stage for match in follower.poll()][-1] is Stage.STARTING
    with log.open("a") as file:
        file.write("The server is fired up and ready to roll!\n")
    assert follower.poll()[-1].sign is Sign.READY
    again = LogFollower(log, position=json.loads(json.dumps(follower.position)))
    with log.open("a") as file:
        file.write(oom)
    assert [(match.sign, match.stage) for match in again.poll()] == [(Sign.CUDA_OOM, Stage.RUNNING)]


def test_matches_come_in_the_order_of_their_lines(tmp_path):
    rows = [next(row for row in SIGNATURES if row.sign is sign) for sign in reversed(Sign)]
    log = tmp_path / "server.log"
    log.write_text("".join(f"noise\n{row.example}\n" for row in rows))
    assert [match.sign for match in LogFollower(log).poll()] == list(reversed(Sign))


def test_a_flood_is_one_match_with_a_count(tmp_path):
    log = tmp_path / "trainer.log"
    log.write_text(
        "asyncio.exceptions.CancelledError\n" * 500 + "OSError: [Errno 28] No space left on device\n"
    )
    matches = LogFollower(log).poll()
    assert [(match.sign, match.count) for match in matches] == [(Sign.CANCELLED, 500), (Sign.DISK_FULL, 1)]


def test_a_line_is_matched_once_it_is_whole(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("OSError: [Errno 28] No space left")
    follower = LogFollower(log)
    assert follower.poll() == ()
    with log.open("a") as file:
        file.write(" on device\n")
    assert [match.sign for match in follower.poll()] == [Sign.DISK_FULL]


def test_the_end_of_a_line_whose_beginning_was_never_read_is_no_line_after_a_restart_either(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("half of a line: ")
    follower = LogFollower(log, from_end=True)
    again = LogFollower(log, position=json.loads(json.dumps(follower.position)))
    with log.open("a") as file:
        file.write("OSError: [Errno 28] No space left on device\nasyncio.exceptions.CancelledError\n")
    assert [match.sign for match in follower.poll()] == [Sign.CANCELLED]
    assert [match.sign for match in again.poll()] == [Sign.CANCELLED]


def test_a_burst_is_dropped_with_a_counter_and_its_newest_lines_are_seen(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("")
    follower = LogFollower(log, backlog_bytes_max=10_000)
    with log.open("a") as file:
        file.write(
            "CancelledError\n" + "noise " * 16 * 5000 + "\n" + "more noise\n" * 500 + "SIGQUIT received.\n"
        )
    matches = [match for _ in range(5) for match in follower.poll()]
    assert [match.sign for match in matches] == [Sign.CHILD_FAILED]
    assert follower.dropped_bytes > 100_000
    assert follower.caught_up


def test_following_from_the_end_misses_no_line_that_comes_after(tmp_path):
    for before in ["SIGQUIT received.\n", "SIGQUIT received.\nhalf a li"]:
        log = tmp_path / "server.log"
        log.write_text(before)
        follower = LogFollower(log, from_end=True)
        with log.open("a") as file:
            file.write(("" if before.endswith("\n") else "ne\n") + "CancelledError\n")
        assert [match.sign for match in follower.poll()] == [Sign.CANCELLED]
        assert follower.dropped_bytes in {0, 3}


def test_rotation_and_truncation_lose_nothing_that_was_whole(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("CancelledError\n")
    follower = LogFollower(log)
    follower.poll()
    with log.open("a") as file:
        file.write("SIGQUIT received.\n")
    log.rename(tmp_path / "server.log.1")
    log.write_text("No space left on device\n")
    seen = [match.sign for _ in range(4) for match in follower.poll()]
    assert seen == [Sign.CHILD_FAILED, Sign.DISK_FULL]
    log.write_text("")
    follower.poll()
    log.write_text("CancelledError\n")
    assert [match.sign for match in follower.poll()] == [Sign.CANCELLED]


def test_invalid_utf8_and_control_characters_do_not_reach_a_terminal(tmp_path):
    log = tmp_path / "server.log"
    log.write_bytes(b"\x1b[31m\xff\xfe CancelledError \x07" + b"x" * 9000 + b"\n")
    [match] = LogFollower(log).poll()
    assert match.line.isprintable()
    assert len(match.line) == LINE_CHARS_MAX


def test_an_unreadable_log_is_an_error_that_names_it(tmp_path):
    (tmp_path / "folder.log").mkdir()
    with pytest.raises(LogError, match=r"folder\.log"):
        LogFollower(tmp_path / "folder.log").poll()
    assert LogFollower(tmp_path / "not there yet").poll() == ()


NEEDLES = st.sampled_from([row.needle for row in SIGNATURES])


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(NEEDLES | st.binary(max_size=30) | st.just(b"\n"), max_size=40), cut=st.integers(1, 400)
)
def test_no_bytes_are_trouble_and_no_line_is_seen_twice(parts, cut, tmp_path_factory):
    """Whatever the file holds and however it is sliced, the counts are those of one reading."""
    log = tmp_path_factory.mktemp("fuzz") / "x.log"
    log.write_bytes(b"".join(parts) + b"\n")

    def counts(bytes_max: int) -> Counter[Sign]:
        follower, total = LogFollower(log), Counter[Sign]()
        for _ in range(3000):
            for match in follower.poll(bytes_max):
                total[match.sign] += match.count
            if follower.caught_up:
                return total
        raise AssertionError("the follower never catches up")

    assert counts(cut) == counts(1 << 20)


@settings(max_examples=200, deadline=None)
@given(row=st.sampled_from(SIGNATURES), data=st.data())
def test_no_mutated_line_makes_a_pattern_raise_or_hang(row, data):
    line = bytearray(row.example.encode())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(line)))
        line[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6)) * data.draw(
            st.sampled_from([1, 1, 300])
        )
    facts = row.facts(bytes(line))
    assert facts is None or all(isinstance(value, str) for value in facts.values())
